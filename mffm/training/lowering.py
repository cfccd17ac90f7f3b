"""How Inductor compiles ``mffm::couple``: one loop over atoms and channels with all sums written out in its body."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V, ops

from mffm.models.couple import Parts, pairs, places


def register() -> None:
    """Make it known to Inductor; once or more often."""
    register_lowering(torch.ops.mffm.couple.default, type_promotion_kind=None)(_couple)


class _Rows(ir.Pointwise):
    """A loop whose ``inner_fn`` gives (place in a flat buffer, value) of several rows at an index, all to be stored."""

    def store_output(self, output_name: str | None, indexer: Callable[..., Any], vars: Sequence[Any]) -> None:
        for place, value in self.inner_fn(vars):
            ops.store(output_name or "unnamed", indexer([place]), value)


def _couple(
    x: list[Any], y: list[Any], channels: int, out: list[int], o: list[int], a: list[int], b: list[int],
    values: list[float],
) -> Any:  # fmt: skip
    device, dtype, n_atoms = x[0].get_device(), x[0].get_dtype(), x[0].get_size()[1]
    load_x, load_y, parts = _loader(x, channels), _loader(y, channels), pairs(out)
    n_rows = sum(m * p for m, p in parts)

    def rows(index: Sequence[Any]) -> list[tuple[Any, Any]]:
        of_x, of_y = cache(lambda row: load_x(row, *index)), cache(lambda row: load_y(row, *index))
        term = cache(lambda i, j: ops.mul(of_x(i), of_y(j)) if y else of_x(i))
        constant = cache(lambda value: ops.constant(value, dtype))
        totals: list[Any] = [None] * n_rows
        for row, i, j, value in zip(o, a, b, values, strict=True):
            scaled = ops.mul(term(i, j), constant(round(value, 12)))  # what differs by rounding is one constant
            totals[row] = scaled if totals[row] is None else ops.add(totals[row], scaled)
        found = [constant(0.0) if total is None else total for total in totals]
        return list(zip(_flat(parts, n_atoms, channels, *index), found, strict=True))

    loop = _Rows(device=device, dtype=dtype, inner_fn=rows, ranges=[n_atoms, channels])
    layout = ir.FixedLayout(device, dtype, [n_rows * n_atoms * channels])
    buffer = ir.ComputedBuffer(name=None, layout=layout, data=loop)
    buffer.name = V.graph.register_buffer(buffer)
    V.graph.register_operation(buffer)
    V.graph.no_fuse_buffer_names.add(buffer.name)  # a reader in the same loop would take the last row for every row
    return ir.TensorBox.create(buffer)


def _loader(tensors: Sequence[Any], channels: int) -> Callable[[int, Any, Any], Any]:
    """Return what loads (row, atom, channel) of tensors [M, N, P * channels]."""
    for tensor in tensors:
        tensor.realize()
    loaders, sizes = [tensor.make_loader() for tensor in tensors], [tensor.get_size() for tensor in tensors]
    where = places([(int(size[0]), int(size[2]) // channels) for size in sizes])

    def load(row: int, atom: Any, channel: Any) -> Any:
        i, m, p = where[row]
        return loaders[i]([m, atom, p * channels + channel])

    return load


def _flat(parts: Parts, n_atoms: Any, channels: int, atom: Any, channel: Any) -> list[Any]:
    """Return where each row has (atom, channel) in its tensors laid end to end."""
    before = [sum(m * p for m, p in parts[:i]) for i in range(len(parts))]
    rows = [(before[i] + m * parts[i][1], parts[i][1], p) for i, m, p in places(parts)]
    return [(start * n_atoms + atom * width + p) * channels + channel for start, width, p in rows]
