"""Kept neighbor lists: the edges of a new list, whatever atoms and cell have done since it was made."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from mffm.data.neighbors import neighbor_list
from mffm.deploy.skin import SkinList

CUTOFF = 4.0


def same_edges(a: tuple[np.ndarray, ...], b: tuple[np.ndarray, ...]) -> bool:
    def rows(edges: tuple[np.ndarray, ...]) -> np.ndarray:
        return np.unique(np.column_stack(edges), axis=0)

    return np.array_equal(rows(a), rows(b)) and len(a[0]) == len(b[0])


def walk(atoms: Atoms, rng: np.random.Generator, step: float, strain: float) -> None:
    atoms.positions += rng.normal(0, step, atoms.positions.shape)
    if strain:
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + rng.normal(0, strain, (3, 3))), scale_atoms=True)


@pytest.mark.parametrize("strain", [0.0, 0.004])
@pytest.mark.parametrize("pbc", [(True, True, True), (True, True, False), (False, False, False)])
def test_edges_along_a_walk(pbc: tuple[bool, bool, bool], strain: float):
    rng = np.random.default_rng(1)
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    atoms.pbc = pbc
    kept = SkinList(CUTOFF, 0.6)
    for _ in range(60):
        walk(atoms, rng, 0.02, strain if any(pbc) else 0.0)
        state = atoms.positions, atoms.cell.array, np.array(pbc)
        assert same_edges(kept.of(*state), neighbor_list(*state, CUTOFF))
    if strain == 0:
        assert 1 < kept.n_made < 30
    elif all(pbc):
        assert 1 < kept.n_made < 60


def test_a_cell_that_shrinks_faster_than_the_atoms_are_seen_to_move():
    """Without the strain's part, images of an atom would come within the cutoff unseen."""
    atoms = bulk("NaCl", "rocksalt", a=5.6, cubic=True)
    kept = SkinList(CUTOFF, 0.3)
    for scale in np.linspace(1.0, 0.7, 40):
        cell = atoms.cell.array * scale
        state = atoms.positions * scale, cell, np.ones(3, bool)
        assert same_edges(kept.of(*state), neighbor_list(*state, CUTOFF))
    assert kept.n_made > 3


def test_other_atoms_and_no_skin():
    kept = SkinList(CUTOFF, 0.5)
    water, ethanol = molecule("H2O"), molecule("CH3CH2OH")
    for atoms in (water, ethanol, water):
        state = atoms.positions, np.zeros((3, 3)), np.zeros(3, bool)
        assert same_edges(kept.of(*state), neighbor_list(*state, CUTOFF))
    plain = SkinList(CUTOFF, 0.0)
    for _ in range(2):
        plain.of(water.positions, np.zeros((3, 3)), np.zeros(3, bool))
    assert plain.n_made == 2
