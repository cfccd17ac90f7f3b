"""Operations that are their own family of derivatives: gathers over a full neighbor list, channelwise products.

Each is an ``autograd.Function`` whose backward is built of the same Functions, so that any order of derivative exists
and none needs an ``index_add``: results do not depend on the order of atomics.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mffm.batch import Batch
from mffm.blocks import Blocks, pair_sums
from mffm.edges import Edges
from mffm.models.angular import Constant


class _Gather(torch.autograd.Function):
    """[n_atoms, C] → [n_slots, C]: the row of each slot's sender."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return x.index_select(0, batch.neighbors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _ReverseSum.apply(grad, ctx.batch), None


class _ReverseSum(torch.autograd.Function):
    """[n_slots, C] → [n_atoms, C]: the sum over the slots whose sender is the atom; the transpose of ``_Gather``.

    The slots in which atom j is the sender are the partners of j's own slots. Unused slots are their own partner and
    their own sender, so the two are exact transposes with the padding included.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return _row_sums(x.index_select(0, batch.reverse), batch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Gather.apply(grad, ctx.batch), None


class _Sum(torch.autograd.Function):
    """[n_slots, C] → [n_atoms, C]: the sum over the slots whose receiver is the atom."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return _row_sums(x, batch)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(grad, ctx.batch), None


class _Spread(torch.autograd.Function):
    """[n_atoms, C] → [n_slots, C]: the row of each slot's receiver; the transpose of ``_Sum``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, batch: Batch) -> Tensor:
        ctx.batch = batch
        return x.index_select(0, batch.receivers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Sum.apply(grad, ctx.batch), None


def _row_sums(x: Tensor, batch: Batch) -> Tensor:
    parts = x.split([n * k for n, k in batch.groups])
    rows = torch.cat([part.view(n, k, -1).sum(1) for part, (n, k) in zip(parts, batch.groups, strict=True)])
    return rows if len(batch.groups) == 1 else rows.index_select(0, batch.row_of_atom)


def sum_over_sent(x: Tensor, batch: Batch) -> Tensor:
    """Return for each atom the sum over the slots whose sender it is: [n_slots, C] → [n_atoms, C].

    Unused slots of an atom count as its own. Of blocks: over the pairs, [n_pairs, C], whose sender it is.
    """
    if isinstance(batch, Blocks):
        return pair_sums(x, batch, -1)
    return _ReverseSum.apply(x, batch)


def sum_over_received(x: Tensor, batch: Batch) -> Tensor:
    """Return for each atom the sum over its own slots, unused ones included: [n_slots, C] → [n_atoms, C].

    Of blocks: over the pairs, [n_pairs, C], whose receiver it is.
    """
    if isinstance(batch, Blocks):
        return pair_sums(x, batch, 1)
    if isinstance(batch, Edges):
        return batch.atom_sums(x, batch.receivers)
    return _Sum.apply(x, batch)


class Bilinear:
    """z[o] = Σ_ab T[o, a, b] x[a] y[b] for x [A, N, C] and y [B, N, C], channel by channel: z is [O, N, C].

    Evaluated as the products of the pairs (a, b) that T needs, then one matrix product. The derivatives are the same
    kind of product with the axes of T permuted.
    """

    def __init__(self, tensor: np.ndarray):
        self._tensor = tensor
        a, b = np.nonzero(np.abs(tensor).max(axis=0) > 0)
        self._a, self._b = Constant(a), Constant(b)
        self._matrix = Constant(np.ascontiguousarray(tensor[:, a, b]))
        self._derivatives: tuple[Bilinear, Bilinear] | None = None

    def derivatives(self) -> tuple["Bilinear", "Bilinear"]:
        """Return the products (grad z, y) → grad x and (grad z, x) → grad y."""
        if self._derivatives is None:
            self._derivatives = Bilinear(self._tensor.transpose(1, 0, 2)), Bilinear(self._tensor.transpose(2, 0, 1))
        return self._derivatives

    def evaluate(self, x: Tensor, y: Tensor) -> Tensor:
        pairs = x.index_select(0, self._a.like(x)) * y.index_select(0, self._b.like(x))
        return (self._matrix.like(x) @ pairs.flatten(1)).view(-1, *x.shape[1:])

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return _BilinearFunction.apply(x, y, self)


class Square(Bilinear):
    """z[o] = Σ_ab T[o, a, b] x[a] x[b]: a pair and its mirror image are evaluated once."""

    def __init__(self, tensor: np.ndarray):
        both = tensor + tensor.transpose(0, 2, 1)
        upper = np.triu(np.ones(tensor.shape[1:]), 1) + 0.5 * np.eye(tensor.shape[1])
        super().__init__(both * upper)
        self._gradient = Bilinear(both.transpose(1, 0, 2))

    def gradient(self) -> Bilinear:
        """Return the product (grad z, x) → grad x."""
        return self._gradient

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        assert y is None, "a square has one factor"
        return _SquareFunction.apply(x, self)


class _BilinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, product: Bilinear) -> Tensor:
        ctx.save_for_backward(x, y)
        ctx.product = product
        return product.evaluate(x, y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, y = ctx.saved_tensors
        for_x, for_y = ctx.product.derivatives()
        grad_x = for_x(grad, y) if ctx.needs_input_grad[0] else None
        grad_y = for_y(grad, x) if ctx.needs_input_grad[1] else None
        return grad_x, grad_y, None


class _SquareFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Square) -> Tensor:
        ctx.save_for_backward(x)
        ctx.product = product
        return product.evaluate(x, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return ctx.product.gradient()(grad, x), None
