"""The page of a run: aggregates of a published model from its tasks, gains of a fidelity, failures and figures."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mffm.evaluate import published
from mffm.evaluate.benchmark import report, suites
from mffm.evaluate.benchmark.pool import Record
from mffm.evaluate.benchmark.run import Finished
from mffm.evaluate.benchmark.task import LAMBENCH, MATBENCH_DISCOVERY, Score


def finished(folder: Path, name: str, metrics: dict[str, Any], records: list[Record] | None = None) -> Finished:
    """Return a task as if a whole set had been run."""
    task = suites.task(name)
    records = records or [Record("a", 1.5, {"x": 1.0})]
    n = len(records)
    score = Score(metrics, "unit", n, sum(r.result is None for r in records), {k: k for k in metrics})
    return Finished(task, "pbe", score, records, n, folder / name, "a machine")


def test_a_published_models_tasks_give_its_place_on_the_leaderboard(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'mffm[train]'")
    row = published.lambench()["MACE-MPA-0"]
    done = [
        finished(tmp_path, f"{LAMBENCH}/{task}", metrics)
        for group in (row["property"], row["force_field"])
        for task, metrics in group.items()
    ]
    assert len(done) == 12 + 15
    page = report.write(tmp_path, "x", {"pbe": done}).read_text()
    assert "| pbe | **M_PC** | 0.470" in page
    assert "| pbe | **M_FF** | 0.297" in page  # 0.298 published, from errors that are rounded
    assert "| pbe | rxn_barrier MAE | 0.645" in page
    assert "![normalised errors](lambench.png)" in page
    assert (tmp_path / "lambench.png").stat().st_size > 10_000
    assert "| metric | pbe | DPA-3.2-5M |" in page


def test_cps_needs_the_whole_sets(tmp_path: Path):
    parts = {
        "wbm": {"F1": 0.76, "rmsd": 0.0847},
        "kappa103": {"κ_SRME": 0.5496},
    }
    done = [finished(tmp_path, f"{MATBENCH_DISCOVERY}/{n}", m) for n, m in parts.items()]
    assert "| r | **CPS** | 0.7136 |" in report.write(tmp_path, "x", {"r": done}).read_text()  # SevenNet-l3i5: 0.714
    assert "CPS" not in report.write(tmp_path, "x", {"r": done[:1]}).read_text()


def test_gains_and_failures(tmp_path: Path):
    name = f"{LAMBENCH}/elastic"
    bad = [
        Record("mp-1", 2.0, reason="time limit", message="more than 2 s"),
        Record("mp-2", 1.0, {"G": -5.0}, doubt="G -5 GPa; counts, as in the suite"),
    ]
    low = finished(tmp_path, name, {"MAE_G_VRH": 20.0, "success_rate": 0.5}, bad)
    high = finished(tmp_path, name, {"MAE_G_VRH": 15.0, "success_rate": 1.0})
    page = report.write(tmp_path, "x", {"pbe": [low], "r2scan": [high]}).read_text()
    assert "| MAE_G_VRH | 20 | 15 | +25 % |" in page
    assert "| success_rate | 0.5 | 1 | +100 % |" in page
    assert "1 time limit, 1 absurd." in page
    assert "| pbe | lambench/elastic | mp-1 | time limit | more than 2 s |" in page
    assert "| pbe | lambench/elastic | mp-2 | absurd | G -5 GPa; counts, as in the suite |" in page
    assert "| pbe | lambench/elastic | 2 | 3 | 1.5 | 2 |" in page  # timings


def test_a_part_of_a_set_stands_beside_no_published_rows(tmp_path: Path):
    name = f"{LAMBENCH}/rxn_barrier"
    whole = finished(tmp_path, name, {"MAE": 10.0})
    part = replace(whole, n_of_set=876)
    assert "DPA-3.2-5M" in report.write(tmp_path, "x", {"pbe": [whole]}).read_text()
    assert "DPA-3.2-5M" not in report.write(tmp_path, "x", {"pbe": [part]}).read_text()
    assert "DPA-3.2-5M" not in report.write(tmp_path, "x", {"pbe": [whole], "r2scan": [part]}).read_text()


def test_a_force_field_set_without_virials_is_left_out_where_they_are_scored(tmp_path: Path):
    metrics = {"energy_rmse_natoms": 10.0, "force_rmse": 100.0}
    done = [finished(tmp_path, f"{LAMBENCH}/{name}", metrics) for name in ("MoS2", "AQM")]
    page = report.write(tmp_path, "x", {"pbe": done}).read_text()
    assert "| pbe | AQM force |" in page
    assert "| pbe | MoS2 " not in page


def test_the_gain_of_a_signed_metric_is_of_its_distance_from_zero(tmp_path: Path):
    low, high = (finished(tmp_path, f"{MATBENCH_DISCOVERY}/kappa103", {"κ_SRD": v}) for v in (-0.4, 0.1))
    page = report.write(tmp_path, "x", {"pbe": [low], "r2scan": [high]}).read_text()
    assert "| κ_SRD | -0.4 | 0.1 | +75 % |" in page
