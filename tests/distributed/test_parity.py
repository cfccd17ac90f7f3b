"""Ranks × microbatches do not change what is learned: gradients, loss curves, parameters."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import forked
import pytest
import torch
import yaml
from safetensors.torch import load_file

from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.training.quarantine import replay
from mffm.training.setup import prepare

HERE = Path(__file__).parent
# ranks × microbatches of one global batch of 600 edges
SHAPES = {"1x4": (1, 150), "2x2": (2, 150), "4x1": (4, 150)}


def on_ranks(ranks: int, *arguments: str, ok: bool = True) -> str:
    """Run Python's arguments on so many ranks and return what they print on stderr."""
    done = forked.ranks(ranks, list(arguments), timeout=800)
    assert (done.returncode == 0) == ok, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stderr


def plan_section(recipe: dict, edges: int) -> dict:
    return {**recipe["data"], "plan": {**recipe["data"]["plan"], "edges_per_microbatch": edges}}


@pytest.fixture
def gradient(make_recipe: Callable[..., Path], tmp_path: Path):
    def compute(shape: str, mode: str) -> dict[str, torch.Tensor]:
        ranks, edges = SHAPES[shape]
        base = yaml.safe_load(make_recipe("base").read_text())
        recipe = make_recipe(f"{shape}-{mode}", data=plan_section(base, edges))
        output = tmp_path / f"{shape}-{mode}.safetensors"
        on_ranks(ranks, str(HERE / "gradients.py"), str(recipe), str(output), mode)
        return load_file(output)

    return compute


