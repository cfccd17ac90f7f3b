"""The short-range repulsion: values of the formula, smooth ends, derivatives; charge and spin as inputs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ase.data import covalent_radii

from mffm.errors import InputError
from mffm.models.potential import Potential
from mffm.models.zbl import Zbl


def dimer(numbers: list[int], distance: float):
    return np.array(numbers), np.array([[0.0, 0.0, 0.0], [0.0, 0.0, distance]]), None


def energy(kit: SimpleNamespace, numbers: list[int], distance: float) -> float:
    batch = kit.batch([dimer(numbers, distance)])
    return float(Zbl(kit.cutoff)(batch, batch.edge_vectors).atom_energies.sum())


def test_close_nuclei_repel_by_the_formula(kit: SimpleNamespace) -> None:
    """At 0.05 Å the envelope is one to 1e-9; the reference is written out for Si-O."""
    r, z1, z2 = 0.05, 14, 8
    x = r * (z1**0.23 + z2**0.23) / (0.8854 * 0.529177211)
    phi = 0.18175 * np.exp(-3.1998 * x) + 0.50986 * np.exp(-0.94229 * x) + 0.28022 * np.exp(-0.4029 * x)
    phi += 0.02817 * np.exp(-0.20162 * x)
    assert energy(kit, [z1, z2], r) == pytest.approx(14.3996454 * z1 * z2 / r * phi, rel=1e-6)


def test_it_ends_at_the_covalent_radii(kit: SimpleNamespace) -> None:
    end = covalent_radii[6] + covalent_radii[1]
    assert energy(kit, [6, 1], end + 1e-6) == 0
    near = [energy(kit, [6, 1], end - d) for d in (1e-2, 1e-3)]
    assert 0 < near[1] < near[0] * 2e-3  # vanishes as the cube of the distance from the end


def test_forces_and_size_of_a_potential_with_it(kit: SimpleNamespace) -> None:
    torch.manual_seed(0)
    config = kit.config("default").model_copy(update={"zbl": True})
    potential = Potential(config, kit.fidelities, 6.0, 1.0).double().eval()
    plain = Potential(kit.config("default"), kit.fidelities, 6.0, 1.0).double().eval()
    plain.load_state_dict(potential.state_dict())
    numbers, positions, cell = kit.molecule(0)
    positions = 0.6 * positions
    batch = kit.batch([(numbers, positions, cell)])
    prediction = potential(batch)
    extra = Zbl(kit.cutoff)(batch, batch.edge_vectors).atom_energies.sum()
    assert float(extra) > 0
    torch.testing.assert_close(prediction.energy[0], plain(batch).energy[0] + extra)
    step = 1e-5
    for atom, axis in ((0, 0), (2, 1)):
        moved = []
        for sign in (1, -1):
            there = positions.copy()
            there[atom, axis] += sign * step
            moved.append(float(potential(kit.batch([(numbers, there, cell)])).energy[0]))
        assert float(prediction.forces[atom, axis]) == pytest.approx(-(moved[0] - moved[1]) / (2 * step), rel=1e-6)
    assert torch.equal(potential.folded("pbe").terms["zbl"](batch, batch.edge_vectors).atom_energies.sum(), extra)


def test_charge_and_spin_start_without_effect_and_are_learnt(kit: SimpleNamespace) -> None:
    config = kit.config("default")
    backbone = config.backbone.model_copy(update={"charge_and_spin": True})
    potential = Potential(config.model_copy(update={"backbone": backbone}), kit.fidelities, 6.0, 1.0).double().eval()
    neutral, charged, triplet = (kit.batch([kit.molecule(0)]) for _ in range(3))
    charged.charge, triplet.spin_multiplicity = torch.tensor([-1]), torch.tensor([3])
    assert float(potential(neutral).energy) == float(potential(charged).energy) == float(potential(triplet).energy)
    with torch.no_grad():
        for table in (potential.learned.backbone.charges, potential.learned.backbone.spins):
            table.weight.normal_()
    energies = {float(potential(b).energy) for b in (neutral, charged, triplet)}
    assert len(energies) == 3
    charged.charge = torch.tensor([21])
    with pytest.raises(InputError, match="charge 21"):
        potential(charged)
