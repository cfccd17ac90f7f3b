"""Couplings of features by degree as one loop over atoms and channels, for a compiler: no array of pairs, no zeros.

Tensors of coupling coefficients are 97 % zeros at lmax 3. Here the entries that are not 0 are arguments of an
operation, ``mffm::couple``, of which ``mffm.training.lowering`` makes one loop with all its sums written out in its
body. Features come and go as linear maps have them, so that nothing is packed or transposed. Run eagerly it is right,
and slow: ``contraction`` is for that.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

# (M, P) of each tensor [M, N, P * C] of some features: a row is one of its M × P arrays [N, C].
Parts = Sequence[tuple[int, int]]


def places(parts: Parts) -> list[tuple[int, int, int]]:
    """Return (tensor, m, p) of every row: tensor by tensor, then m, then p."""
    return [(i, m, p) for i, (n_m, n_p) in enumerate(parts) for m, p in product(range(n_m), range(n_p))]


def pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _rows(tensors: Sequence[Tensor], channels: int) -> list[Tensor]:
    parts = [(t.shape[0], t.shape[2] // channels) for t in tensors]
    return [tensors[i][m, :, p * channels : (p + 1) * channels] for i, m, p in places(parts)]


def _split(flat: Tensor, parts: Parts, n_atoms: int, channels: int) -> list[Tensor]:
    pieces = flat.split([m * p * n_atoms * channels for m, p in parts])
    return [piece.view(m, n_atoms, p * channels) for piece, (m, p) in zip(pieces, parts, strict=True)]


@torch.library.custom_op("mffm::couple", mutates_args=())
def couple(
    x: list[Tensor], y: list[Tensor], channels: int, out: list[int], o: list[int], a: list[int], b: list[int],
    values: list[float],
) -> Tensor:  # fmt: skip
    """Return z[o] = Σ T[o, a, b] x[a] y[b], or Σ T[o, a] x[a] where there is no ``y``: its tensors, flat, end to end.

    Args:
        x, y: tensors [M, N, P * channels].
        out: M, P of each tensor of z.
        o, a, b, values: the entries of T, by rows as in ``places``; without ``y``, b is 0.
    """
    parts, n_atoms = pairs(out), x[0].shape[1]
    flat = x[0].new_zeros(sum(m * p for m, p in parts) * n_atoms * channels)
    rows = _rows(_split(flat, parts, n_atoms, channels), channels)
    rows_x, rows_y = _rows(x, channels), _rows(y, channels)
    for row, i, j, value in zip(o, a, b, values, strict=True):
        rows[row] += value * (rows_x[i] * rows_y[j] if y else rows_x[i])
    return flat


@couple.register_fake
def _(
    x: list[Tensor], y: list[Tensor], channels: int, out: list[int], o: list[int], a: list[int], b: list[int],
    values: list[float],
) -> Tensor:  # fmt: skip
    return x[0].new_empty(sum(m * p for m, p in pairs(out)) * x[0].shape[1] * channels)


class Couplings:
    """z[o] = Σ_ab T[o, a, b] x[a] y[b], channel by channel; differentiable any number of times.

    Args:
        tensor: T [O, A, B]; [O, A, 1] for a map of x alone.
        out, first, second: the parts of z, x and y; ``second`` is empty for a map of x alone.
    """

    def __init__(self, tensor: np.ndarray, out: Parts, first: Parts, second: Parts = ()):
        self._tensor, self._parts = tensor, (out, first, second)
        o, a, b = np.nonzero(tensor)
        self._entries = o.tolist(), a.tolist(), b.tolist(), tensor[o, a, b].tolist()
        self._derivatives: dict[int, Couplings] = {}

    def derivative(self, axis: int) -> "Couplings":
        """Return (grad z, y) → grad x (axis 1), or (grad z, x) → grad y (axis 2)."""
        if axis not in self._derivatives:
            order = (axis, 0, 3 - axis)
            self._derivatives[axis] = Couplings(self._tensor.transpose(order), *(self._parts[i] for i in order))
        return self._derivatives[axis]

    def gradients(
        self, grads: Sequence[Tensor], x: Sequence[Tensor], y: Sequence[Tensor], wanted: tuple[bool, bool]
    ) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        """Return the gradients by x and by y, where they are wanted."""
        for_x = self.derivative(1)(grads, y) if wanted[0] else None
        return for_x, self.derivative(2)(grads, x) if wanted[1] else None

    def evaluate(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
        out, first, _ = self._parts
        channels = x[0].shape[2] // first[0][1]
        flat = couple(list(x), list(y), channels, [n for part in out for n in part], *self._entries)
        return _split(flat, out, x[0].shape[1], channels)

    def __call__(self, x: Sequence[Tensor], y: Sequence[Tensor] = ()) -> list[Tensor]:
        """Return the tensors of z, for those of x and y."""
        return list(_Couple.apply(self, len(x), *x, *y))


class SquareCouplings(Couplings):
    """z[o] = Σ_ab T[o, a, b] x[a] x[b]: a pair and its mirror image are evaluated once."""

    def __init__(self, tensor: np.ndarray, out: Parts, first: Parts):
        both = tensor + tensor.transpose(0, 2, 1)
        upper = np.triu(np.ones(tensor.shape[1:]), 1) + 0.5 * np.eye(tensor.shape[1])
        super().__init__(both * upper, out, first)
        self._gradient = Couplings(both.transpose(1, 0, 2), first, out, first)

    def gradients(
        self, grads: Sequence[Tensor], x: Sequence[Tensor], y: Sequence[Tensor], wanted: tuple[bool, bool]
    ) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        return self._gradient(grads, x), None

    def evaluate(self, x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
        return super().evaluate(x, x)


class _Couple(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, couplings: Couplings, n_first: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.couplings, ctx.n_first = couplings, n_first
        return tuple(couplings.evaluate(tensors[:n_first], tensors[n_first:]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        n, tensors, needed = ctx.n_first, ctx.saved_tensors, ctx.needs_input_grad[2:]
        x, y = tensors[:n], tensors[n:]
        for_x, for_y = ctx.couplings.gradients(grads, x, y, (any(needed[:n]), any(needed[n:])))
        return None, None, *(for_x or [None] * len(x)), *(for_y or [None] * len(y))
