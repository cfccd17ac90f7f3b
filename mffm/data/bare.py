"""Batches whose edges are made on the device that trains: every pair of a system is tried, images included.

The host gives what is small: positions wrapped into the cell, and the lattice vectors of the images that an atom may
have within the cutoff. The list and its order of atoms are those of ``mffm.data.neighbors``; the neighbors of one atom
may come in another order. A pair within rounding of the cutoff, where a smooth energy is 0, may be in one list only.

The edges are made on the caller's stream, right before the step: memory never passes between streams.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mffm.batch import Batch
from mffm.data.neighbors import check_cell, row_groups

# Candidates are the (receiver, sender, image) that are tried; the shipped crystals have 14 an edge at 5 Å.
MAX_CANDIDATES = 2**27  # of a batch: a byte each in the mask; beyond it vesin, whose work grows with the edges alone
CHUNK = 2**22  # tried at once, about 70 bytes each


@dataclass(slots=True)
class Bare(Batch):
    """A batch without edges: ``neighbors``, ``receivers``, ``neighbor_mask``, ``edge_vectors``, ``reverse``,
    ``groups``, ``row_of_atom`` and ``atom_of_row`` are empty until ``to`` makes them.

    Attributes:
        cutoff: Å.
        wrapped: [3, n_atoms] float64, Å, positions inside the cell along periodic directions.
        images: [3, n_images] float64, Å, lattice vectors; those of a system lie side by side, image ``k`` of ``m`` is
            minus image ``m - 1 - k``, and the middle one is 0.
        first_image: [n_systems] int64.
        n_images: [n_systems] int64, odd.
        chunks: (first atom, atom after the last, candidates) of what is tried at once.
    """

    cutoff: float
    wrapped: Tensor
    images: Tensor
    first_image: Tensor
    n_images: Tensor
    chunks: tuple[tuple[int, int, int], ...]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the whole batch on a device, where its edges are made."""
        return _with_edges(self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking)))


def outline(
    geometries: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]], cutoff: float
) -> dict[str, Any] | None:
    """Return the fields that a ``Bare`` has beyond a batch, or None where there are more than ``MAX_CANDIDATES``.

    Args:
        geometries: (atomic numbers [n], positions [n, 3], cell [3, 3], pbc [3]) of at least one system.
        cutoff: Å.

    Raises:
        InputError: a cell does not span the periodic directions.
    """
    n_atoms = np.array([len(g[0]) for g in geometries], np.int64)
    positions = np.concatenate([g[1] for g in geometries]).astype(np.float64)
    pbc = np.array([g[3] for g in geometries], bool)
    cells = np.array([g[2] for g in geometries], np.float64)
    for s in np.flatnonzero(pbc.any(1)):
        check_cell(cells[s], pbc[s])
    cells = np.where(pbc[:, :, None], cells, 0.0)
    duals = _duals(cells, pbc)
    # Two wrapped atoms are less than one height apart along a direction, so image S is |S| - 1 heights away at least.
    reach = np.where(pbc, np.floor(cutoff * np.linalg.norm(duals, axis=2) + (1 + 1e-6)), 0).astype(np.int64)
    n_images = (2 * reach + 1).prod(1)
    if (n_atoms**2 * n_images).sum() > MAX_CANDIDATES:
        return None
    system = np.repeat(np.arange(len(n_atoms)), n_atoms)
    turns = np.floor((duals[system] * positions[:, None, :]).sum(2))
    wrapped = positions - (turns[:, :, None] * cells[system]).sum(1)
    images, first_image = _images(cells, reach)
    return {
        "cutoff": float(cutoff),
        "wrapped": torch.from_numpy(np.ascontiguousarray(wrapped.T)),
        "images": torch.from_numpy(images),
        "first_image": torch.from_numpy(first_image),
        "n_images": torch.from_numpy(n_images),
        "chunks": _chunks((n_atoms * n_images)[system]),
    }


def no_edges(dtype: torch.dtype) -> dict[str, Any]:
    """Return the fields of edges, empty."""
    index = ("neighbors", "receivers", "reverse", "row_of_atom", "atom_of_row")
    empty = {name: torch.zeros(0, dtype=torch.int64) for name in index}
    mask, vectors = torch.zeros(0, dtype=torch.bool), torch.zeros((0, 3), dtype=dtype)
    return {**empty, "neighbor_mask": mask, "edge_vectors": vectors, "groups": ()}


