"""On a GPU: the numbers of the CPU, training through DeepSpeed on nccl, resume, precisions, memory, pinned batches."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mffm.batch import Batch
from mffm.config.model import ModelConfig
from mffm.data.loader import collate
from mffm.data.store import Store
from mffm.keys import ENERGY, FORCES
from mffm.models.potential import Potential

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]
CUTOFF = 4.0
BACKBONES = {"density": {"cutoff": CUTOFF}, "cubes": {"cutoff": CUTOFF, "lmax": 3, "l_message": 2, "channels": 32}}


def batch_of(path: Path, dtype: torch.dtype, n: int = 24) -> Batch:
    store = Store(path)
    rows = np.arange(min(n, store.n_frames))
    index = [store.fidelities.index("gfn2")] * len(rows)
    batch = collate(store, rows, index, store.fidelities, [(ENERGY, FORCES)] * len(rows), CUTOFF, dtype)
    return batch.with_fidelity(torch.zeros(len(rows), dtype=torch.int64))


def potential_of(name: str, dtype: torch.dtype) -> Potential:
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"backbone": BACKBONES[name]})
    return Potential(config, ["gfn2"], avg_neighbors=12.0, scale=1.0).to(dtype)


def gradients(potential: Potential, batch: Batch) -> list[torch.Tensor]:
    prediction = potential.train()(batch, forces=True, stress=True)
    loss = prediction.energy.square().mean() + prediction.forces.square().mean() + prediction.stress.square().mean()
    return [
        g.cpu()
        for g in torch.autograd.grad(loss, list(potential.parameters()), materialize_grads=True, allow_unused=True)
    ]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
@pytest.mark.parametrize("name", BACKBONES)
def test_numbers_of_the_cpu(molecule_store: Path, name: str, dtype: torch.dtype, tolerance: float) -> None:
    batch, potential = batch_of(molecule_store, dtype), potential_of(name, dtype)
    here = potential.eval()(batch, stress=True)
    expected = gradients(potential, batch)
    potential = potential.to("cuda").eval()
    there = potential(batch.to("cuda"), stress=True)
    for prop in ("energy", "atom_energies", "forces", "stress"):
        torch.testing.assert_close(getattr(there, prop).cpu(), getattr(here, prop), rtol=tolerance, atol=tolerance)
    for found, wanted in zip(gradients(potential, batch.to("cuda")), expected, strict=True):
        assert float((found - wanted).abs().max()) <= tolerance * max(1.0, float(wanted.abs().max()))


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_training(make_recipe: Callable[..., Path], run_mffm: Callable, tmp_path: Path, stage: int) -> None:
    recipe = make_recipe(deepspeed={"zero_stage": stage})
    done = run_mffm("train", str(recipe), f"run={tmp_path / 'gpu'}")
    assert done.returncode == 0, done.stderr
    done = run_mffm("train", str(recipe), f"run={tmp_path / 'cpu'}", env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)
    done = run_mffm("evaluate", str(tmp_path / "gpu"), "--split", "test")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_precision(make_recipe: Callable[..., Path], run_mffm: Callable, tmp_path: Path, precision: str) -> None:
    recipe = make_recipe()
    for name, change in (("plain", "float32"), ("fast", precision)):
        done = run_mffm("train", str(recipe), f"run={tmp_path / name}", f"train.precision={change}")
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "fast") == pytest.approx(losses(tmp_path / "plain"), rel=0.05)


def test_activation_checkpointing_saves_memory(molecule_store: Path) -> None:
    batch, potential = batch_of(molecule_store, torch.float32, 90).to("cuda"), potential_of("cubes", torch.float32)
    potential = potential.to("cuda")
    peaks, found = [], []
    for recompute in (False, True):
        potential.learned.backbone.recompute = recompute
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found.append(gradients(potential, batch))
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.8 * peaks[0]
    for a, b in zip(*found, strict=True):
        assert float((a - b).abs().max()) <= 1e-3 * max(1.0, float(a.abs().max()))


def test_pinned_batch(molecule_store: Path) -> None:
    batch = batch_of(molecule_store, torch.float32, 4).pinned()
    assert batch.edge_vectors.is_pinned()
    assert batch.labels[FORCES].is_pinned()
    assert batch.to("cuda", non_blocking=True).edge_vectors.is_cuda