def worst(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    scale = max(float(v.abs().max()) for v in a.values())
    return max(float((a[k] - b[k]).abs().max()) for k in a) / scale


def test_gradient_in_fp64_with_plain_autograd(gradient):
    reference = gradient("1x4", "plain")
    assert sum(float(v.abs().sum() > 0) for v in reference.values()) > 0.9 * len(reference)
    for shape in ("2x2", "4x1"):
        assert worst(reference, gradient(shape, "plain")) < 1e-12


def test_gradient_in_fp32_through_the_engine(gradient):
    reference = gradient("1x4", "engine")
    # every shape has ranks × microbatches = 4: the absolute size needs another witness
    plain = {k: v.float() for k, v in gradient("1x4", "plain").items()}
    assert worst(plain, reference) < 3e-5
    for shape in ("2x2", "4x1"):
        assert worst(reference, gradient(shape, "engine")) < 1e-6


ALL = ["--offload", "optimizer,optimizer_and_parameters", "--optimizers", "soap"]


@pytest.mark.parametrize(
    ("options", "n_combinations"),
    [
        (["--stages", "3"], 2 * 6 * 2),
        pytest.param(ALL, 4 * 2 * 6 * 2 + (4 + 1) * 2 * 2, marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
    ids=["stage 3", "all"],
)
def test_every_stage_learns_what_one_process_learns(
    molecule_store: Path, tmp_path: Path, options: list[str], n_combinations: int
):
    """Stages × models × ways to deal out a batch × microbatches, against plain torch; fp32, relative 1e-5.

    And the four of offloading, as far as it runs without a GPU, and SOAP at stage 0, for both models
    with clipping.
    """
    output = tmp_path / "parity.json"
    on_ranks(2, "-m", "mffm.selftest.parity", str(molecule_store), str(output), *options)
    rows = json.loads(output.read_text())
    keys = ("stage", "offload", "optimizer", "model", "case", "microbatches")
    assert len({tuple(row[k] for k in keys) for row in rows}) == len(rows) == n_combinations
    assert max(max(row["gradient_error"], row["parameter_error"]) for row in rows) < 1e-5
    assert all(row["passed"] for row in rows)


def copied(run: Path, target: Path, step: int) -> Path:
    """Copy a run as it stood after the checkpoint of a step."""
    shutil.copytree(run, target)
    for folder in (target / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    (target / "checkpoints" / "latest").write_text(f"step-{step:08d}\n")
    return target


def test_every_stage_goes_on_from_every_stage(molecule_store: Path, tmp_path: Path):
    """3 steps, a checkpoint, 3 steps: bit for bit at the same stage, up to the order of sums at another."""
    output = tmp_path / "resume.json"
    on_ranks(2, "-m", "mffm.selftest.resume", str(molecule_store), str(output))
    rows = json.loads(output.read_text())
    assert {(row["from"], row["to"]) for row in rows} == {(s, t) for s in range(4) for t in range(4)}
    for row in rows:
        assert max(row["weights"], row["average"], row["moments"]) <= (0 if row["from"] == row["to"] else 1e-6), row


def test_two_ranks_then_one_then_two_like_two(molecule_store: Path, tmp_path: Path):
    """At every stage: the same global batches, and weights, average and moments up to rounding."""
    output = tmp_path / "elastic.json"
    for ranks in (2, 1, 2):
        on_ranks(
            ranks, "-m", "mffm.selftest.resume", str(molecule_store), str(output), "--elastic", str(tmp_path / "e")
        )
    rows = json.loads(output.read_text())
    assert [(row["stage"], row["ranks"]) for row in rows] == [(stage, [2, 1, 2]) for stage in range(4)]
    assert all(row["same_batches"] for row in rows)
    assert max(max(row["model"], row["ema"], row["optimizer"]) for row in rows) < 1e-6


def test_run_at_stage_3_with_offloading_resumes_exactly(make_recipe: Callable[..., Path], tmp_path: Path):
    """The whole loop: validation on gathered averages, checkpoint, files of weights; clipping at every step."""
    run = tmp_path / "run"
    recipe = make_recipe(
        deepspeed={"zero_stage": 3, "offload": "optimizer_and_parameters"},
        optim={"clip": 0.01},
        train={"steps": 6, "save_every": 3, "validate_every": 6},
    )
    on_ranks(2, "-m", "mffm", "train", str(recipe))
    final = run / "checkpoints" / "step-00000006"
    ema, last = load_file(final / "ema.safetensors"), load_file(run / "weights" / "last.safetensors")
    shapes = {k: v.shape for k, v in prepare(load(Recipe, recipe)).potential.state_dict().items()}
    assert {k: v.shape for k, v in last.items()} == shapes
    assert all((ema[k] == last[k]).all() for k in last)
    rows = [json.loads(s) for s in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(r["grad_norm"] > 0.01 for r in rows if "grad_norm" in r)
    again = copied(run, tmp_path / "again", 3)
    on_ranks(2, "-m", "mffm", "resume", str(again))
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert (again / "checkpoints" / final.name / name).read_bytes() == (final / name).read_bytes(), name
    assert [r["val/loss"] for r in rows if "val/loss" in r] == [
        r["val/loss"] for r in map(json.loads, (again / "metrics.jsonl").read_text().splitlines()) if "val/loss" in r
    ]


def test_bundle_of_a_sick_step_at_stage_3_holds_whole_weights(make_recipe: Callable[..., Path], tmp_path: Path):
    recipe = make_recipe(deepspeed={"zero_stage": 3}, optim={"lr": 1e20, "warmup_steps": 0})
    failed = on_ranks(2, "-m", "mffm", "train", str(recipe), ok=False)
    assert "not finite" in failed
    (bundle,) = (tmp_path / "run" / "quarantine").iterdir()
    assert bundle.name != "step-00000000"  # healthy until the first update
    reason, systems = replay(bundle)
    assert "not finite" in reason
    assert not all(system.is_finite for system in systems)


def test_two_ranks_train_like_one(make_recipe: Callable[..., Path], tmp_path: Path):
    base = yaml.safe_load(make_recipe("base").read_text())
    curves, weights = {}, {}
    for ranks, edges in ((1, 300), (2, 150)):
        run = tmp_path / f"run{ranks}"
        recipe = make_recipe(
            f"ranks{ranks}",
            run=str(run),
            data=plan_section(base, edges),
            deepspeed={"zero_stage": 1 if ranks == 2 else 0},
        )
        on_ranks(ranks, "-m", "mffm", "train", str(recipe))
        rows = [json.loads(s) for s in (run / "metrics.jsonl").read_text().splitlines()]
        curves[ranks] = [r for r in rows if "train/loss" in r]
        weights[ranks] = load_file(run / "weights" / "raw.safetensors")
    assert [r["labels/pbe/energy"] for r in curves[1]] == [r["labels/pbe/energy"] for r in curves[2]]
    for one, two in zip(curves[1], curves[2], strict=True):
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    # AdamW turns a rounding difference of a tiny gradient into up to lr: compare with the distance travelled
    start = prepare(load(Recipe, make_recipe("start"))).potential.state_dict()
    travelled = max(float((weights[1][k] - start[k]).abs().max()) for k in start)
    assert travelled > 1e-3
    assert max(float((weights[1][k] - weights[2][k]).abs().max()) for k in start) < 0.05 * travelled
