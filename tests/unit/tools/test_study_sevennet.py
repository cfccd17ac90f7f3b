"""SevenNet on a study's cells: the very frames, errors as ours, the same time; end to end where it is installed."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import yaml

from mffm.config.study import load_study
from mffm.data.records import Geometry
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.evaluate import parity
from mffm.executor import LocalExecutor
from mffm.release import write_json
from mffm.study.grid import Grid, expand
from mffm.study.run import StudyRun

POOLS = [{"fidelity": "gfn2"}, {"fidelity": "pbe"}]


@pytest.fixture
def tool():
    import study_sevennet

    return study_sevennet


@pytest.fixture
def study_yaml(molecule_store: Path, tmp_path: Path, tiny_recipe: Callable[..., dict]) -> Path:
    """A study of a method that trains two fidelities, one that trains the high one, one without low forces."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(tiny_recipe(molecule_store, tmp_path / "never")))
    shared = {"model.heads": {"kind": "shared", "hidden": [8]}}
    content = {
        "name": "tiny", "recipe": "base.yaml", "high": "pbe", "n_high": [8], "seeds": [0, 3], "ood": None,
        "methods": {
            "sevennet_mf": {"changes": {"data.plan.pools": POOLS, **shared}},
            "hf_only": {"changes": {"data.plan.pools": POOLS[1:], **shared}},
            "half_used": {"changes": {"data.plan.pools": [{**POOLS[0], "properties": ["energy"]}, POOLS[1]], **shared}},
        },
        "baselines": ["hf_only"], "relative_energies": True,
    }  # fmt: skip
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def grid(study_yaml: Path) -> Grid:
    return expand(load_study(study_yaml), study_yaml, study_yaml.parent / "out")


def test_the_very_frames_of_a_cell(tool, grid: Grid, tmp_path: Path) -> None:
    cells = tool.chosen(grid, "sevennet_mf", [])
    assert [cell.seed for cell in cells] == [0, 3]
    plan = tool.Plan(grid, tmp_path / "training", "multi_modal", "base", lambda cell: 0.5)
    job = tool.job_of(plan, cells[1])
    low, high = job["train"]
    assert (low["data_modality"], low["data_weight"]["force"]) == ("gfn2", 0.1)
    assert (high["data_modality"], high["data_weight"]["force"]) == ("pbe", 10.0)
    frames = ase.io.read(high["file_list"][0]["file"], ":")
    assert len(frames) == 8
    for frame, row in zip(frames, cells[1].high_rows, strict=True):
        labels = grid.store.labels(int(row), "pbe")
        np.testing.assert_allclose(frame.positions, grid.store.geometry(int(row))[1], atol=1e-7)
        assert frame.get_potential_energy() == pytest.approx(float(labels["energy"]))
        np.testing.assert_allclose(frame.get_forces(), labels["forces"], atol=1e-5)
    assert job["n_train"] == 8 + len(ase.io.read(low["file_list"][0]["file"], ":"))
    assert job["marks"] == [0.5]
    assert not job["stress"]
    (val,) = job["val"]
    assert val["data_modality"] == "pbe"
    assert job["n_val"] == len(ase.io.read(val["file_list"][0]["file"], ":")) == 8, "the recipe's validation_max_frames"


def test_errors_are_those_of_our_own_evaluation(tool, grid: Grid) -> None:
    store = grid.store
    rows = store.rows(split="test", fidelity="pbe")

    def predict(structures: Sequence[Geometry]) -> dict[str, np.ndarray]:
        labels = [store.labels(int(row), "pbe") for row in rows]
        assert [len(s[0]) for s in structures] == [len(label["forces"]) for label in labels]
        n = np.array([len(s[0]) for s in structures])
        return {
            "energy": np.array([float(label["energy"]) for label in labels]) + 0.003 * n,
            "forces": np.concatenate([label["forces"] for label in labels]) - 0.02,
            "stress": np.zeros((0,)),
        }

    found = tool.evaluate(predict, store, "test", "pbe")
    maes = {row["property"]: (row["mae"], row["unit"], row["n_systems"]) for row in found.rows()}
    assert maes["energy"] == (pytest.approx(3.0), "meV/atom", len(rows))
    assert maes["forces"] == (pytest.approx(20.0, rel=1e-4), "meV/Å", len(rows))
    frames = found.frame_errors("pbe")["forces"]
    assert isinstance(frames, parity.FrameErrors)
    np.testing.assert_allclose(frames.sums / frames.counts, 20.0, rtol=1e-4)


