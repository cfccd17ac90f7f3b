"""The density over a plain list of edges (see ``mffm.edges``): what a tracer can follow with open sizes.

The same sum as in ``density_sum``, order by order, so that no array is larger than one number a channel of an edge.
"""

from typing import Any

import torch
from torch import Tensor

from mffm.edges import Edges


def edge_density(h: Tensor, radial: Tensor, harmonics: Tensor, batch: Edges) -> Tensor:
    """Return the density [n_atoms, (lmax + 1)^2, width].

    Args:
        h: [n_atoms, width], features of the senders; width = a × c with c running fastest.
        radial: [n_edges, lmax + 1, c].
        harmonics: [n_edges, (lmax + 1)^2].
    """
    return _Density.apply(h, radial, harmonics, batch)


def _orders(degree: int) -> range:
    return range(degree**2, (degree + 1) ** 2)


class _Density(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, radial: Tensor, harmonics: Tensor, batch: Edges) -> Tensor:
        ctx.save_for_backward(h, radial, harmonics)
        ctx.batch = batch
        n_degrees, channels = radial.shape[1:]
        sent = h.index_select(0, batch.neighbors).unflatten(1, (-1, channels))
        sums = []
        for degree in range(n_degrees):
            message = (radial[:, degree].unsqueeze(1) * sent).flatten(1)
            sums += [batch.atom_sums(harmonics[:, m : m + 1] * message, batch.receivers) for m in _orders(degree)]
        return torch.stack(sums, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        h, radial, harmonics = ctx.saved_tensors
        batch = ctx.batch
        n_degrees, channels = radial.shape[1:]
        sent = h.index_select(0, batch.neighbors).unflatten(1, (-1, channels))
        to_sent = torch.zeros_like(sent)
        for_radial, for_harmonics = [], []
        for degree in range(n_degrees):
            r = radial[:, degree].unsqueeze(1)
            message, pulled = (r * sent).flatten(1), torch.zeros_like(sent).flatten(1)
            for m in _orders(degree):
                outer = grad[:, m].index_select(0, batch.receivers)
                for_harmonics.append((message * outer).sum(1))
                pulled = pulled + harmonics[:, m : m + 1] * outer
            by_channel = pulled.unflatten(1, (-1, channels))
            for_radial.append((by_channel * sent).sum(1))
            to_sent = to_sent + r * by_channel
        for_h = batch.atom_sums(to_sent.flatten(1), batch.neighbors)
        return for_h, torch.stack(for_radial, 1), torch.stack(for_harmonics, 1), None
