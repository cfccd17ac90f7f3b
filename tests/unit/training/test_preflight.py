"""The preflight finds what is wrong, all of it, and leaves no trace in the numbers of the run."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.distributed import Ranks
from mffm.errors import InputError
from mffm.training import preflight
from mffm.training.setup import Trainee, prepare

LIMITED = str(Path(__file__).with_name("limited.py"))
TENSORS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def losses(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("time", "cpu_s") and not k.endswith("_per_s")} for row in rows]


def test_only_then_train_and_the_same_numbers_without(
    make_recipe: Callable[..., Path], tiny_run: Path, tmp_path: Path, run_mffm: Callable
):
    recipe = str(make_recipe())
    only = run_mffm("train", "--preflight", recipe)
    assert only.returncode == 0, only.stderr
    content = json.loads((tmp_path / "run" / "preflight.json").read_text())
    names = [check["name"] for check in content["checks"]]
    assert names == ["rendezvous", "versions", "all-reduce", "disk", "memory"]
    assert not any(check["problem"] for check in content["checks"])
    assert all(name in only.stdout for name in names)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["preflight.json"]
    assert sum(check["seconds"] for check in content["checks"]) < 10

    without = run_mffm("train", recipe, "train.preflight=false")  # the folder does not block it
    assert without.returncode == 0, without.stderr
    assert (tiny_run / "preflight.json").exists()
    assert losses(tmp_path / "run") == losses(tiny_run)
    last = Path("checkpoints") / "step-00000006"
    for name in TENSORS:
        assert (tmp_path / "run" / last / name).read_bytes() == (tiny_run / last / name).read_bytes(), name


def test_every_problem_is_named(make_recipe: Callable[..., Path], tmp_path: Path):
    recipe = str(make_recipe())
    changes = ["train.keep=1000000000", "data.plan.edge_budget=4000", "data.plan.edges_per_microbatch=4000"]
    changes += ["model.backbone.channels=64", "model.backbone.edge_channels=64"]
    command = [sys.executable, LIMITED, "train", "--preflight", recipe, *changes]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "problem: disk: " in done.stderr
    assert "lower train.keep (now 1000000000)" in done.stderr
    assert "problem: memory: the largest microbatch of the next " in done.stderr
    assert "lower data.plan.edges_per_microbatch (now 4000)" in done.stderr
    assert done.stdout.count("problem") == 2


@pytest.fixture(scope="module")
def setup(molecule_store: Path, tiny_recipe: Callable, tmp_path_factory: pytest.TempPathFactory):
    import yaml

    folder = tmp_path_factory.mktemp("preflight")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(molecule_store, folder / "run")))
    return prepare(load(Recipe, path))


def test_the_largest_microbatch_is_the_largest_that_the_run_will_meet(setup):
    step, items, n = preflight.largest(setup, setup.plan.start(), Ranks(0, 2, 0))
    cursor, sizes = setup.plan.start(), []
    for _ in range(setup.recipe.train.steps):
        planned, cursor = setup.plan.step(cursor)
        bins = [b for rank in planned.partition(2, setup.plan.n_microbatches(2)) for b in rank]
        sizes += [int((planned.n_edges[b] + planned.n_atoms[b]).sum()) for b in bins]
    assert n == setup.recipe.train.steps
    assert int((step.n_edges[items] + step.n_atoms[items]).sum()) == max(sizes)


def test_a_batch_that_was_tried_leaves_no_trace(setup):
    trainee = Trainee(setup.potential, setup.loss, setup.spec.reference_table())
    before = {k: v.clone() for k, v in trainee.state_dict().items()}
    random = torch.get_rng_state()
    step, items, _ = preflight.largest(setup, setup.plan.start(), Ranks())
    seen: list[bool] = []
    handle = next(trainee.potential.parameters()).register_hook(lambda grad: seen.append(bool(grad.abs().sum() > 0)))
    assert preflight.try_batch(setup, trainee, step, items, torch.device("cpu")) == ""
    handle.remove()
    assert seen == [True]
    assert all(p.grad is None for p in trainee.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in trainee.state_dict().items())


def test_a_run_with_a_problem_does_not_start():
    checks = [preflight.Check("disk", "", "no room"), preflight.Check("memory", "fine"), preflight.Check("x", "", "y")]
    with pytest.raises(InputError, match=r"2 problem\(s\)(.|\n)*disk: no room\n  x: y"):
        preflight.require(checks)
    preflight.require(checks[1:2])