def test_time_and_methods_that_do_not_do(tool, grid: Grid, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--like hf_only: trains one fidelity"):
        tool.chosen(grid, "hf_only", [])
    with pytest.raises(InputError, match=r"--like best: is not a method that trains .*sevennet_mf"):
        tool.chosen(grid, "best", [])
    with pytest.raises(InputError, match="--like half_used: leaves out forces of gfn2, which this tool cannot; name a"):
        tool.chosen(grid, "half_used", [])
    with pytest.raises(InputError, match="--n-high: no cell of sevennet_mf with 9; there are 8"):
        tool.chosen(grid, "sevennet_mf", [9])
    run = StudyRun(grid, tmp_path / "out", LocalExecutor(1))
    cell = tool.chosen(grid, "sevennet_mf", [8])[0]
    with pytest.raises(InputError, match="hf_only/n8-s0: its CPU time is not known: train the study first"):
        tool.minutes_of(run, "hf_only")(cell)
    seconds = {"seconds": 90.0, "is_open": False, "is_lost": False}
    write_json(tmp_path / "out" / "cpu" / "methods" / "hf_only" / "n8-s0.json", seconds)
    assert tool.minutes_of(run, "hf_only")(cell) == 1.5


def test_a_cell_is_judged_again_for_other_weights(tool, grid: Grid, tmp_path: Path) -> None:
    plan = tool.Plan(grid, tmp_path / "training", "multi_modal", "base", lambda cell: 0.5)
    cell = tool.chosen(grid, "sevennet_mf", [])[0]
    with pytest.raises(InputError, match=r"checkpoint_best.pth: is missing; .*give more --minutes and another --name"):
        tool.judged_before(plan, cell)
    write_json(plan.of(cell) / "at-0.5.json", {"cpu_s": 30.0, "step": 7})
    (plan.of(cell) / "at-0.5.pth").write_bytes(b"the last weights")
    with pytest.raises(InputError, match=r"checkpoint_best.pth: is missing"):
        tool.judge(plan, cell, "sevennet", tmp_path)
    best = plan.of(cell) / "checkpoint_best.pth"
    best.write_bytes(b"weights of 5 minutes")
    key, before = tool.judged_before(plan, cell)
    assert before == {}
    found = {"key": key, "errors": {"iid": []}, "found": {}}
    write_json(plan.of(cell) / "judged.json", found)
    assert tool.judged_before(plan, cell) == (key, found)
    entry = tool.judge(plan, cell, "sevennet", tmp_path)
    assert (entry["errors"], entry["steps"]) == ({"iid": []}, 7)
    best.write_bytes(b"weights of 10 minutes")
    assert tool.judged_before(plan, cell)[1] == {}


def test_a_folder_of_another_training_is_refused(tool, grid: Grid, tmp_path: Path) -> None:
    plan = tool.Plan(grid, tmp_path / "training", "multi_modal", "base", lambda cell: 0.5)
    cell, other = tool.chosen(grid, "sevennet_mf", [])
    write_json(plan.of(cell) / "at-0.5.json", {"cpu_s": 30.0, "step": 7})
    for _ in range(2):
        tool.train(plan, cell)  # finished: nothing is trained
    with pytest.raises(InputError, match=r"n8-s0: holds trainings with another minutes: 0.5, now 1; give another --n"):
        tool.train(replace(plan, minutes=lambda cell: 1), cell)
    training = grid.trainings[cell.training]
    fewer = [POOLS[0] | {"max_frames": 20}, POOLS[1] | {"max_frames": 8}]
    told = {"fingerprint: .*, now 0123": {"fingerprint": "0123"}, "frames: {'gfn2'": {"plan": {"pools": fewer}}}
    for what, change in told.items():
        content = training.recipe.model_dump(mode="json")
        content["data"] = {**content["data"], **{k: _merged(content["data"][k], v) for k, v in change.items()}}
        changed = replace(training, recipe=type(training.recipe).model_validate(content))
        trainings = {**grid.trainings, cell.training: changed}
        with pytest.raises(InputError, match=f"holds trainings with another {what}"):
            tool.train(replace(plan, grid=replace(grid, trainings=trainings)), cell)
    with pytest.raises(InputError, match=f"another draw: {cell.draw}, now {other.draw};"):
        tool.train(plan, replace(cell, high_rows=other.high_rows))


def _merged(before: object, change: object) -> object:
    return {**before, **change} if isinstance(before, dict) and isinstance(change, dict) else change


def test_notes_say_what_time_it_is(tool, study_yaml: Path) -> None:
    settings = load_study(study_yaml)
    time, *_ = tool.notes_of(settings, "sevennet_mf", "hf_only", 5.0)
    assert time.startswith("CPU time: up to 1.15 times 5 minutes, or less where the schedule ends first")
    assert "up to 1.15 times that of hf_only" in tool.notes_of(settings, "sevennet_mf", "hf_only", None)[0]


@pytest.mark.slow
def test_end_to_end(tool, study_yaml: Path, grid: Grid) -> None:
    from peers import install

    if install.python("sevennet") is None:
        pytest.skip(install.remedy("sevennet"))
    out = study_yaml.parent / "out"
    for _ in range(2):  # the second time nothing is trained or judged again
        tool.main(
            study_yaml, ["seeds=[0]"], folder=out, name="sevennet", like="sevennet_mf", time_of="hf_only", minutes=0.02,
            preset="multi_modal", model="base", n_high=None, workers=1,
        )  # fmt: skip
    content = json.loads((out / "external" / "sevennet.json").read_text())
    (cell,) = content["cells"]
    assert cell["steps"] >= 2
    assert {row["property"] for row in cell["errors"]["iid"]} == {"energy", "forces"}
    assert cell["found"]["relative_energies"]["iid"]["mae"] > 0
    assert Store(grid.store.path).n_frames == 90
    trained = out / "external" / "sevennet" / "training" / "n8-s0"
    assert len(list(trained.glob("lc*.csv"))) == 1, "trained twice"
    asked = {"preset": "multi_modal", "like": "sevennet_mf", "minutes": 0.02}
    for key, value in {"preset": "MF_0", "minutes": 0.04}.items():
        with pytest.raises(InputError, match=f"holds trainings with another {key}: .*; give another --name"):
            tool.main(
                study_yaml, ["seeds=[0]"], folder=out, name="sevennet", time_of="hf_only", model="base", n_high=None,
                workers=1, **(asked | {key: value}),
            )  # fmt: skip
