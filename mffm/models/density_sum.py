"""The density: the sum over an atom's edges of harmonics × radial functions × the sender's features.

    A_i[lm, a, c] = Σ_s Y_s[lm] R_s[l, c] h_j(s)[a, c]

It is linear in each of Y, R and h, so value, gradient and the gradient of the gradient (what a training step with
forces needs) are written out here. They run over chunks of rows: messages, the largest arrays of the network, live in
the cache and are never stored; the autograd graph keeps Y, R and h and nothing else of an edge.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mffm.batch import Batch
from mffm.blocks import Blocks
from mffm.edges import Edges
from mffm.models.block_density import block_density
from mffm.models.contraction import sum_over_sent
from mffm.models.edge_density import edge_density

CHUNK_BYTES = 2 << 20  # of one degree's messages: they and their few companions stay in the cache


def density_sum(h: Tensor, radial: Tensor, harmonics: Tensor, batch: Batch) -> Tensor:
    """Return the density [n_atoms, (lmax + 1)^2, width].

    Differentiable twice.

    Args:
        h: [n_atoms, width], features of the senders; width = a × c with c running fastest.
        radial: [n_slots, lmax + 1, c].
        harmonics: [n_slots, (lmax + 1)^2].
        batch: where it is blocks, radial and harmonics are [n_pairs, ...]; where it is a plain list, [n_edges, ...].
    """
    if isinstance(batch, Edges):
        return edge_density(h, radial, harmonics, batch)
    if isinstance(batch, Blocks):
        return block_density(h, radial, harmonics, batch)
    return _Density.apply(h, radial, harmonics, batch)


class _Chunk(NamedTuple):
    """Some rows of a group and their slots."""

    rows: slice
    slots: slice
    shape: tuple[int, int]  # n_rows, K


def _chunks(batch: Batch, width: int, element_size: int, on_cpu: bool) -> Iterator[_Chunk]:
    row = slot = 0
    for n, k in batch.groups:
        most = max(1, CHUNK_BYTES // (k * width * element_size)) if on_cpu else n
        for first in range(0, n, most):
            m = min(most, n - first)
            yield _Chunk(slice(row, row + m), slice(slot, slot + m * k), (m, k))
            row, slot = row + m, slot + m * k


class _Edges:
    """What the three sums share: the chunks, and the chunk's arrays by degree."""

    def __init__(self, h: Tensor, radial: Tensor, harmonics: Tensor, batch: Batch):
        self.h, self.radial, self.harmonics, self.batch = h, radial, harmonics, batch
        self.n_atoms, self.width = h.shape
        self.n_degrees, self.channels = radial.shape[1:]
        self.orders = [slice(degree**2, (degree + 1) ** 2) for degree in range(self.n_degrees)]

    def chunks(self) -> Iterator[_Chunk]:
        return _chunks(self.batch, self.width, self.h.element_size(), self.h.device.type == "cpu")

    def sent(self, x: Tensor, chunk: _Chunk) -> Tensor:
        """Return the senders' rows of x [n_atoms, width] as [slots, a, c]."""
        return x.index_select(0, self.batch.neighbors[chunk.slots]).view(-1, self.width // self.channels, self.channels)

    def radial_of(self, x: Tensor, chunk: _Chunk, degree: int) -> Tensor:
        """Return one degree of a radial array, [slots, 1, c]."""
        return x[chunk.slots, degree].unsqueeze(1)

    def orders_of(self, x: Tensor, chunk: _Chunk, degree: int) -> Tensor:
        """Return one degree of an array of harmonics, [rows, K, 2l + 1]."""
        return x[chunk.slots, self.orders[degree]].view(*chunk.shape, -1)

    def to_rows(self, x: Tensor) -> Tensor:
        return x if len(self.batch.groups) == 1 else x.index_select(0, self.batch.atom_of_row)

    def to_atoms(self, x: Tensor) -> Tensor:
        return x if len(self.batch.groups) == 1 else x.index_select(0, self.batch.row_of_atom)


class _Density(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, radial: Tensor, harmonics: Tensor, batch: Batch) -> Tensor:
        ctx.save_for_backward(h, radial, harmonics)
        ctx.batch = batch
        e = _Edges(h, radial, harmonics, batch)
        out = h.new_empty(e.n_atoms, harmonics.shape[1], e.width)
        for chunk in e.chunks():
            sent = e.sent(h, chunk)
            for degree, orders in enumerate(e.orders):
                message = (e.radial_of(radial, chunk, degree) * sent).view(*chunk.shape, e.width)
                out[chunk.rows, orders] = e.orders_of(harmonics, chunk, degree).transpose(1, 2) @ message
        return e.to_atoms(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *_DensityGradient.apply(*ctx.saved_tensors, grad, ctx.batch), None


class _DensityGradient(torch.autograd.Function):
    """(h, R, Y, g) → the gradients of <A, g> by h, R and Y."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, radial: Tensor, harmonics: Tensor, grad: Tensor, batch: Batch
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(h, radial, harmonics, grad)
        ctx.batch = batch
        e = _Edges(h, radial, harmonics, batch)
        g = e.to_rows(grad)
        for_sent = h.new_empty(len(radial), e.width)
        for_radial, for_harmonics = torch.empty_like(radial), torch.empty_like(harmonics)
        for chunk in e.chunks():
            sent = e.sent(h, chunk)
            to_sent = for_sent[chunk.slots].view_as(sent)
            for degree, orders in enumerate(e.orders):
                r, outer = e.radial_of(radial, chunk, degree), g[chunk.rows, orders]
                message = (r * sent).view(*chunk.shape, e.width)
                for_harmonics[chunk.slots, orders] = (message @ outer.transpose(1, 2)).flatten(0, 1)
                pulled = (e.orders_of(harmonics, chunk, degree) @ outer).view_as(sent)
                for_radial[chunk.slots, degree] = (pulled * sent).sum(1)
                if degree == 0:
                    torch.mul(r, pulled, out=to_sent)
                else:
                    to_sent.addcmul_(r, pulled)
        return sum_over_sent(for_sent, batch), for_radial, for_harmonics

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, u_h: Tensor, u_radial: Tensor, u_harmonics: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """The gradients of S = <u_h, ∂h> + <u_R, ∂R> + <u_Y, ∂Y>.

        With the message's change N = u_R h + R u_h, S = Σ Y <g, N> + u_Y <g, M>.
        """
        h, radial, harmonics, grad = ctx.saved_tensors
        e = _Edges(h, radial, harmonics, ctx.batch)
        g = e.to_rows(grad)
        for_g = torch.empty_like(g)
        for_sent = h.new_empty(len(radial), e.width)
        for_radial, for_harmonics = torch.empty_like(radial), torch.empty_like(harmonics)
        for chunk in e.chunks():
            sent, u_sent = e.sent(h, chunk), e.sent(u_h, chunk)
            to_sent = for_sent[chunk.slots].view_as(sent)
            for degree, orders in enumerate(e.orders):
                r, u_r, outer = (
                    e.radial_of(radial, chunk, degree),
                    e.radial_of(u_radial, chunk, degree),
                    g[chunk.rows, orders],
                )
                y, u_y = e.orders_of(harmonics, chunk, degree), e.orders_of(u_harmonics, chunk, degree)
                message = (r * sent).view(*chunk.shape, e.width)
                change = (u_r * sent).addcmul_(r, u_sent).view(*chunk.shape, e.width)
                for_g[chunk.rows, orders] = torch.baddbmm(y.transpose(1, 2) @ change, u_y.transpose(1, 2), message)
                for_harmonics[chunk.slots, orders] = (change @ outer.transpose(1, 2)).flatten(0, 1)
                pulled, u_pulled = (y @ outer).view_as(sent), (u_y @ outer).view_as(sent)
                for_radial[chunk.slots, degree] = (pulled * u_sent).addcmul_(u_pulled, sent).sum(1)
                if degree == 0:
                    torch.mul(u_r, pulled, out=to_sent)
                else:
                    to_sent.addcmul_(u_r, pulled)
                to_sent.addcmul_(r, u_pulled)
        return sum_over_sent(for_sent, ctx.batch), for_radial, for_harmonics, e.to_atoms(for_g), None
