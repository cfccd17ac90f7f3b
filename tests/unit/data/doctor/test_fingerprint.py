"""The fingerprint is that of a structure, whatever the order, the cell and the place; and of no other."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, make_supercell
from scipy.spatial.transform import Rotation

from mffm.data.doctor.fingerprint import NEAR, SAME, composition_key, difference, features, pairs, tables
from mffm.frame import Frame


def frame(atoms: Atoms, **changes) -> Frame:
    return Frame(
        atoms.numbers.astype(np.uint8), np.array(atoms.positions), np.array(atoms.cell), np.array(atoms.pbc), **changes
    )


def molecule(rng: np.random.Generator) -> Atoms:
    n = int(rng.integers(3, 14))
    return Atoms(rng.choice([1, 6, 8], n), rng.uniform(-2.5, 2.5, (n, 3)))


def crystal(rng: np.random.Generator) -> Atoms:
    cell = np.diag(rng.uniform(3, 5, 3)) + rng.uniform(-1, 1, (3, 3))
    n = int(rng.integers(2, 7))
    return Atoms(rng.choice([8, 12, 14], n), rng.uniform(0, 1, (n, 3)) @ cell, cell=cell, pbc=True)


def moved(atoms: Atoms, rng: np.random.Generator) -> Atoms:
    turn = Rotation.random(random_state=int(rng.integers(1 << 30))).as_matrix()
    result = atoms[rng.permutation(len(atoms))]
    result.set_cell(np.array(atoms.cell) @ turn)
    result.positions = result.positions @ turn + rng.normal(0, 2, 3)
    return result


@pytest.mark.parametrize("make", [molecule, crystal])
def test_the_same_after_motion_and_reordering(make):
    rng = np.random.default_rng(0)
    for _ in range(30):
        atoms = make(rng)
        a, b = frame(atoms), frame(moved(atoms, rng))
        assert composition_key(a) == composition_key(b)
        assert difference(tables(a), tables(b)) < 1e-9
        assert np.abs(features(a, pairs(a)) - features(b, pairs(b))).max() < 1e-5


def test_the_same_in_another_cell():
    rng = np.random.default_rng(1)
    for _ in range(10):
        atoms = crystal(rng)
        skewed = atoms.copy()
        skewed.set_cell(np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1]]) @ np.array(atoms.cell))
        larger = make_supercell(atoms, [[2, 0, 0], [0, 1, 0], [1, 0, 1]])
        for other in (skewed, larger):
            assert composition_key(frame(atoms)) == composition_key(frame(other))
            assert difference(tables(frame(atoms)), tables(frame(other))) < 1e-9


@pytest.mark.parametrize("make", [molecule, crystal])
def test_nothing_changes_by_more_than_the_distances(make):
    """What candidates are found by must not miss one: no distance changes by more than twice the largest displacement,
    and neither features nor tables change by more.
    """
    rng = np.random.default_rng(2)
    for size in (1e-3, 0.01, 0.1, 0.5):
        for _ in range(10):
            atoms = make(rng)
            shift = rng.normal(0, size, atoms.positions.shape)
            other = atoms.copy()
            other.positions += shift
            a, b = frame(atoms), frame(other)
            most = 2 * np.linalg.norm(shift, axis=1).max()
            assert np.abs(features(a, pairs(a)) - features(b, pairs(b))).max() <= most + 1e-5
            assert difference(tables(a), tables(b)) <= most + 1e-9


def test_a_displacement_is_seen():
    rng = np.random.default_rng(3)
    for make in (molecule, crystal):
        for _ in range(20):
            atoms = make(rng)
            other = atoms.copy()
            other.positions[0] += [0.004, -0.003, 0.004]
            assert SAME < difference(tables(frame(atoms)), tables(frame(other))) < NEAR
            other.positions[0] += [0.2, 0.2, -0.1]
            assert difference(tables(frame(atoms)), tables(frame(other))) > NEAR


def test_swapped_elements_are_another_structure():
    """Rock salt with two sites exchanged has the same distances, between other elements."""
    salt = bulk("NaCl", "rocksalt", 5.64, cubic=True)
    other = salt.copy()
    other.numbers[[0, 1]] = other.numbers[[1, 0]]
    assert composition_key(frame(salt)) == composition_key(frame(other))
    assert difference(tables(frame(salt)), tables(frame(other))) > NEAR


def test_charge_and_spin_are_part_of_a_structure():
    water = Atoms("OH2", [[0, 0, 0], [0.96, 0, 0], [0, 0.96, 0]])
    assert composition_key(frame(water)) == composition_key(frame(water, charge=0))
    assert composition_key(frame(water)) != composition_key(frame(water, charge=1))
    assert composition_key(frame(water)) != composition_key(frame(water, spin_multiplicity=3))
