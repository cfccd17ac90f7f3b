"""Each physical law is one test over every backbone, conditioning and kind of heads, in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mffm.models.potential import Potential

STEP = 5e-4  # Å, of differences over four points, whose error is of the fourth order: ~1e-13 times a fifth derivative
STENCIL = (-2, -1, 1, 2)


def slope(values: torch.Tensor) -> torch.Tensor:
    """Return derivatives from values at the points of the stencil, [n, 4, ...] → [n, ...]."""
    return (values[:, 0] - 8 * values[:, 1] + 8 * values[:, 2] - values[:, 3]) / (12 * STEP)


def displaced(numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray | None) -> list:
    """Return the system with each coordinate moved to each point of the stencil."""
    systems = []
    for i in range(positions.size):
        for point in STENCIL:
            moved = positions.copy()
            moved.flat[i] += point * STEP
            systems.append((numbers, moved, cell))
    return systems


def orthogonal(seed: int, determinant: int) -> np.ndarray:
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))[0]
    return q * np.linalg.det(q) * determinant


def mixed(kit: SimpleNamespace) -> tuple[list, list[int]]:
    """A molecule, a small crystal and another molecule, at three fidelities."""
    return [kit.molecule(0), kit.crystal(), kit.molecule(3, 4)], [2, 0, 1]


def same(a: torch.Tensor | None, b: torch.Tensor | None, tolerance: float = 1e-10) -> None:
    assert a is not None
    assert b is not None
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("determinant", [1, -1], ids=["rotation", "reflection"])
def test_orthogonal_transformation(potential: Potential, kit: SimpleNamespace, determinant: int) -> None:
    if determinant < 0 and potential.config.backbone.kind == "escn":
        pytest.skip("eSCN-MD convolves with SO(2): its energies may change under reflections")
    systems, fidelities = mixed(kit)
    q = orthogonal(5, determinant)
    turned = [(n, p @ q.T, None if c is None else c @ q.T) for n, p, c in systems]
    a = potential(kit.batch(systems, fidelities), stress=True)
    b = potential(kit.batch(turned, fidelities), stress=True)
    rotation = torch.tensor(q)
    same(a.energy, b.energy)
    same(a.atom_energies, b.atom_energies)
    same(a.forces @ rotation.T, b.forces)
    same(rotation @ a.stress @ rotation.T, b.stress)
    assert a.forces.abs().max() > 1e-3  # a potential that sees nothing would pass
    assert a.stress[1].abs().max() > 1e-5


def test_translation(potential: Potential, kit: SimpleNamespace) -> None:
    systems, fidelities = mixed(kit)
    moved = [(n, p + np.array([3.1, -2.2, 0.7]), c) for n, p, c in systems]
    a, b = (potential(kit.batch(s, fidelities), stress=True) for s in (systems, moved))
    same(a.energy, b.energy)
    same(a.forces, b.forces)
    same(a.stress, b.stress)
    batch = kit.batch(systems, fidelities)
    net = torch.zeros(3, 3, dtype=torch.float64).index_add(0, batch.system_idx, a.forces)
    same(net, torch.zeros_like(net))


def test_permutation(potential: Potential, kit: SimpleNamespace) -> None:
    numbers, positions, _ = kit.molecule(0, 6)
    order = np.array([3, 0, 5, 1, 4, 2])
    a = potential(kit.batch([(numbers, positions, None)], [1]))
    b = potential(kit.batch([(numbers[order], positions[order], None)], [1]))
    same(a.energy, b.energy)
    same(a.forces[order], b.forces)


def test_forces_are_minus_the_gradient(potential: Potential, kit: SimpleNamespace) -> None:
    for system, fidelity in ((kit.molecule(3, 4), 2), (kit.crystal(), 0)):
        moved = displaced(*system)
        energy = potential(kit.batch(moved, [fidelity] * len(moved)), forces=False).energy
        forces = potential(kit.batch([system], [fidelity])).forces
        same(forces.flatten(), -slope(energy.view(-1, 4)), 1e-6)


def test_stress_is_the_strain_derivative(potential: Potential, kit: SimpleNamespace) -> None:
    numbers, positions, cell = kit.crystal()
    strained = []
    for a in range(3):
        for b in range(3):
            for point in STENCIL:
                strain = np.zeros((3, 3))
                strain[a, b] += point * STEP / 2
                strain[b, a] += point * STEP / 2
                deform = np.eye(3) + strain
                strained.append((numbers, positions @ deform, cell @ deform))
    energy = potential(kit.batch(strained, [2] * 36), forces=False).energy
    expected = slope(energy.view(9, 4)).view(3, 3) / abs(np.linalg.det(cell))
    stress = potential(kit.batch([(numbers, positions, cell)], [2]), forces=False, stress=True).stress[0]
    same(stress, expected, 1e-7)
    same(stress, stress.T)


def test_smooth_at_the_cutoff(potential: Potential, kit: SimpleNamespace) -> None:
    """Within h of the cutoff a pair has energy ~ h³, force ~ h²: force / h vanishes, two derivatives are continuous."""

    def at(distance: float) -> tuple[np.ndarray, np.ndarray, None]:
        return np.array([8, 1]), np.array([[0.0, 0.0, 0.0], [0.6, 0.0, 0.8]]) * distance, None

    h = torch.tensor([0.3, 0.2, 0.1, 1e-4, 1e-5, -1e-9, -1e-4, -1.0], dtype=torch.float64)
    out = potential(kit.batch([at(kit.cutoff - float(x)) for x in h], [1] * len(h)))
    excess = (out.energy - out.energy[-1]).abs()
    force = out.forces.view(len(h), 2, 3)[:, 0].norm(dim=-1)
    assert not force[5:].any()
    assert excess[5:].max() < 1e-13  # the last bit of an energy depends on its place in the batch
    inside = force[:5] / h[:5]
    assert inside[:3].max() > 1e-6
    assert inside[3] < 0.05 * inside[:3].max()
    assert inside[4] < 0.3 * inside[3] + 1e-9


def test_an_atom_crossing_the_cutoff_of_a_molecule(potential: Potential, kit: SimpleNamespace) -> None:
    """Energy, forces and the force's slope do not jump when one neighbor of many crosses the cutoff."""
    numbers, positions, _ = kit.molecule(0)
    numbers = np.append(numbers, 6)
    direction = np.array([0.48, 0.6, 0.64])
    anchor = positions[np.argmax(positions @ direction)]
    h = 1e-5
    systems = [
        (numbers, np.vstack([positions, anchor + direction * (kit.cutoff + s * h)]), None) for s in (-2, -1, 1, 2)
    ]
    out = potential(kit.batch(systems, [0] * 4))
    forces = out.forces.view(4, -1)
    same(out.energy[1], out.energy[2], 1e-9)
    same(forces[1], forces[2], 1e-6)
    slopes = (forces[1] - forces[0]) / h, (forces[3] - forces[2]) / h
    same(slopes[0], slopes[1], 1e-3)


