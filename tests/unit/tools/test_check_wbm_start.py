"""Relaxations from moved starts: structures are moved as said, results paired, a second run computes nothing."""

from pathlib import Path

import check_wbm_start
import numpy as np
import pytest

from mffm.errors import InputError
from mffm.evaluate.benchmark.run import Settings, run_task, subset
from mffm.evaluate.benchmark.source import Source
from mffm.evaluate.benchmark.task import Options
from mffm.evaluate.matbench_discovery.wbm import Wbm972

POTENTIAL = "ase:ase.calculators.lj:LennardJones"  # of any element; what it says is wrong, and the same from everywhere
N = 3


def test_starts_are_moved_as_they_say(public_data: Path):
    given = Wbm972().load(public_data)
    name = subset(list(given), 1)[0]
    atoms, label = given[name].structures()
    for start, (volume, sigma) in check_wbm_start.STARTS.items():
        moved, same = check_wbm_start.Started(start).load(public_data)[name].structures()
        assert moved.get_volume() / atoms.get_volume() == pytest.approx(volume)
        rest = moved.positions - atoms.get_scaled_positions(wrap=False) @ moved.cell.array
        assert np.std(rest) == pytest.approx(sigma, rel=0.5, abs=1e-9)
        assert same is label
    assert atoms.get_volume() == pytest.approx(given[name].structures()[0].get_volume())


@pytest.mark.slow
def test_the_table(public_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(InputError, match="not all of 3 structures are there"):
        check_wbm_start.main(tmp_path, public_data, limit=N)
    settings = Settings(public_data, 1, limit=N, options=Options(corrected_energies=True))
    run_task(Source(POTENTIAL), "matbench-discovery/wbm972", settings, tmp_path, lambda *_: None)
    check_wbm_start.main(tmp_path, public_data, limit=N)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [check_wbm_start.GIVEN, *check_wbm_start.STARTS]
    assert "3 of 3" in lines[2]
    assert "+0.0000 (+0.0000 to +0.0000)" in lines[2]
    paths = sorted((tmp_path / "matbench-discovery" / "wbm972").glob("start-*.jsonl"))
    before = [path.read_text() for path in paths]
    assert len(set(before)) == len(check_wbm_start.STARTS)
    check_wbm_start.main(tmp_path, public_data, limit=N)
    assert capsys.readouterr().out.splitlines() == lines
    assert [path.read_text() for path in paths] == before
