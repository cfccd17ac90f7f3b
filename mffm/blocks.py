"""A batch for a compiled step: every edge once as a pair, and neighbors in blocks of one width.

A compiler wants few shapes and sums without branches. So an atom's slots are cut into blocks of ``width`` slots, as
many as it needs: all sums over neighbors are sums over a fixed ``width``, then over an atom's few blocks. What depends
on an edge's geometry is the same for both of its directions but for the sign of odd degrees, and is held once a pair.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from mffm.batch import Batch

WIDTHS = (4, 8, 16)
SENDER, PAIR, OPPOSITE, SIGN = range(4)  # columns of ``Blocks.slots``

# Dimensions of the fields that a step reads; "blocks" × width slots. A compiled step holds for any of these sizes.
DIMENSIONS: dict[str, tuple[str | int, ...]] = {
    "atomic_numbers": ("atoms",),
    "neighbors": ("pairs",),
    "receivers": ("pairs",),
    "edge_vectors": ("pairs", 3),
    "system_idx": ("atoms",),
    "fidelity_idx": ("systems",),
    "n_atoms": ("systems",),
    "volume": ("systems",),
    "charge": ("systems",),
    "spin_multiplicity": ("systems",),
    "slots": ("slots", 4),
    "atom_of_block": ("blocks",),
    "blocks_of_atom": ("atoms", "most blocks", 2),
    "slots_of_pair": ("pairs", 2),
    "atoms_of_system": ("systems", "most atoms"),
}


@dataclass(slots=True)
class Blocks(Batch):
    """A batch whose edge list is a half list: ``edge_vectors``, ``receivers`` and ``neighbors`` are [n_pairs].

    Pair 0 stands for all unused slots: a vector (2 * cutoff, 0, 0) from atom 0 to itself. The last block belongs to no
    atom and is all unused. The fields of the padded rows (``reverse``, ``groups``, ``row_of_atom``, ``atom_of_row``,
    ``neighbor_mask``) are empty.

    Attributes:
        width: slots of a block.
        slots: [n_blocks * width, 4] int64: sender, pair, slot of the opposite edge, sign. The sign is 1 where the
            pair's vector points to the sender, -1 where it comes from it, 0 in unused slots, whose opposite is the last
            slot of all. One array, as a compiler takes columns of several for the axis to vectorise.
        atom_of_block: [n_blocks] int64; 0 for the last.
        blocks_of_atom: [n_atoms, most, 2] int64, filled up with the last block; most ≥ 2. Twice the same: an index that
            runs along the summed axis in steps of one would make a compiler vectorise that axis.
        slots_of_pair: [n_pairs, 2] int64, of sign 1 and -1; the last slot twice for pair 0.
        atoms_of_system: [n_systems, most] int64, filled up with 0; most ≥ 2.
    """

    width: int
    slots: Tensor
    atom_of_block: Tensor
    blocks_of_atom: Tensor
    slots_of_pair: Tensor
    atoms_of_system: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """Return the fields of ``DIMENSIONS``."""
        return {name: getattr(self, name) for name in DIMENSIONS}

    def system_sums(self, x: Tensor) -> Tensor:
        """Return sums over the atoms of each system: [n_atoms, ...] → [n_systems, ...]."""
        return _SystemSums.apply(x, self)

    def of_systems(self, x: Tensor) -> Tensor:
        """Return what the system of each atom has: [n_systems, ...] → [n_atoms, ...]."""
        return _OfSystems.apply(x, self)

    def fidelity_sums(self, x: Tensor, n_fidelities: int) -> Tensor:
        """Return sums over the systems of each fidelity: [n_systems] → [n_fidelities]."""
        own = self.fidelity_idx.unsqueeze(1) == torch.arange(n_fidelities, device=x.device)
        return torch.where(own, x.unsqueeze(1), 0.0).sum(0)

    def atom_sums(self, x: Tensor) -> Tensor:
        """Return sums over the blocks of each atom: [n_blocks, ...] → [n_atoms, ...]; the last block holds zeros."""
        n, most, _ = self.blocks_of_atom.shape
        return x.index_select(0, self.blocks_of_atom[:, :, 0].reshape(-1)).view(n, most, *x.shape[1:]).sum(1)


def width_for(avg_neighbors: float) -> int:
    """Return the width with the least work for a mean number of neighbors.

    Rows are taken to have half to one and a half times the mean, and a block to cost as much as four more slots.
    """
    lengths = torch.linspace(0.5 * avg_neighbors, 1.5 * avg_neighbors, 101, dtype=torch.float64)
    return min(WIDTHS, key=lambda width: float((torch.ceil(lengths / width) * (width + 4)).sum()))


def to_blocks(batch: Batch, width: int, cutoff: float) -> Blocks:
    """Return a batch as blocks, on its device; ``cutoff`` in Å."""
    device = batch.neighbors.device

    def count(n: int) -> Tensor:
        return torch.arange(n, device=device)

    used = batch.neighbor_mask.nonzero().squeeze(1)
    used = used[torch.argsort(batch.receivers[used], stable=True)]
    receivers, senders = batch.receivers[used], batch.neighbors[used]
    n_edges, n_atoms = len(used), len(batch.atomic_numbers)
    edge_of_slot = torch.zeros_like(batch.neighbors)
    edge_of_slot[used] = count(n_edges)
    opposite = edge_of_slot[batch.reverse[used]]

    n_neighbors = torch.bincount(receivers, minlength=n_atoms)
    n_blocks = torch.div(n_neighbors + width - 1, width, rounding_mode="floor")
    first_block = n_blocks.cumsum(0) - n_blocks
    slot = first_block[receivers] * width + count(n_edges) - (n_neighbors.cumsum(0) - n_neighbors)[receivers]
    total = int(n_blocks.sum()) + 1
    last_slot = total * width - 1

    forth = (count(n_edges) < opposite).nonzero().squeeze(1)
    back = opposite[forth]
    pairs = count(len(forth)) + 1
    slots = torch.zeros(total * width, 4, dtype=torch.int64, device=device)
    slots[:, OPPOSITE] = last_slot
    slots[slot, SENDER] = senders
    slots[slot, OPPOSITE] = slot[opposite]
    for ends, sign in ((forth, 1), (back, -1)):
        slots[slot[ends], PAIR] = pairs
        slots[slot[ends], SIGN] = sign
    slots_of_pair = torch.full((len(forth) + 1, 2), last_slot, dtype=torch.int64, device=device)
    slots_of_pair[1:] = torch.stack([slot[forth], slot[back]], dim=1)
    nowhere = torch.zeros(1, dtype=torch.int64, device=device)
    far = batch.edge_vectors.new_tensor([[2 * cutoff, 0.0, 0.0]])

    owners = torch.repeat_interleave(count(n_atoms), n_blocks)
    blocks_of_atom = torch.full((n_atoms, max(2, int(n_blocks.max()))), total - 1, dtype=torch.int64, device=device)
    blocks_of_atom[owners, count(total - 1) - first_block[owners]] = count(total - 1)
    first_atom = batch.n_atoms.cumsum(0) - batch.n_atoms
    within = count(max(2, int(batch.n_atoms.max())))
    atoms_of_system = torch.where(within < batch.n_atoms[:, None], first_atom[:, None] + within, 0)

    empty = nowhere[:0]
    own = {f.name: getattr(batch, f.name) for f in fields(Batch)}
    own.update(
        neighbors=torch.cat([nowhere, senders[forth]]),
        receivers=torch.cat([nowhere, receivers[forth]]),
        edge_vectors=torch.cat([far, batch.edge_vectors[used[forth]]]),
        neighbor_mask=empty.bool(), reverse=empty, groups=(), row_of_atom=empty, atom_of_row=empty,
    )  # fmt: skip
    return Blocks(
        **own, width=width, slots=slots, atom_of_block=torch.cat([owners, nowhere]),
        blocks_of_atom=blocks_of_atom.unsqueeze(2).repeat(1, 1, 2), slots_of_pair=slots_of_pair,
        atoms_of_system=atoms_of_system,
    )  # fmt: skip


def pair_sums(x: Tensor, batch: Blocks, sign: int) -> Tensor:
    """Return for each atom the sum over the pairs whose receiver (``sign`` 1) or sender (-1) it is.

    [n_pairs, C] → [n_atoms, C]; pair 0 belongs to none.
    """
    return _PairSums.apply(x, batch, sign)


class _SystemSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Blocks) -> Tensor:
        ctx.batch = batch
        n, most = batch.atoms_of_system.shape
        live = torch.arange(most, device=x.device) < batch.n_atoms.unsqueeze(1)
        gathered = x.index_select(0, batch.atoms_of_system.flatten()).view(n, most, *x.shape[1:])
        return torch.where(live.view(n, most, *[1] * (x.ndim - 1)), gathered, 0.0).sum(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _OfSystems.apply(grad, ctx.batch), None


class _OfSystems(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Blocks) -> Tensor:
        ctx.batch = batch
        return x.index_select(0, batch.system_idx)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _SystemSums.apply(grad, ctx.batch), None


class _PairSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Blocks, sign: int) -> Tensor:
        ctx.batch, ctx.sign = batch, sign
        own = (batch.slots[:, SIGN] == sign).unsqueeze(1)
        slots = torch.where(own, x.index_select(0, batch.slots[:, PAIR]), 0.0)
        return batch.atom_sums(slots.view(-1, batch.width, x.shape[1]).sum(1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _OfPairs.apply(grad, ctx.batch, ctx.sign), None, None


class _OfPairs(torch.autograd.Function):
    """The transpose of ``_PairSums``: [n_atoms, C] → [n_pairs, C], 0 for pair 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Blocks, sign: int) -> Tensor:
        ctx.batch, ctx.sign = batch, sign
        ends = batch.receivers if sign == 1 else batch.neighbors
        real = (torch.arange(ends.shape[0], device=x.device) > 0).unsqueeze(1)
        return torch.where(real, x.index_select(0, ends), 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _PairSums.apply(grad, ctx.batch, ctx.sign), None, None