def test_size_extensive(potential: Potential, kit: SimpleNamespace) -> None:
    (na, pa, _), (nb, pb, _) = kit.molecule(0), kit.molecule(3, 4)
    together = (np.concatenate([na, nb]), np.concatenate([pa, pb + 40.0]), None)
    out = potential(kit.batch([together, (na, pa, None), (nb, pb, None)], [2, 2, 2]))
    same(out.energy[0], out.energy[1] + out.energy[2])
    same(out.forces[:9], out.forces[9:])


def test_supercell(potential: Potential, kit: SimpleNamespace) -> None:
    numbers, positions, cell = kit.crystal()
    shifts = [np.array([i, 0, k]) @ cell for i in range(2) for k in range(2)]
    double = (np.tile(numbers, 4), np.concatenate([positions + s for s in shifts]), np.diag([2, 1, 2]) @ cell)
    out = potential(kit.batch([(numbers, positions, cell), double], [1, 1]), stress=True)
    same(out.energy[1], 4 * out.energy[0])
    same(out.forces[2:], out.forces[:2].repeat(4, 1))
    same(out.stress[1], out.stress[0])


def test_images_are_equivalent(potential: Potential, kit: SimpleNamespace) -> None:
    numbers, positions, cell = kit.crystal()
    wrapped = (numbers, positions + np.array([[1, -2, 0], [0, 1, 1]]) @ cell, cell)
    out = potential(kit.batch([(numbers, positions, cell), wrapped], [0, 0]), stress=True)
    same(out.energy[0], out.energy[1])
    same(out.forces[:2], out.forces[2:])
    same(out.stress[0], out.stress[1])


