"""Neighbor lists against ASE's, and the padded layout against its definition."""

import itertools

import numpy as np
import pytest
from ase.geometry.cell import complete_cell
from ase.neighborlist import primitive_neighbor_list

from mffm.data.neighbors import MAX_GROUPS, WORTH, count, neighbor_list, opposite_edges, pad, row_groups
from mffm.errors import InputError


def random_structure(rng, case):
    n_atoms = int(rng.integers(1, 15))
    if case == "molecule":
        return rng.uniform(0, 9, (n_atoms, 3)), np.zeros((3, 3)), np.zeros(3, bool)
    size = 2.0 if case == "tiny" else 7.0
    cell = np.eye(3) * rng.uniform(0.8, 1.4, 3) * size + rng.normal(size=(3, 3)) * 0.12 * size
    pbc = np.ones(3, bool)
    if case in ("mixed", "slab"):
        while pbc.all() or not pbc.any():
            pbc = rng.random(3) < 0.5
    fractional = rng.uniform(-0.6, 1.6, (n_atoms, 3))  # atoms outside of the cell as well
    positions = fractional @ cell
    if case == "slab":
        cell[~pbc] = 0.0
    return positions, cell, pbc


def edge_set(receiver, sender, shift):
    return sorted(zip(receiver.tolist(), sender.tolist(), map(tuple, shift.tolist()), strict=True))


@pytest.mark.parametrize("case", ["triclinic", "tiny", "mixed", "slab", "molecule"])
def test_same_edges_as_ase(case):
    rng = np.random.default_rng(7)
    for _ in range(25):
        positions, cell, pbc = random_structure(rng, case)
        receiver, sender, shift = neighbor_list(positions, cell, pbc, 4.5)
        expected = primitive_neighbor_list("ijS", pbc, complete_cell(cell), positions, 4.5, self_interaction=False)
        assert edge_set(receiver, sender, shift) == edge_set(*expected)
        assert np.all(np.diff(receiver) >= 0)
        assert count(positions, cell, pbc, 4.5) == len(receiver)
        vectors = positions[sender] - positions[receiver] + shift @ cell
        assert np.all(np.linalg.norm(vectors, axis=1) < 4.5)
    assert len(receiver) > 0


def test_self_images_of_a_tiny_cell():
    receiver, sender, shift = neighbor_list(np.zeros((1, 3)), np.eye(3) * 2.0, np.ones(3, bool), 2.5)
    assert len(receiver) == 6  # the six first images of a simple cubic lattice
    assert np.all(receiver == 0)
    assert np.all(sender == 0)
    assert np.all(np.abs(shift).sum(axis=1) == 1)


def test_single_atom_without_cell_has_no_edge():
    assert count(np.zeros((1, 3)), np.zeros((3, 3)), np.zeros(3, bool), 5.0) == 0
    assert all(len(a) == 0 for a in neighbor_list(np.zeros((1, 3)), np.zeros((3, 3)), np.zeros(3, bool), 5.0))


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [4.0, 0.0, 0.0], [np.nan, 0.0, 1.0]])
def test_a_cell_that_does_not_span_the_periodic_directions_is_an_error(row):
    cell = np.array([[4.0, 0.0, 0.0], [0.0, 4.0, 0.0], row])
    with pytest.raises(InputError, match="periodic directions"):
        neighbor_list(np.zeros((1, 3)), cell, np.ones(3, bool), 3.0)


def packed(structures, cutoff):
    """Return the lists of several structures end to end, as collate makes them."""
    parts, offset = [], 0
    for positions, cell, pbc in structures:
        receiver, sender, shift = neighbor_list(positions, cell, pbc, cutoff)
        parts.append(
            (receiver + offset, sender + offset, shift, positions[sender] - positions[receiver] + shift @ cell)
        )
        offset += len(positions)
    return [np.concatenate(columns) for columns in zip(*parts, strict=True)], offset


