"""Costs of labels: the law that made them is found, on the shipped labels too; a zero is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from ase.io import read, write

from mffm.budget import costs
from mffm.budget.costs import Measured, Size
from mffm.data.store import Store
from mffm.errors import InputError

ROOT = Path(__file__).parents[3]
MOLECULES = ROOT / "data" / "molecules.extxyz"


def labels(exponent: float, scatter: float, n: int = 300) -> list[Measured]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(n):
        atoms = int(rng.integers(2, 40))
        electrons = atoms * float(rng.uniform(3, 6))
        basis = 14.0 * atoms + float(rng.uniform(-9, 9)) * np.sqrt(atoms)
        seconds = 3e-4 * basis**exponent * np.exp(scatter * rng.normal())
        found.append(Measured(float(seconds), Size(atoms, electrons, basis)))
    return found


def test_the_law_that_made_them():
    model = costs.fit("pbe", labels(2.4, 0.06))
    assert model.measure == "basis"
    assert model.exponent == pytest.approx(2.4, abs=0.02)
    assert model.scatter == pytest.approx(0.06, abs=0.01)
    assert model.mean == pytest.approx(np.mean([label.seconds for label in labels(2.4, 0.06)]), rel=0.03)
    assert model.tail == pytest.approx(np.percentile([label.seconds for label in labels(2.4, 0.06)], 95), rel=0.1)


def test_structures_of_other_sizes_cost_what_the_law_says():
    """Their basis functions are not known, so the size is the better one of the others."""
    model = costs.fit("pbe", labels(2.4, 0.06), [Size(80.0, 360.0)])
    assert model.measure in ("atoms", "electrons")
    assert model.mean == pytest.approx(3e-4 * (14 * 80) ** 2.4, rel=0.15)


def test_more_labels_move_the_law():
    few, many = (costs.fit("pbe", labels(2.4, 0.3, n)) for n in (8, 300))
    assert abs(many.exponent - 2.4) < abs(few.exponent - 2.4)


def test_shipped_molecules():
    """PBE grows as electrons^2.4, CCSD(T) more steeply (434 frames: 3.3 to 4.3); means are those of the files."""
    found = costs.read([MOLECULES], ["pbe", "ccsdt"])
    pbe, ccsdt = (costs.fit(level, found[level]) for level in ("pbe", "ccsdt"))
    assert pbe.measure == "electrons"
    assert 2.0 < pbe.exponent < 2.8
    assert 3.0 < ccsdt.exponent < 4.6
    for model, measured in ((pbe, found["pbe"]), (ccsdt, found["ccsdt"])):
        assert model.mean == pytest.approx(np.mean([m.seconds for m in measured]), rel=0.25)


def test_one_size_only():
    one = [Measured(2.0 + 0.01 * i, Size(5, 10)) for i in range(8)]
    model = costs.fit("pbe", one)
    assert model.exponent is None
    assert model.mean == pytest.approx(2.035, rel=1e-3)
    assert costs.fit("pbe", one, [Size(5, 10)]).mean == pytest.approx(2.035, rel=1e-3)
    with pytest.raises(InputError, match="all 8 labels with a cost have 10 electrons"):
        costs.fit("pbe", one, [Size(6, 14)])
    with pytest.raises(InputError, match="'pbe': 4 labels with a cost; it needs 5"):
        costs.fit("pbe", one[:4])


def test_a_rounded_cost_is_refused(tmp_path: Path):
    frames = read(MOLECULES, ":6")
    frames[3].info["cpu_s_gfn2"] = 0.0
    write(tmp_path / "zero.extxyz", frames)
    with pytest.raises(InputError, match=r"zero.extxyz: frame 3: cpu_s of 'gfn2' is 0.0: expected positive"):
        costs.read([tmp_path / "zero.extxyz"], ["gfn2"])
    with pytest.raises(InputError, match=r"no costs of level 'r2scan'.*it has costs of: ccsdt, gfn1, gfn2, pbe"):
        costs.read([MOLECULES], ["pbe", "r2scan"])


@pytest.mark.skipif("MFFM_DATA" not in os.environ, reason="needs MFFM_DATA")
def test_a_published_file_with_rounded_costs_is_refused():
    with pytest.raises(InputError, match=r"frame 0: cpu_s of 'gfn2' is 0\.0"):
        costs.read([Path(os.environ["MFFM_DATA"]) / "ladders" / "molecules.extxyz"], ["gfn2"])


def test_sizes_of_stores_and_files(molecule_store: Path):
    sizes = costs.sizes_of([molecule_store])
    frames = read(MOLECULES, ":90")
    assert sorted(size.electrons for size in sizes) == sorted(float(a.numbers.sum()) for a in frames)
    first = costs.sizes_of([MOLECULES])[0]
    assert (first.atoms, first.electrons) == (len(frames[0]), frames[0].numbers.sum())
    with pytest.raises(InputError, match=r"nowhere\.xyz: no such file"):
        costs.sizes_of([Path("nowhere.xyz")])


def test_records_of_computed_labels(build_store, tmp_path: Path):
    """Beside a file, by frame_id, and in a label layer, by row; failed attempts cost nothing that was bought."""
    frames = read(MOLECULES, ":8")
    for atoms in frames:
        for key in [key for key in atoms.info if key.startswith("cpu_s")]:
            del atoms.info[key]
    write(tmp_path / "out.extxyz", frames)
    names = [atoms.info["frame_id"] for atoms in frames]
    same = {"fidelity": "gfn2", "status": "ok"}
    lines = [{**same, "frame_id": name, "index": 30 + i, "cpu_ns": 10**6 * (i + 1)} for i, name in enumerate(names)]
    (tmp_path / "out.records.jsonl").write_text(written([{**lines[0], "status": "failed", "cpu_ns": None}, *lines]))
    found = costs.read([tmp_path / "out.extxyz"], ["gfn2"])["gfn2"]
    assert [label.seconds for label in found] == pytest.approx([1e-3 * (i + 1) for i in range(8)])
    assert found[3].size.atoms == len(frames[3])

    n_lines = sum(2 + len(atoms) for atoms in read(MOLECULES, ":12"))
    path = build_store(tmp_path / "built", "\n".join(MOLECULES.read_text().splitlines()[:n_lines]) + "\n")
    store = Store(path)
    rows = [{**line, "index": i} for i, line in enumerate(lines)]
    (path / "layers" / store.layers[0].name / "records.jsonl").write_text(written(rows))
    stored = costs.read([path], ["gfn2"])["gfn2"]
    assert [label.seconds for label in stored] == pytest.approx([1e-3 * (i + 1) for i in range(8)])
    assert [label.size.atoms for label in stored] == store.n_atoms[:8].tolist()
    (tmp_path / "out.records.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="line 1 is no record of mffm label"):
        costs.read([tmp_path / "out.extxyz"], ["gfn2"])


def written(entries: list[dict]) -> str:
    return "".join(json.dumps(entry) + "\n" for entry in entries)
