"""A tiny study over the fixture store, and an executor that trains in one process: no start-up of seconds a run."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml

from mffm.data.differences import add_difference
from mffm.data.store import count_edges
from mffm.executor import Job, State

HIGH = [{"fidelity": "pbe", "properties": ["energy"]}]


def content(**changes: Any) -> dict[str, Any]:
    """Return the YAML of a tiny study; ``changes`` replace top-level keys."""
    study = {
        "name": "tiny",
        "recipe": "base.yaml",
        "high": "pbe",
        "n_high": [8, 16],
        "seeds": [0, 1],
        "iid": "test",
        "ood": None,
        "properties": ["energy", "forces"],
        "stages": {
            "low": {
                "changes": {
                    "data.plan.pools": [{"fidelity": "gfn2", "properties": ["energy", "forces"]}],
                    "model.heads": {"kind": "shared", "hidden": [8]},
                    "model.conditioning.kind": "none",
                    "train.steps": 2,
                }
            }
        },
        "methods": {
            "hf_only": {
                "title": "PBE alone",
                "changes": {"data.plan.pools": HIGH, "model.heads": {"kind": "shared", "hidden": [8]}},
            },
            "delta": {"title": "delta head"},
            "fine_tune": {
                "start_from": "low",
                "changes": {
                    "data.plan.pools": HIGH,
                    "model.heads": {"kind": "shared", "hidden": [8]},
                    "model.conditioning.kind": "none",
                    "model.init_from": {"pbe": "gfn2"},
                    "train.steps": 2,
                },
            },
            "low_only": {"refit": "low"},
        },
        "baselines": ["hf_only", "fine_tune"],
    }
    return {**study, **changes}


# Methods on stored differences: with the low fidelity's own calculation, and with a learned one.
DIFFERENCE = {
    "data.plan.pools": [{"fidelity": "pbe_minus_gfn2", "properties": ["energy", "forces"]}],
    "model.heads": {"kind": "shared", "hidden": [8]},
    "model.conditioning.kind": "none",
}
DELTAS: dict[str, dict[str, Any]] = {
    "delta_exact": {"fidelity": "pbe_minus_gfn2", "needs_lf_at_inference": True, "changes": DIFFERENCE},
    "delta_ml": {"fidelity": "pbe_minus_gfn2", "plus": "low", "changes": DIFFERENCE},
}


@pytest.fixture(scope="session")
def difference_store(molecule_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of molecules with pbe_minus_gfn2, and edges within 3.5 Å too."""
    store = Path(shutil.copytree(molecule_store, tmp_path_factory.mktemp("difference") / "store"))
    add_difference(store, "pbe", "gfn2", "pbe_minus_gfn2", "difference")
    count_edges(store, 3.5)
    return store


@pytest.fixture
def make_study(molecule_store: Path, tmp_path: Path, tiny_recipe: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """Return a function that writes a tiny study YAML beside its base recipe and returns its path."""

    def make(**changes: Any) -> Path:
        base = tiny_recipe(molecule_store, tmp_path / "never")
        base["train"] |= {"steps": 4, "validate_every": 4, "save_every": 2, "best": "val/loss", "preflight": False}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump(content(**changes), sort_keys=False))
        return path

    return make


TRAIN_ALL = """
import json, sys
from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.training import loop
for command, argument in json.loads(sys.argv[1]):
    loop.train(load(Recipe, argument)) if command == "train" else loop.resume(argument)
"""


def train_all(commands: Sequence[tuple[str, str]]) -> None:
    """Train (``train``, recipe) and resume (``resume``, run) one after the other, in one other process.

    Not in pytest's: a training there leaves a process group and its port behind.
    """
    done = forked.run(["-c", TRAIN_ALL, json.dumps(commands)], timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


class OneProcess:
    """Runs the trainings of jobs in one process, in order; dies before a job when told to."""

    def __init__(self, die_after: int | None = None, fail: str = ""):
        self.die_after, self.fail = die_after, fail
        self.commands: list[tuple[str, str, str]] = []

    def run(self, jobs: Sequence[Job], report: Callable[[Mapping[str, State]], None]) -> Mapping[str, State]:
        states: dict[str, State] = {job.name: "waiting" for job in jobs}
        wanted = []
        for job in jobs[: self.die_after]:
            assert all(states.get(name) == "done" for name in job.after), f"{job.name} before {job.after}"
            command, argument = job.command[3:]
            self.commands.append((job.name, command, argument))
            if job.name == self.fail:
                job.log.parent.mkdir(parents=True, exist_ok=True)
                job.log.write_text("error: no luck\n")
                states[job.name] = "failed"
            else:
                wanted.append((command, argument))
                states[job.name] = "done"
        if wanted:
            train_all(wanted)
        report(states)
        if self.die_after is not None and self.die_after < len(jobs):
            raise KeyboardInterrupt
        return states
