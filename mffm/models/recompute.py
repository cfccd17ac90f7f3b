"""Activation checkpointing that survives a double backward: a part of a network keeps its inputs alone.

``torch.utils.checkpoint`` recomputes once: what it recomputes inside of the force pass (a backward with
``create_graph``) stays alive until the loss's backward, so that a training step's peak holds all activations again.
Here the force pass is a function of its own that keeps its inputs alone too, and both are computed once more when the
loss is differentiated. The price is about two more forwards and one more backward of the part.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Part = Callable[..., tuple[Tensor, ...]]


def recomputed(part: Part, geometric: Sequence[Tensor], others: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Return ``part(*geometric, *others)``, of which the autograd graph keeps only the arguments.

    Args:
        part: a function of its arguments alone, without randomness.
        geometric: what depends on positions. A backward with ``create_graph`` gives gradients for these alone: it is
            the force pass, which needs none for weights.
        others: weights, and what depends on no position.
    """
    return _Recomputed.apply(part, len(geometric), *geometric, *others)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Part, n_geometric: int, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        ctx.part, ctx.n_geometric = part, n_geometric
        ctx.save_for_backward(*arguments)
        ctx.set_materialize_grads(False)
        return part(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        is_force_pass = torch.is_grad_enabled()
        wanted = [
            needed and not (is_force_pass and i >= ctx.n_geometric) for i, needed in enumerate(ctx.needs_input_grad[2:])
        ]
        arguments = ctx.saved_tensors
        return None, None, *_Gradient.apply(ctx.part, wanted, len(arguments), *arguments, *gradients)


class _Gradient(torch.autograd.Function):
    """The gradient of a part by its arguments, as a function of arguments and output gradients."""

    @staticmethod
    def forward(
        ctx: Any, part: Part, wanted: list[bool], n_arguments: int, *inputs: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        ctx.part, ctx.wanted, ctx.n_arguments = part, wanted, n_arguments
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        with torch.enable_grad():
            arguments = _leaves(inputs[:n_arguments], wanted)
            return _gradients(part, arguments, wanted, inputs[n_arguments:], create_graph=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *second: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[3:]
        with torch.enable_grad():
            leaves = _leaves(inputs, needed)
            arguments, outer = leaves[: ctx.n_arguments], leaves[ctx.n_arguments :]
            asked = [want and grad is not None for want, grad in zip(ctx.wanted, second, strict=True)]
            first = _gradients(ctx.part, arguments, asked, outer, create_graph=True)
            pairs = [
                (value, grad)
                for value, grad in zip(first, second, strict=True)
                if value is not None and grad is not None and value.requires_grad
            ]
            sources = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
            found = iter(
                torch.autograd.grad([v for v, _ in pairs], sources, [g for _, g in pairs], allow_unused=True)
                if pairs
                else [None] * len(sources)
            )
        return None, None, None, *(next(found) if need else None for need in needed)


def _leaves(tensors: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)]


def _gradients(
    part: Part,
    arguments: Sequence[Tensor | None],
    wanted: Sequence[bool],
    outer: Sequence[Tensor | None],
    create_graph: bool,
) -> tuple[Tensor | None, ...]:
    """Return the gradients by the wanted arguments, None for the others and for what the outputs do not depend on."""
    outputs = part(*arguments)
    pairs = [(y, g) for y, g in zip(outputs, outer, strict=True) if g is not None and y.requires_grad]
    sources = [a for a, want in zip(arguments, wanted, strict=True) if want and a is not None]
    if not pairs or not sources:
        return (None,) * len(arguments)
    values = torch.autograd.grad(
        [y for y, _ in pairs], sources, [g for _, g in pairs], create_graph=create_graph, allow_unused=True
    )
    found = iter(values)
    return tuple(next(found) if want else None for want in wanted)