def test_padded_layout_and_reverse_on_crystals_with_images():
    rng = np.random.default_rng(3)
    structures = [random_structure(rng, c) for c in ("tiny", "molecule", "triclinic", "tiny", "slab") for _ in range(3)]
    (receiver, sender, shift, vectors), n_atoms = packed(structures, 4.5)
    slots = pad(receiver, sender, shift, vectors, n_atoms, 4.5)
    mask, reverse = slots.neighbor_mask, slots.reverse

    assert len(slots.groups) > 1
    assert sum(n for n, _ in slots.groups) == n_atoms
    assert sum(n * k for n, k in slots.groups) == len(mask)
    assert np.array_equal(slots.row_of_atom[slots.atom_of_row], np.arange(n_atoms))
    widths = np.repeat([k for _, k in slots.groups], [n for n, _ in slots.groups])
    assert np.array_equal(slots.receivers, np.repeat(slots.atom_of_row, widths))
    found = np.argsort(slots.receivers[mask], kind="stable")  # back into the order of the list
    assert np.array_equal(slots.receivers[mask][found], receiver)
    assert np.array_equal(slots.neighbors[mask][found], sender)
    assert np.array_equal(slots.edge_vectors[mask][found], vectors)

    own = np.arange(len(mask))
    assert np.array_equal(reverse[~mask], own[~mask])
    assert np.array_equal(slots.neighbors[~mask], slots.receivers[~mask])
    assert np.allclose(slots.edge_vectors[~mask], [9.0, 0.0, 0.0])

    assert np.array_equal(reverse[reverse], own)  # an involution
    assert np.all(reverse[mask] != own[mask])  # no edge is its own opposite, not even a self-image
    assert np.array_equal(slots.receivers[reverse], slots.neighbors)  # the opposite edge is received by the sender
    # Images of one pair are told apart only by the vector: it must be the exact negative.
    assert np.array_equal(slots.edge_vectors[reverse[mask]], -slots.edge_vectors[mask])
    repeated = len(receiver) - len(np.unique(receiver * n_atoms + sender))
    assert repeated > 100  # the structures do contain several images of a pair


def test_opposites_of_many_atoms_use_the_wide_sort():
    receiver, sender, shift = neighbor_list(np.zeros((1, 3)), np.eye(3) * 2.0, np.ones(3, bool), 5.0)
    far = 2**31  # (2 far)² × codes does not fit 63 bits
    expected = opposite_edges(receiver, sender, shift)
    assert np.array_equal(opposite_edges(receiver + far, sender + far, shift), expected)
    assert np.array_equal(shift[expected], -shift)


def test_no_edges_leaves_one_slot():
    none = np.zeros(0, np.int64)
    slots = pad(none, none, np.zeros((0, 3), int), np.zeros((0, 3)), 2, 5.0)
    assert slots.neighbors.tolist() == slots.reverse.tolist() == [0, 1]
    assert slots.groups == ((2, 1),)
    assert not slots.neighbor_mask.any()
    assert slots.edge_vectors.tolist() == [[10.0, 0, 0], [10.0, 0, 0]]


def fewest_slots(lengths, n_groups):
    """Return the fewest slots of any split into so many groups, by trying all."""
    lengths = np.sort(lengths)[::-1]
    splits = itertools.combinations(range(1, len(lengths)), n_groups - 1)
    return min(sum(int(part[0]) * len(part) for part in np.split(lengths, split)) for split in splits)


@pytest.mark.parametrize("seed", range(8))
def test_groups_need_the_fewest_slots(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, [2, 4, 9, 60][seed % 4], 9)
    groups = row_groups(lengths)
    ordered = np.sort(lengths)[::-1]
    start = 0
    for n, k in groups:
        assert ordered[start] == k
        start += n
    assert start == len(lengths)
    slots = sum(n * k for n, k in groups)
    assert slots == fewest_slots(lengths, len(groups))
    for n_groups in range(1, min(MAX_GROUPS, len(set(lengths.tolist()))) + 1):
        assert slots <= fewest_slots(lengths, n_groups) / WORTH + 1e-9
        if n_groups < len(groups):
            assert slots < WORTH * fewest_slots(lengths, n_groups)


def test_rows_of_one_length_are_one_group_in_the_order_of_the_atoms():
    receiver, sender, shift = neighbor_list(np.zeros((1, 3)), np.eye(3) * 2.0, np.ones(3, bool), 5.0)
    slots = pad(receiver, sender, shift, shift * 2.0, 1, 5.0)
    assert slots.groups == ((1, len(receiver)),)
    assert slots.neighbor_mask.all()
    assert row_groups(np.array([3, 0, 3])) == ((2, 3), (1, 1))
