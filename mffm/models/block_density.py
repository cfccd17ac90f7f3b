"""The density over blocks (see ``mffm.blocks``), as loops for a compiler to fuse.

The same three sums as in ``density_sum``, value, gradient and its gradient, without chunks and without matrix products:
each is a few elementwise expressions over [n_blocks, width, a, c] with a sum over one axis, which a compiler turns into
loops that keep the running sums in registers. Only what the senders receive is stored for each slot. Run eagerly it is
right, and slow.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mffm.blocks import OPPOSITE, PAIR, SENDER, SIGN, Blocks


def block_density(h: Tensor, radial: Tensor, harmonics: Tensor, batch: Blocks) -> Tensor:
    """Return the density [n_atoms, (lmax + 1)^2, width].

    Differentiable twice.

    Args:
        h: [n_atoms, width], features of the senders; width = a × c with c running fastest.
        radial: [n_pairs, lmax + 1, c]; 0 for pair 0.
        harmonics: [n_pairs, (lmax + 1)^2].
    """
    return _Density.apply(h, radial, harmonics, batch)


def stored(x: Tensor) -> Tensor:
    """Return x; a compiler keeps it in memory and does not compute it again in each loop that reads it."""
    x = x.contiguous()
    return x.as_strided(x.shape, x.stride())


class _Slots:
    """What the sums share: the arrays of slots, [n_blocks, width, a, c] or broadcast to it, and the sums back."""

    def __init__(self, batch: Blocks, n_degrees: int, channels: int):
        self.batch, self.channels = batch, channels
        self.orders = [range(degree**2, (degree + 1) ** 2) for degree in range(n_degrees)]
        self.sign = batch.slots[:, SIGN]

    def sent(self, h: Tensor) -> Tensor:
        rows = stored(h).index_select(0, self.batch.slots[:, SENDER])
        return rows.view(self.batch.atom_of_block.shape[0], self.batch.width, -1, self.channels)

    def radial(self, radial: Tensor) -> tuple[Tensor, ...]:
        """Return the radial functions of each degree."""
        rows = stored(radial).index_select(0, self.batch.slots[:, PAIR])
        return rows.view(-1, self.batch.width, radial.shape[1], 1, self.channels).unbind(2)

    def harmonics(self, harmonics: Tensor) -> tuple[Tensor, ...]:
        """Return each harmonic; those of odd degree change sign with the direction."""
        rows = stored(harmonics).index_select(0, self.batch.slots[:, PAIR])
        sign = self.sign.to(rows.dtype).unsqueeze(1)
        degrees = rows.split([len(ms) for ms in self.orders], dim=1)
        signed = stored(torch.cat([y * sign if degree % 2 else y for degree, y in enumerate(degrees)], dim=1))
        return signed.view(-1, self.batch.width, harmonics.shape[1], 1, 1).unbind(2)

    def received(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the rows of x [n_atoms, (lmax + 1)^2, width] of the receivers, for each harmonic."""
        rows = stored(x).index_select(0, self.batch.atom_of_block)
        return rows.view(rows.shape[0], 1, x.shape[1], -1, self.channels).unbind(2)

    def to_atoms(self, parts: Sequence[Tensor]) -> Tensor:
        """[n_blocks, a, c] for each harmonic → [n_atoms, (lmax + 1)^2, width]."""
        return self.batch.atom_sums(torch.stack(list(parts), 1)).flatten(2)

    def to_senders(self, x: Tensor) -> Tensor:
        """[n_blocks, width, a, c] → [n_atoms, width]: over the slots whose sender an atom is."""
        rows = stored(x).flatten(0, 1).index_select(0, self.batch.slots[:, OPPOSITE]).view_as(x)
        return self.batch.atom_sums(rows.sum(1)).flatten(1)

    def to_pairs(self, x: Tensor) -> Tensor:
        """[n_slots, ...] → [n_pairs, ...]: both directions of a pair."""
        forth, back = self.batch.slots_of_pair.unbind(1)
        return x.index_select(0, forth) + x.index_select(0, back)

    def radial_to_pairs(self, parts: Sequence[Tensor]) -> Tensor:
        """[n_blocks, width, c] for each degree → [n_pairs, lmax + 1, c]."""
        return self.to_pairs(torch.stack(list(parts), 2).flatten(0, 1))

    def harmonics_to_pairs(self, parts: Sequence[Tensor]) -> Tensor:
        """[n_blocks, width] for each harmonic → [n_pairs, (lmax + 1)^2]."""
        sign = self.sign.to(parts[0].dtype).view_as(parts[0])
        columns = [parts[m] * sign if degree % 2 else parts[m] for degree, ms in enumerate(self.orders) for m in ms]
        return self.to_pairs(torch.stack(columns, 2).flatten(0, 1))


