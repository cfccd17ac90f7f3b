"""The record of a run: the same rows in every tracker, tables and versions at the start, and one run after a resume."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mffm.config.recipe import LogSection
from mffm.errors import InputError
from mffm.release import PotentialSpec, code_version
from mffm.training.log import Facts, RunLog, Table, run_facts

FACTS = Facts(
    {"version/mffm": "0", "store_fingerprint": "abc"},
    {"live_labels": Table(["fidelity", "energy"], [["pbe", 3]])},
)
RESOLVED = {"name": "tiny", "seed": 7, "optim": {"lr": 0.1}}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def open_log(run: Path, start: int = 0, wandb_id: str = "", active: bool = True, **config: Any) -> RunLog:
    run.mkdir(exist_ok=True)
    section = LogSection(**{"wandb": "disabled", **config})
    return RunLog(run, section, 4, start, "tiny", RESOLVED, wandb_id, active, FACTS)


def wandb_records(run: Path) -> list[list[dict[str, Any]]]:
    """Return the records of every offline directory, oldest first."""
    found = []
    for folder in sorted((run / "wandb").glob("offline-run-*")):
        command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        found.append([json.loads(line) for line in done.stdout.splitlines()])
    return found


def test_other_ranks_write_nothing(tmp_path: Path):
    with open_log(tmp_path / "run", active=False, wandb="offline", tensorboard=True) as log:
        log.metrics(1, {"lr": 1.0})
        log.say("nothing")
        log.image("x", tmp_path / "none.png")
    assert list((tmp_path / "run").iterdir()) == []
    assert log.wandb_id == ""


def test_a_resume_drops_rows_after_the_checkpoint_and_the_cut_line(tmp_path: Path):
    run = tmp_path / "run"
    with open_log(run) as log:
        for step in (1, 2, 3):
            log.metrics(step, {"lr": float(step)})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lr"')
    with open_log(run, start=2) as log:
        log.metrics(3, {"lr": 30.0})
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = [row.pop("time") for row in rows]
    assert times == sorted(times)
    assert abs(times[-1] - time.time()) < 60
    used = [row.pop("cpu_s") for row in rows]
    assert used[0] > 0.1, "of the whole process, its imports included"
    assert used[1] < used[0] / 10
    assert rows == [{"step": 1, "lr": 1.0}, {"step": 2, "lr": 2.0}, {"step": 3, "lr": 30.0}]


def test_wandb_offline_has_config_tables_group_state_and_one_id_after_a_resume(tmp_path: Path):
    run = tmp_path / "run"
    with open_log(run, wandb="offline") as log:
        log.metrics(1, {"train/loss": 2.0})
        log.metrics(2, {"train/loss": 1.0, "val/loss": 5.0})
        log.ended("interrupted")
    first = log.wandb_id
    with open_log(run, start=2, wandb_id=first, wandb="offline") as log:
        log.metrics(3, {"train/loss": 0.5})
        log.ended("finished")
    assert log.wandb_id == first
    texts = []
    for records in wandb_records(run):
        texts.append(json.dumps(records))
        for expected in (first, '"tiny"', "store_fingerprint", "seed=7", "live_labels", "train/loss"):
            assert expected in texts[-1], expected
    assert len(texts) == 2
    assert "interrupted" in texts[0]
    assert "finished" in texts[1]
    assert list((run / "wandb").glob("offline-run-*/files/media/table/live_labels_*.json"))


def test_a_failure_is_a_failed_run_in_wandb(tmp_path: Path):
    log = open_log(tmp_path / "run", wandb="offline")
    log.metrics(1, {"lr": 1.0})
    log.__exit__(RuntimeError, RuntimeError("boom"), None)
    (records,) = wandb_records(tmp_path / "run")
    assert '"failed"' in json.dumps(records).replace("\\", "")


def test_the_id_of_a_sweep_is_taken_and_that_of_the_run_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_RUN_ID", "from-agent")
    with open_log(tmp_path / "run", wandb="offline") as log:
        pass
    assert log.wandb_id == "from-agent"
    with open_log(tmp_path / "run", wandb_id="saved", wandb="offline") as log:
        pass
    assert log.wandb_id == "saved"


def test_tensorboard_has_the_same_rows_and_hides_those_of_an_interrupted_run(tmp_path: Path):
    from matplotlib.figure import Figure
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    with open_log(run, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.metrics(step, {"train/loss": float(step)})
    Figure(figsize=(1, 1)).savefig(tmp_path / "parity.png")
    with open_log(run, start=2, tensorboard=True) as log:
        log.metrics(3, {"train/loss": 30.0})
        log.image("parity", tmp_path / "parity.png")
        log.ended("finished")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert "parity" in events.Tags()["images"]
    assert {"config/text_summary", "live_labels/text_summary", "state/text_summary"} <= set(events.Tags()["tensors"])


@pytest.mark.parametrize(
    ("package", "option"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "offline"})]
)
def test_a_missing_package_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, option: dict[str, Any]
):
    for name in [n for n in sys.modules if n.split(".")[0] == package or n.startswith(f"torch.utils.{package}")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"log\.{package}: the package {package} is not installed"):
        open_log(tmp_path / "run", **option)


def test_facts_of_a_run(tiny_run: Path):
    spec = PotentialSpec.read(tiny_run / "potential")
    facts = run_facts(spec, code_version(), n_parameters=5)
    assert facts.config["n_parameters"] == 5
    assert set(facts.config) >= {"version/mffm", "version/torch", "store_fingerprint", "plan_fingerprint"}
    labels, references = facts.tables["live_labels"], facts.tables["element_references_eV"]
    assert labels.columns[0] == "fidelity"
    assert [row[0] for row in labels.rows] == list(spec.fidelities.names)
    assert references.columns == ["element", "gfn2", "pbe"]
    carbon = next(row for row in references.rows if row[0] == "C")
    assert carbon[1] == pytest.approx(spec.references.value("gfn2", "C"))
    assert references.markdown().splitlines()[1] == "| --- | --- | --- |"


def test_a_recipe_with_tensorboard_writes_events(make_recipe: Callable[..., Path], tmp_path: Path):
    from mffm.config.base import load
    from mffm.config.recipe import Recipe

    recipe = load(Recipe, make_recipe(log={"tensorboard": True}))
    assert recipe.log.tensorboard