def test_batched_is_single(potential: Potential, kit: SimpleNamespace) -> None:
    """Also: a batch of several fidelities is the batches of each."""
    systems, fidelities = mixed(kit)
    out = potential(kit.batch(systems, fidelities), stress=True)
    single = [potential(kit.batch([s], [f]), stress=True) for s, f in zip(systems, fidelities, strict=True)]
    same(out.energy, torch.cat([p.energy for p in single]))
    same(out.forces, torch.cat([p.forces for p in single]))
    same(out.stress, torch.cat([p.stress for p in single]))
    assert not out.stress[0].any()  # no volume, no stress


def test_float32_is_close_to_float64(potential: Potential, kit: SimpleNamespace) -> None:
    systems, fidelities = mixed(kit)
    exact = potential(kit.batch(systems, fidelities), stress=True)
    single = Potential(potential.config, potential.fidelities, potential.avg_neighbors, potential.scale).eval()
    single.load_state_dict(potential.state_dict())
    out = single(kit.batch(systems, fidelities, dtype=torch.float32), stress=True)
    assert out.forces.dtype == out.stress.dtype == torch.float32
    assert out.energy.dtype == torch.float64
    same(out.energy, exact.energy, 2e-5)
    same(out.forces.double(), exact.forces, 5e-5)
    same(out.stress.double(), exact.stress, 5e-5)


def test_hessian_is_symmetric(potential: Potential, kit: SimpleNamespace) -> None:
    system = kit.molecule(3, 4)
    moved = displaced(*system)
    forces = potential(kit.batch(moved, [1] * len(moved))).forces
    hessian = -slope(forces.view(system[1].size, 4, -1))
    assert hessian.abs().max() > 1e-3
    same(hessian, hessian.T, 1e-6)


def test_collinear_bonds_and_axes(potential: Potential, kit: SimpleNamespace) -> None:
    """Bonds along the axes, and a chain: finite, no force across the chain, also in the gradients of the parameters."""
    line = np.array([0.0, 1.1, 2.3, 3.6])
    systems = [(np.array([8, 6, 1, 6]), np.outer(line, axis), None) for axis in np.vstack([np.eye(3), -np.eye(3)])]
    out = potential(kit.batch(systems, [0, 1, 2, 0, 1, 2]))
    forces = out.forces.view(6, 4, 3)
    for i in range(6):
        across = [a for a in range(3) if a != i % 3]
        assert forces[i][:, across].abs().max() < 1e-12
    same(out.energy[:3], out.energy[3:])
    gradients = parameter_gradients(potential, kit.batch(systems, [0, 1, 2, 0, 1, 2]))
    assert all(torch.isfinite(g).all() for g in gradients.values())


def parameter_gradients(potential: Potential, batch, stress: bool = False) -> dict[str, torch.Tensor]:
    """Return the gradients of a loss of energies, forces and stress, for the parameters that have one."""
    potential.train()
    potential.zero_grad(set_to_none=True)
    out = potential(batch, stress=stress)
    loss = out.energy.square().sum() + (out.forces - 0.1).square().sum()
    if stress:
        loss = loss + out.stress.square().sum()
    loss.backward()
    potential.eval()
    return {name: p.grad for name, p in potential.named_parameters() if p.grad is not None}


def test_atoms_without_neighbors(potential: Potential, kit: SimpleNamespace) -> None:
    single = (np.array([6]), np.zeros((1, 3)), None)
    apart = (np.array([6, 1, 8]), np.array([[0.0, 0, 0], [0, 0, 20], [30, 0, 0]]), None)
    out = potential(kit.batch([single, apart], [2, 2]), stress=True)
    assert torch.isfinite(out.energy).all()
    assert not out.forces.any()
    assert not out.stress.any()
    same(out.atom_energies[0], out.atom_energies[1])
    with_bond = kit.batch([kit.molecule(0), single], [0, 2])
    assert not potential(with_bond).forces[-1].any()
    for batch in (kit.batch([single], [2]), with_bond):
        assert all(torch.isfinite(g).all() for g in parameter_gradients(potential, batch, stress=True).values())


