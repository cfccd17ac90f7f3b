"""Whatever a calculator does on a structure is that structure's failure, and the others are computed."""

import os
from pathlib import Path

import pytest

from mffm.errors import InputError
from mffm.evaluate.benchmark.pool import Work, compute
from mffm.evaluate.benchmark.source import Source
from mffm.evaluate.benchmark.task import Options

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(HERE))  # workers get this path too


def work(folder: Path, spec: str) -> Work:
    return Work(Source(spec), ("faulty_emt", "task", "chains"), folder, Options(), folder / "workers.log")


def test_faults_are_reported_structure_by_structure(tmp_path: Path):
    ids = [f"Cu{n}" for n in range(2, 10)]
    records = {r.id: r for r in compute(work(tmp_path, "ase:faulty_emt:Faulty"), ids, 2, limit=3.0)}
    assert set(records) == set(ids)
    found = {i: r.reason for i, r in records.items() if r.result is None}
    assert found == {"Cu3": "raised", "Cu4": "not finite", "Cu5": "time limit", "Cu7": "died"}
    assert records["Cu3"].message == "RuntimeError: the SCF did not converge"
    assert records["Cu4"].message == "value is nan"
    assert records["Cu5"].message == "more than 3 s"
    assert "SIGKILL" in records["Cu7"].message
    assert "1e+06 eV off" in str(records["Cu6"].doubt)  # absurd, kept, and said
    import faulty_emt

    labels = faulty_emt.load(tmp_path)
    for i in ("Cu2", "Cu8", "Cu9"):
        result = records[i].result
        assert result is not None
        assert result["value"] == pytest.approx(labels[i].label, abs=1e-12)
        assert records[i].doubt is None
    score = faulty_emt.task("chains").score(labels, {i: r.result for i, r in records.items() if r.result})
    assert (score.n, score.n_failed, score.metrics["success_rate"]) == (8, 4, 0.5)
    assert score.metrics["MAE"] == pytest.approx(1e6 / 4)  # the suite drops what failed and keeps what is absurd
    assert "the SCF did not converge" in (tmp_path / "workers.log").read_text()


def test_workers_have_one_thread_and_the_parent_keeps_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    records = list(compute(work(tmp_path, "ase:faulty_emt:Threads"), ["Cu2"], 1, limit=60.0))
    assert records[0].result == {"value": 11.0}  # OMP and MKL, a digit each
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "MKL_NUM_THREADS" not in os.environ


def test_a_calculator_that_cannot_be_built_is_an_error_of_the_user(tmp_path: Path):
    with pytest.raises(InputError, match=r"weights.pth: not found"):
        list(compute(work(tmp_path, "ase:faulty_emt:Unbuildable"), ["Cu2"], 1, limit=60.0))


def test_nothing_to_do_starts_nothing(tmp_path: Path):
    assert list(compute(work(tmp_path, "ase:no_such_module:X"), [], 4, limit=1.0)) == []


def test_a_missing_package_ends_the_run_and_is_no_failure_of_a_structure(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"Cu2: No module named 'no_such_package'; install it, .*mffm\[properties,d3\]"
    ):
        list(compute(work(tmp_path, "ase:faulty_emt:Lacking"), ["Cu2"], 1, limit=60.0))
