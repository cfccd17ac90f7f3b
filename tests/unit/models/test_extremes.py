"""Structures at the edge of what is sensible: atoms almost on top of each other, ten thousand atoms."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mffm.data.loader import pack
from mffm.models.potential import Potential

BACKBONES = ("default", "invariant", "quartic", "linear", "single", "escn", "sevennet")


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("distance", [0.09, 1e-3])
def test_atoms_almost_on_top_of_each_other(kit: SimpleNamespace, backbone: str, distance: float) -> None:
    """Finite, and still minus the gradient; along an axis and not."""
    potential = kit.potential(backbone)
    for direction in (np.array([0.0, 0.0, 1.0]), np.array([0.6, -0.48, 0.64])):
        positions = np.array([np.zeros(3), distance * direction, [1.1, 0.3, 0.2]])
        numbers, step = np.array([8, 1, 6]), 1e-4 * distance
        out = potential(kit.batch([(numbers, positions, None)]))
        assert torch.isfinite(out.forces).all()
        size = float(out.forces.abs().max())
        assert float(out.forces.sum(0).abs().max()) < 1e-9 * max(size, 1.0)
        energies = []
        for sign in (1, -1):
            moved = positions.copy()
            moved[1] += sign * step * direction
            energies.append(float(potential(kit.batch([(numbers, moved, None)]), forces=False).energy[0]))
        slope = (energies[0] - energies[1]) / (2 * step)
        found = -float(out.forces[1] @ torch.from_numpy(direction))
        assert found == pytest.approx(slope, rel=1e-4, abs=1e-5 * max(size, 1.0))


@pytest.mark.parametrize("backbone", ["default", "escn"])
def test_ten_thousand_atoms(kit: SimpleNamespace, backbone: str) -> None:
    """A cell and 1331 copies of it: the same forces, the energy of so many."""
    rng = np.random.default_rng(0)
    corners = 3.0 * np.array(np.meshgrid(range(2), range(2), range(2), indexing="ij")).reshape(3, -1).T
    positions = corners + rng.normal(scale=0.1, size=corners.shape)
    numbers, cell, pbc, times = np.array([11, 17] * 4), 6.0 * np.eye(3), np.ones(3, bool), 11
    shifts = np.array(np.meshgrid(*[range(times)] * 3, indexing="ij")).reshape(3, -1).T @ cell
    many = (positions[None] + shifts[:, None]).reshape(-1, 3)
    assert len(many) > 10_000
    exact = kit.potential(backbone)
    potential = Potential(exact.config, exact.fidelities, exact.avg_neighbors, exact.scale).eval()
    potential.load_state_dict(exact.state_dict())
    one = potential(pack([(numbers, positions, cell, pbc)], [0], kit.cutoff), stress=True)
    whole = potential(pack([(np.tile(numbers, times**3), many, times * cell, pbc)], [0], kit.cutoff), stress=True)
    assert float(whole.energy[0]) == pytest.approx(times**3 * float(one.energy[0]), rel=1e-4)
    torch.testing.assert_close(whole.forces, one.forces.repeat(times**3, 1), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(whole.stress, one.stress, rtol=1e-3, atol=1e-4)
