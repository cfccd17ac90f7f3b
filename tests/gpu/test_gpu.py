"""On a GPU: the numbers of the CPU, training through DeepSpeed on nccl, resume, precisions, memory, batches, edges."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import ase.build
import numpy as np
import pytest
import torch

from mffm.batch import Batch
from mffm.config.model import ModelConfig
from mffm.data.bare import Bare
from mffm.data.loader import collate, pack
from mffm.data.store import Store
from mffm.deploy.at_fidelity import geometry
from mffm.deploy.edges import evaluate, export, of_release
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


def crystals() -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """Return distorted crystals with many images, slabs and molecules, some atoms outside of their cells."""
    rng = np.random.default_rng(0)
    frames = [ase.build.bulk("Cu", "fcc", a=3.6), ase.build.bulk("NaCl", "rocksalt", a=5.6), ase.build.molecule("C2H6")]
    frames += [ase.build.fcc111("Al", (1, 1, 3), vacuum=4.0), ase.build.molecule("H"), ase.build.bulk("Si") * (2, 2, 3)]
    geometries = []
    for atoms in frames * 40:
        cell = atoms.cell.array @ (np.eye(3) + rng.normal(0, 0.03, (3, 3)))
        turns = rng.integers(-2, 3, (len(atoms), 3)) * atoms.pbc
        positions = atoms.positions + rng.normal(0, 0.05, atoms.positions.shape) + turns @ cell
        geometries.append((atoms.numbers, positions, cell, atoms.pbc))
    return geometries


def edge_table(batch: Batch) -> np.ndarray:
    on = batch.neighbor_mask
    columns = [batch.receivers[on, None].double(), batch.neighbors[on, None].double(), batch.edge_vectors[on].double()]
    table = torch.cat(columns, 1).cpu().numpy()
    return table[np.lexsort(np.round(table, 5).T[::-1])]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_neighbor_lists_made_on_the_gpu(dtype: torch.dtype) -> None:
    geometries = crystals()
    index = [0] * len(geometries)
    bare, host = pack(geometries, index, CUTOFF, dtype, bare=True).pinned(), pack(geometries, index, CUTOFF, dtype)
    assert isinstance(bare, Bare)
    assert bare.images.is_pinned()
    made = bare.to("cuda", non_blocking=True)
    assert made.edge_vectors.is_cuda
    assert made.edge_vectors.dtype == dtype
    assert made.groups == host.groups
    for name in ("neighbor_mask", "receivers", "row_of_atom", "atom_of_row", "positions", "volume", "system_idx"):
        assert torch.equal(getattr(made, name).cpu(), getattr(host, name)), name
    assert np.allclose(edge_table(made), edge_table(host), rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-6)
    assert torch.equal(made.receivers[made.reverse], made.neighbors)
    on = made.neighbor_mask
    assert torch.equal(made.edge_vectors[made.reverse[on]], -made.edge_vectors[on])
    again = bare.to("cuda")
    assert torch.equal(again.edge_vectors, made.edge_vectors)
    assert torch.equal(again.reverse, made.reverse)
    potential = potential_of("density", dtype).to("cuda").eval()
    found, expected = potential(made, stress=True), potential(host.to("cuda"), stress=True)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    for prop in ("energy", "forces", "stress"):
        torch.testing.assert_close(getattr(found, prop), getattr(expected, prop), rtol=tolerance, atol=tolerance)


def test_training_on_neighbor_lists_made_on_the_gpu(
    make_recipe: Callable[..., Path], run_mffm: Callable, tmp_path: Path
) -> None:
    recipe = make_recipe()
    for where in ("cpu", "device"):
        done = run_mffm("train", str(recipe), f"run={tmp_path / where}", f"data.neighbors={where}")
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "device") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


@pytest.mark.parametrize("compiled", [False, True], ids=["exported", "compiled"])
@pytest.mark.timeout(900)
def test_edge_form_of_a_file_is_that_of_the_cpu(tmp_path: Path, compiled: bool):
    golden = Path(__file__).parents[1] / "golden" / "release-v2"
    model = export(golden, tmp_path / "model.pt2", "pbe", device="cuda", compiled=compiled)  # held against its outputs
    assert (model.device.type, model.form) == ("cuda", "compiled" if compiled else "exported")
    atoms = ase.build.molecule("CH3CH2OH")
    here = of_release(golden, "pbe")
    found, wanted = (evaluate(m, *geometry(atoms)) for m in (model, here))
    assert found.energy == pytest.approx(wanted.energy, abs=1e-9)
    np.testing.assert_allclose(found.forces, wanted.forces, atol=1e-9)


def test_compiled_training_on_molecules_of_many_sizes(
    make_recipe: Callable[..., Path], run_mffm: Callable, tmp_path: Path
) -> None:
    """A size that the compiler takes for a constant shows at the second batch."""
    recipe = make_recipe()
    for name, change in (("plain", "false"), ("compiled", "true")):
        done = run_mffm("train", str(recipe), f"run={tmp_path / name}", f"train.compile={change}")
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-2)
