"""The store made on the spot: labels that belong together, and a recipe whose plan fits any number of ranks."""

from pathlib import Path

import numpy as np
import pytest

from mffm.data.plan import Plan, build_pools
from mffm.data.store import Store
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY, FORCES, STRESS
from mffm.selftest import data


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data.make_store(tmp_path_factory.mktemp("made"), n_crystals=40, n_molecules=16)


def test_two_fidelities_with_partial_labels(store: Path):
    opened = Store(store)
    assert opened.n_frames == 56
    counts = {(f, p): int(opened.has(f, p).sum()) for f in ("emt", "morse") for p in (ENERGY, FORCES, STRESS)}
    assert counts == {
        ("emt", ENERGY): 56, ("emt", FORCES): 56, ("emt", STRESS): 40,
        ("morse", ENERGY): 14, ("morse", FORCES): 14, ("morse", STRESS): 14,
    }  # fmt: skip
    for row in range(opened.n_frames):
        forces = opened.labels(row, "emt")[FORCES]
        assert np.abs(forces.sum(axis=0)).max() < 1e-4, "a translation costs nothing"
        assert 0.01 < np.abs(forces).max() < 100
    assert not any(opened.labels(row, "morse") for row in range(40, 56)), "molecules have one fidelity"


def test_the_same_frames_every_time():
    first, second = data.crystals(3), data.crystals(3)
    assert all(np.array_equal(a.positions, b.positions) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("n_ranks", [1, 2, 64])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_one_microbatch_a_rank_and_the_same_share_on_one(store: Path, tmp_path: Path, n_ranks: int, on_gpu: bool):
    recipe = data.recipe(store, tmp_path, n_ranks, 30, on_gpu)
    opened = Store(store)
    fidelities = FidelityTable(opened.fidelities[name] for name in recipe.fidelities)
    pools = build_pools(opened, recipe.data.plan, fidelities, data.CUTOFF)
    plan = Plan(pools, recipe.data.plan, recipe.seed)
    assert plan.n_microbatches(n_ranks) == 1
    assert plan.n_microbatches(1) == n_ranks
    step, _ = plan.step(plan.start())
    assert 0.8 < step.n_edges.sum() / (data.edges(on_gpu) * n_ranks) <= 1