def _duals(cells: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Return the dual vectors (rows) of the periodic cell vectors in the space that these span. [n_systems, 3, 3], 1/Å

    Their lengths are one over the heights of the cell.
    """
    duals = np.zeros_like(cells)
    whole, some = pbc.all(1), pbc.any(1) & ~pbc.all(1)
    duals[whole] = np.linalg.inv(cells[whole]).transpose(0, 2, 1)
    duals[some] = np.linalg.pinv(cells[some]).transpose(0, 2, 1)
    return duals


@lru_cache(maxsize=256)
def _grid(reach: tuple[int, int, int]) -> np.ndarray:
    """Return every shift within the reach, the middle one 0. [n_images, 3] float64"""
    axes = np.meshgrid(*(np.arange(-r, r + 1.0) for r in reach), indexing="ij")
    return np.stack([axis.ravel() for axis in axes], 1)


def _images(cells: np.ndarray, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the lattice vectors of all systems, [3, n_images], and the first one of each system, [n_systems].

    Elementwise products: image ``k`` is exactly minus image ``m - 1 - k``, so an edge and its opposite are both within
    the cutoff or both not. A matrix product may round the two differently.
    """
    kinds, kind = np.unique(reach, axis=0, return_inverse=True)
    first, parts, start = np.empty(len(cells), np.int64), [], 0
    for i, limits in enumerate(kinds.tolist()):
        members = np.flatnonzero(kind.reshape(-1) == i)
        grid, own = _grid(tuple(limits)), cells[members]
        vectors = sum(grid[:, a, None] * own[:, None, a] for a in range(3))
        parts.append(vectors.reshape(-1, 3))
        first[members] = start + np.arange(len(members)) * len(grid)
        start += len(members) * len(grid)
    return np.ascontiguousarray(np.concatenate(parts).T), first


def _chunks(sizes: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Return (first atom, atom after the last, candidates) of runs of atoms with up to ``CHUNK`` candidates.

    Args:
        sizes: [n_atoms] int64, candidates of each receiver; one above ``CHUNK`` is a run of its own.
    """
    ends = np.cumsum(sizes)
    chunks, first, done = [], 0, 0
    while first < len(sizes):
        last = max(first + 1, int(np.searchsorted(ends, done + CHUNK, side="right")))
        chunks.append((first, last, int(ends[last - 1]) - done))
        first, done = last, int(ends[last - 1])
    return tuple(chunks)


class _Candidates:
    """Pairs that may be edges, numbered by receiver, then sender, then image of the sender."""

    def __init__(self, bare: Bare):
        system = bare.system_idx
        self.n_images = bare.n_images[system]  # all of these [n_atoms]
        self.first_image = bare.first_image[system]
        self.first_atom = (bare.n_atoms.cumsum(0) - bare.n_atoms)[system]
        self.sizes = bare.n_atoms[system] * self.n_images
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.wrapped, self.images = bare.wrapped, bare.images

    def parts(self, number: Tensor, receiver: Tensor) -> tuple[Tensor, Tensor]:
        """Return sender and image, counted within its system."""
        local, m = number - self.starts[receiver], self.n_images[receiver]
        sender = torch.div(local, m, rounding_mode="floor")
        return self.first_atom[receiver] + sender, local - sender * m

    def component(self, axis: int, receiver: Tensor, sender: Tensor, image: Tensor) -> Tensor:
        """Return x, y or z of r_ij, float64, Å; exactly minus that of the opposite candidate.

        Args:
            image: counted over all systems.
        """
        x = self.wrapped[axis]
        return x[sender] - x[receiver] + self.images[axis][image]

    def within(self, cutoff: float, first: int, last: int, start: int, size: int) -> Tensor:
        """Return which candidates of the receivers first:last are edges. [size] bool"""
        device = self.sizes.device
        atoms = torch.arange(first, last, device=device)
        receiver = torch.repeat_interleave(atoms, self.sizes[first:last], output_size=size)
        sender, image = self.parts(torch.arange(start, start + size, device=device), receiver)
        itself = (sender == receiver) & (2 * image + 1 == self.n_images[receiver])
        image += self.first_image[receiver]
        square = torch.zeros(size, dtype=torch.float64, device=device)
        for axis in range(3):
            square += self.component(axis, receiver, sender, image).square_()
        return (square < cutoff**2) & ~itself

    def opposite(self, receiver: Tensor, sender: Tensor, image: Tensor) -> Tensor:
        """Return the number of the candidate (j, i, -S) of (i, j, S)."""
        m = self.n_images[receiver]
        return self.starts[sender] + (receiver - self.first_atom[receiver]) * m + (m - 1 - image)


def _with_edges(bare: Bare) -> Batch:
    """Return the batch with its edges. The host waits for the device twice: for the list, and for its row lengths."""
    candidates = _Candidates(bare)
    device = bare.system_idx.device
    kept = torch.empty(sum(size for _, _, size in bare.chunks), dtype=torch.bool, device=device)
    start = 0
    for first, last, size in bare.chunks:
        kept[start : start + size] = candidates.within(bare.cutoff, first, last, start, size)
        start += size
    number = kept.nonzero().squeeze(1)
    first_edge = torch.searchsorted(number, candidates.starts)
    n_neighbors = torch.cat([first_edge, first_edge.new_full((1,), len(number))]).diff()
    atoms = torch.arange(len(n_neighbors), device=device)
    receiver = torch.repeat_interleave(atoms, n_neighbors, output_size=len(number))
    sender, image = candidates.parts(number, receiver)
    wanted = candidates.opposite(receiver, sender, image)
    opposite = torch.searchsorted(number, wanted)
    lacking = (number[opposite.clamp(max=len(number) - 1)] != wanted).sum()
    image += candidates.first_image[receiver]
    vectors = torch.stack([candidates.component(axis, receiver, sender, image) for axis in range(3)], 1)
    counts = torch.cat([n_neighbors, lacking[None]]).cpu().numpy()
    assert counts[-1] == 0, "an edge without its opposite"
    groups = row_groups(counts[:-1])
    vectors = vectors.to(bare.edge_vectors.dtype)
    edges = _padded(receiver, sender, vectors, opposite, n_neighbors, groups, bare.cutoff)
    return Batch(**{f.name: getattr(bare, f.name) for f in fields(Batch)} | edges)


def _padded(
    receiver: Tensor,
    sender: Tensor,
    vectors: Tensor,
    opposite: Tensor,
    n_neighbors: Tensor,
    groups: tuple[tuple[int, int], ...],
    cutoff: float,
) -> dict[str, Any]:
    """Return a batch's fields of edges: the rows that ``mffm.data.neighbors.pad`` gives.

    The host keeps numpy's: with this one ``pack`` took 6 to 11 % longer on crystals, up to 33 % on molecules.

    Args:
        receiver, sender: [n_edges] int64, sorted by receiver.
        vectors: [n_edges, 3], Å.
        opposite: [n_edges] int64, index of the opposite edge.
        n_neighbors: [n_atoms] int64.
        groups: (n_rows, K) of each group of rows.
        cutoff: Å.
    """
    device, n_edges = receiver.device, len(receiver)
    atoms = torch.arange(len(n_neighbors), device=device)
    atom_of_row = torch.argsort(-n_neighbors, stable=True) if len(groups) > 1 else atoms
    row_of_atom = torch.empty_like(atoms).index_copy_(0, atom_of_row, atoms)
    widths = torch.cat([torch.full((n,), k, device=device) for n, k in groups])
    n_slots = sum(n * k for n, k in groups)
    first_slot = (widths.cumsum(0) - widths)[row_of_atom]
    first_edge = n_neighbors.cumsum(0) - n_neighbors
    slot = torch.arange(n_edges, device=device) + (first_slot - first_edge)[receiver]

    receivers = torch.repeat_interleave(atom_of_row, widths, output_size=n_slots)
    edge_vectors = vectors.new_zeros((n_slots, 3))
    edge_vectors[:, 0] = 2 * cutoff
    return {
        "neighbors": receivers.index_copy(0, slot, sender),
        "receivers": receivers,
        "neighbor_mask": torch.zeros(n_slots, dtype=torch.bool, device=device).index_fill_(0, slot, True),
        "edge_vectors": edge_vectors.index_copy_(0, slot, vectors),
        "reverse": torch.arange(n_slots, device=device).index_copy_(0, slot, slot[opposite]),
        "groups": groups,
        "row_of_atom": row_of_atom,
        "atom_of_row": atom_of_row,
    }