def test_every_parameter_has_a_gradient_in_every_batch(potential: Potential, kit: SimpleNamespace) -> None:
    """Ranks may hold other fidelities, or a dummy without an edge: the parameters with a gradient are the same."""
    systems, fidelities = mixed(kit)
    dummy = kit.batch([(np.array([1]), np.zeros((1, 3)), None)], [0])
    batches = [kit.batch(systems, fidelities), kit.batch(systems, [1, 1, 1]), dummy]
    every = {name for name, _ in potential.named_parameters()}
    for batch in batches:
        assert set(parameter_gradients(potential, batch, stress=True)) == every
    rows = parameter_gradients(potential, kit.batch(systems, [1, 1, 1]))
    for name in potential.per_fidelity():
        if "conditioning" in name or potential.config.heads.kind == "independent":
            assert not rows[name][[0, 2]].any()


def test_gradient_of_a_force_loss(potential: Potential, kit: SimpleNamespace) -> None:
    """The double backward: the derivative of a loss of forces and stress along a direction of all parameters."""
    batch = kit.batch(*mixed(kit))
    gradients = parameter_gradients(potential, batch, stress=True)
    generator = torch.Generator().manual_seed(1)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in potential.named_parameters()}
    start = {n: p.detach().clone() for n, p in potential.named_parameters()}
    losses = []
    for point in STENCIL:
        with torch.no_grad():
            for name, p in potential.named_parameters():
                p.copy_(start[name] + point * STEP * 0.1 * direction[name])
        out = potential(batch, stress=True)
        losses.append(out.energy.square().sum() + (out.forces - 0.1).square().sum() + out.stress.square().sum())
    with torch.no_grad():
        for name, p in potential.named_parameters():
            p.copy_(start[name])
    expected = slope(torch.stack(losses)[None])[0] / 0.1
    found = sum((gradients[n] * direction[n]).sum() for n in gradients)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_training_mode_and_no_grad_predict_the_same(potential: Potential, kit: SimpleNamespace) -> None:
    batch = kit.batch(*mixed(kit))
    reference = potential(batch, stress=True)
    assert not reference.forces.requires_grad
    potential.train()
    training = potential(batch, stress=True)
    with torch.no_grad():
        quiet = potential(batch, stress=True)
    potential.eval()
    assert training.forces.requires_grad
    assert not quiet.energy.requires_grad
    for out in (training, quiet):
        same(
            out.forces.detach(), reference.forces, 1e-12
        )  # not equal: with a graph, silu's derivative is another kernel
        same(out.energy.detach(), reference.energy, 1e-12)
    only_energy = potential(batch, forces=False)
    assert only_energy.forces is None
    same(only_energy.energy, reference.energy)


def test_unused_slots_change_nothing(potential: Potential, kit: SimpleNamespace) -> None:
    """Wider padding gives the same values and the same gradients."""
    batch = kit.batch([kit.molecule(0)], [1])
    wider = kit.batch([kit.molecule(0)], [1], extra_slots=3)
    same(potential(batch).forces, potential(wider).forces, 1e-12)
    gradients = [parameter_gradients(potential, b) for b in (batch, wider)]
    for name, gradient in gradients[0].items():
        same(gradient, gradients[1][name], 1e-11)


def test_folded_predicts_the_same(potential: Potential, kit: SimpleNamespace) -> None:
    systems, _ = mixed(kit)
    for i, fidelity in enumerate(potential.fidelities):
        folded = potential.folded(fidelity)
        a = potential(kit.batch(systems, [i] * 3), stress=True)
        b = folded(kit.batch(systems, [0] * 3), stress=True)
        same(a.energy, b.energy)
        same(a.forces, b.forces)
        same(a.stress, b.stress)
        assert folded.fidelities == (fidelity,)
        assert not folded.per_fidelity()
        assert not list(folded.learned.conditioning.parameters())
        assert folded.n_parameters <= potential.n_parameters


def test_fidelities_differ(potential: Potential, kit: SimpleNamespace) -> None:
    """With anything per fidelity, another fidelity predicts something else; without, the same."""
    energies = potential(kit.batch([kit.molecule(0)] * 3, [0, 1, 2]), forces=False).energy
    plain = not potential.per_fidelity()
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (abs(energies[a] - energies[b]) < 1e-10) == plain
