"""Edges made on the device: the batch of the host's lists, its energies and forces, and a training's losses."""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml

from mffm.batch import Batch
from mffm.config.base import load
from mffm.config.data import DataConfig
from mffm.config.model import ModelConfig
from mffm.config.recipe import PlanConfig
from mffm.data import bare
from mffm.data.bare import Bare
from mffm.data.ingest import ingest
from mffm.data.loader import Loader, collate, dummy, pack
from mffm.data.plan import Plan, build_pools
from mffm.data.store import Store, count_edges
from mffm.errors import InputError
from mffm.keys import PROPERTIES
from mffm.models.potential import Potential

CUTOFF = 4.0
ROOT = Path(__file__).parents[3]
EDGES = ("neighbors", "edge_vectors", "reverse")  # their order within an atom's row may differ
SIZES = {"crystal": 5.0, "tiny": 1.9, "skewed": 4.0, "two": 4.0, "one": 3.0}


def structure(case: str, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return numbers, positions, cell and pbc; atoms of periodic structures lie in and outside of the cell."""
    rng = np.random.default_rng([seed, *case.encode()])
    n = 1 if case in ("atom", "tiny") else int(rng.integers(1, 9))
    numbers = rng.choice([1, 6, 8], n).astype(np.uint8)
    if case in ("atom", "molecule"):
        return numbers, rng.uniform(-4, 4, (n, 3)), np.zeros((3, 3)), np.zeros(3, bool)
    cell = SIZES[case] * (np.diag(rng.uniform(0.9, 1.3, 3)) + 0.1 * rng.normal(size=(3, 3)))
    if case == "skewed":
        cell = np.array([[1, 0, 0], [2, 1, 0], [-1, 3, 1]]) @ cell  # heights far below the lengths of the vectors
    positions = rng.uniform(-1.5, 2.5, (n, 3)) @ cell
    pbc = np.ones(3, bool)
    if case in ("one", "two"):
        pbc = rng.permutation([True, case == "two", False])
        cell[~pbc] *= rng.integers(2)  # vectors of other directions are not used, whether there are any or not
    return numbers, positions, cell, pbc


CASES = ["atom", "molecule", *SIZES]


def edge_table(batch: Batch) -> np.ndarray:
    """Return receiver, sender and vector of each edge, in an order that depends on nothing else."""
    on = batch.neighbor_mask
    columns = [batch.receivers[on, None].double(), batch.neighbors[on, None].double(), batch.edge_vectors[on].double()]
    table = torch.cat(columns, 1).numpy()
    return table[np.lexsort(np.round(table, 5).T[::-1])]


def same_batch(found: Batch, expected: Batch, tolerance: float = 1e-12) -> None:
    assert type(found) is Batch
    for field in fields(Batch):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if field.name in EDGES:
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
        elif isinstance(a, dict):
            assert all(torch.equal(a[p], b[p]) and a[p].dtype == b[p].dtype for p in PROPERTIES)
        elif isinstance(a, tuple):
            assert a == b
        else:
            assert torch.equal(a, b), field.name
            assert a.dtype == b.dtype
    assert np.allclose(edge_table(found), edge_table(expected), rtol=0, atol=tolerance)
    on, own = found.neighbor_mask, torch.arange(len(found.neighbor_mask))
    assert torch.equal(found.neighbors[~on], expected.neighbors[~on])
    assert torch.equal(found.edge_vectors[~on], expected.edge_vectors[~on])
    assert torch.equal(found.reverse[~on], own[~on])
    assert torch.equal(found.reverse[found.reverse], own)
    assert (found.reverse[on] != own[on]).all()
    assert torch.equal(found.receivers[found.reverse], found.neighbors)
    assert torch.equal(found.edge_vectors[found.reverse[on]], -found.edge_vectors[on])


def both(geometries: list, cutoff: float = CUTOFF, dtype: torch.dtype = torch.float64) -> tuple[Batch, Batch]:
    made = pack(geometries, [0] * len(geometries), cutoff, dtype, bare=True)
    assert type(made) is Bare
    return made.to("cpu"), pack(geometries, [0] * len(geometries), cutoff, dtype)


@pytest.mark.parametrize("case", CASES)
def test_the_batch_of_the_hosts_lists(case: str) -> None:
    n_edges = 0
    for seed in range(12):
        found, expected = both([structure(case, seed)])
        same_batch(found, expected)
        n_edges += found.n_edges
    assert (n_edges > 0) == (case != "atom")


def mixture(seed: int = 0) -> list:
    return [structure(case, seed + i) for i in range(3) for case in CASES]


def test_a_batch_of_all_kinds() -> None:
    found, expected = both(mixture())
    same_batch(found, expected)
    assert len(found.groups) > 1
    found, expected = both(mixture(), dtype=torch.float32)
    same_batch(found, expected, 1e-6)
    same_batch(*both(mixture(), cutoff=1.3))
    same_batch(*both([structure("atom", seed) for seed in range(3)]))


def test_a_perfect_crystal_leaves_out_what_lies_at_the_cutoff() -> None:
    cubic = (np.array([14]), np.full((1, 3), 7.0), 2.0 * np.eye(3), np.ones(3, bool))
    for cutoff, n in ((2.0, 0), (2.0 + 1e-9, 6), (4.0, 26), (4.0 + 1e-9, 32)):
        found, expected = both([cubic], cutoff)
        assert found.n_edges == expected.n_edges == n


def test_atoms_in_one_place_are_neighbors_as_in_the_hosts_list() -> None:
    found, expected = both([(np.array([1, 1]), np.zeros((2, 3)), 2.0 * np.eye(3), np.ones(3, bool))], 2.5)
    assert found.n_edges == expected.n_edges == 26


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = both(mixture())
    monkeypatch.setattr(bare, "CHUNK", 300)
    made = pack(mixture(), [0] * len(mixture()), CUTOFF, torch.float64, bare=True)
    assert isinstance(made, Bare)
    assert max(size for _, _, size in made.chunks) > 300  # one atom's candidates stay together
    assert any(last - first > 1 for first, last, _ in made.chunks)
    assert [first for first, _, _ in made.chunks[1:]] == [last for _, last, _ in made.chunks[:-1]]
    parts = made.to("cpu")
    for field in fields(Batch):
        value = getattr(whole, field.name)
        assert not isinstance(value, torch.Tensor) or torch.equal(getattr(parts, field.name), value)


def test_too_many_candidates_are_left_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    geometries = mixture()
    total = sum(size for _, _, size in pack(geometries, [0] * len(geometries), CUTOFF, bare=True).chunks)
    for limit, kind in ((total, Bare), (total - 1, Batch)):
        monkeypatch.setattr(bare, "MAX_CANDIDATES", limit)
        made = pack(geometries, [0] * len(geometries), CUTOFF, torch.float64, bare=True)
        assert type(made) is kind
        same_batch(made.to("cpu"), pack(geometries, [0] * len(geometries), CUTOFF, torch.float64))


def test_a_cell_that_does_not_span_the_periodic_directions_is_an_error() -> None:
    flat = np.array([[4.0, 0, 0], [0, 4, 0], [4, 4, 0]])
    with pytest.raises(InputError, match="periodic directions"):
        pack([(np.array([1]), np.zeros((1, 3)), flat, np.ones(3, bool))], [0], CUTOFF, bare=True)


def potential() -> Potential:
    torch.manual_seed(0)
    backbone = {"cutoff": CUTOFF, "lmax": 2, "l_message": 1, "layers": 2, "channels": 8, "edge_channels": 8}
    config = ModelConfig.model_validate({"backbone": backbone})
    return Potential(config, ["pbe"], avg_neighbors=20.0, scale=1.0).double().eval()


@pytest.mark.parametrize("kind", ["mixture", "crystals"])
def test_energies_and_forces_to_rounding(crystal_store: Path, kind: str) -> None:
    store = Store(crystal_store)
    geometries = mixture() if kind == "mixture" else [store.geometry(row) for row in range(0, store.n_frames, 9)]
    predictions = [potential()(batch, stress=True) for batch in both(geometries)]
    for prop in ("energy", "forces", "stress"):
        found, expected = (getattr(p, prop) for p in predictions)
        assert float((found - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
        assert float(expected.abs().max()) > 0


def test_a_batch_without_its_edges_is_no_batch_for_a_potential() -> None:
    with pytest.raises(Exception):  # noqa: B017 - whichever of torch's errors about shapes comes first
        potential()(pack(mixture(), [0] * len(mixture()), CUTOFF, torch.float64, bare=True))


@pytest.fixture(scope="module")
def crystal_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("crystals")
    data = ROOT / "configs" / "data" / "crystals.yaml"
    ingest(load(DataConfig, data), data.parent, folder / "store", progress=False)
    count_edges(folder / "store", CUTOFF)
    return folder / "store"


def test_loader_gives_the_same_steps(crystal_store: Path) -> None:
    store = Store(crystal_store)
    pools = [{"fidelity": name, "properties": PROPERTIES} for name in store.fidelities.names]
    config = PlanConfig(pools=pools, edge_budget=8000, edges_per_microbatch=4000)
    plan = Plan(build_pools(store, config, store.fidelities, CUTOFF), config, seed=0)
    read = {}
    for wanted in (False, True):
        arguments = (store, plan, store.fidelities, CUTOFF)
        with Loader(*arguments, dtype=torch.float64, last_step=3, threads=2, bare=wanted) as loader:
            read[wanted] = [(batch, cursor) for _, batches, cursor in loader for batch in batches]
    assert len(read[True]) == 6
    for (found, cursor), (expected, other) in zip(read[True], read[False], strict=True):
        assert type(found) is Bare
        same_batch(found.to("cpu"), expected)
        assert cursor == other
    assert any(batch.masks["forces"].any() for batch, _ in read[True])


def test_no_rows_give_the_dummy_batch(crystal_store: Path) -> None:
    store = Store(crystal_store)
    made = collate(store, [], [], store.fidelities, [], CUTOFF, torch.float64, bare=True)
    same_batch(made.to("cpu"), dummy(CUTOFF, torch.float64))


TRAIN_ALL = """
import sys
from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.data import bare
from mffm.training.loop import train

make, made = bare._with_edges, []
bare._with_edges = lambda batch: made.append(0) or make(batch)
for path in sys.argv[1:]:
    train(load(Recipe, path))
    print(len(made))
"""


@pytest.mark.slow
def test_training_loses_the_same(crystal_store: Path, tmp_path: Path, tiny_recipe: Callable[..., dict]) -> None:
    recipes = []
    for neighbors in ("cpu", "device"):
        recipe = tiny_recipe(crystal_store, tmp_path / neighbors)
        pools = [{"fidelity": name, "properties": list(PROPERTIES)} for name in ("pbe_gpaw", "r2scan_gpaw")]
        plan = {"pools": pools, "edge_budget": 8000, "edges_per_microbatch": 4000}
        recipe["data"] |= {"plan": plan, "neighbors": neighbors}
        recipe["model"]["heads"]["base"] = "pbe_gpaw"
        recipe["train"] |= {"steps": 10, "validate_every": 10, "save_every": 10}
        recipes.append(tmp_path / f"{neighbors}.yaml")
        recipes[-1].write_text(yaml.safe_dump(recipe))
    done = forked.run(["-c", TRAIN_ALL, *map(str, recipes)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["0", "21"]  # ten steps of two microbatches, and the preflight's batch
    rows = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("cpu", "device")
    ]
    losses = [[row["train/loss"] for row in run if "train/loss" in row] for run in rows]
    assert len(losses[0]) == 10
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