def _sum(terms: list[Tensor]) -> Tensor:
    return reduce(add, terms)


class _Density(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, radial: Tensor, harmonics: Tensor, batch: Blocks) -> Tensor:
        ctx.save_for_backward(h, radial, harmonics)
        ctx.batch = batch
        s = _Slots(batch, *radial.shape[1:])
        sent, r, y = s.sent(h), s.radial(radial), s.harmonics(harmonics)
        return s.to_atoms([(r[degree] * sent * y[m]).sum(1) for degree, ms in enumerate(s.orders) for m in ms])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        return *_DensityGradient.apply(*ctx.saved_tensors, grad, ctx.batch), None


class _DensityGradient(torch.autograd.Function):
    """(h, R, Y, g) → the gradients of <A, g> by h, R and Y."""

    @staticmethod
    def forward(
        ctx: Any, h: Tensor, radial: Tensor, harmonics: Tensor, grad: Tensor, batch: Blocks
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(h, radial, harmonics, grad)
        ctx.batch = batch
        s = _Slots(batch, *radial.shape[1:])
        sent, r, y, g = s.sent(h), s.radial(radial), s.harmonics(harmonics), s.received(grad)
        to_sent, for_radial, for_harmonics = [], [], []
        for degree, ms in enumerate(s.orders):
            pulled = _sum([y[m] * g[m] for m in ms])
            to_sent.append(r[degree] * pulled)
            for_radial.append((pulled * sent).sum(2))
            message = r[degree] * sent
            for_harmonics += [(message * g[m]).sum((2, 3)) for m in ms]
        return s.to_senders(_sum(to_sent)), s.radial_to_pairs(for_radial), s.harmonics_to_pairs(for_harmonics)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, u_h: Tensor, u_radial: Tensor, u_harmonics: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        """The gradients of S = <u_h, ∂h> + <u_R, ∂R> + <u_Y, ∂Y>, as in ``density_sum``."""
        h, radial, harmonics, grad = ctx.saved_tensors
        s = _Slots(ctx.batch, *radial.shape[1:])
        sent, r, y, g = s.sent(h), s.radial(radial), s.harmonics(harmonics), s.received(grad)
        u_sent, u_r, u_y = s.sent(u_h), s.radial(u_radial), s.harmonics(u_harmonics)
        to_sent, for_radial, for_harmonics, for_g = [], [], [], []
        for degree, ms in enumerate(s.orders):
            message, change = r[degree] * sent, u_r[degree] * sent + r[degree] * u_sent
            for_g += [(y[m] * change + u_y[m] * message).sum(1) for m in ms]
            for_harmonics += [(change * g[m]).sum((2, 3)) for m in ms]
            pulled, u_pulled = _sum([y[m] * g[m] for m in ms]), _sum([u_y[m] * g[m] for m in ms])
            for_radial.append((pulled * u_sent + u_pulled * sent).sum(2))
            to_sent.append(u_r[degree] * pulled + r[degree] * u_pulled)
        return (
            s.to_senders(_sum(to_sent)),
            s.radial_to_pairs(for_radial),
            s.harmonics_to_pairs(for_harmonics),
            s.to_atoms(for_g),
            None,
        )
