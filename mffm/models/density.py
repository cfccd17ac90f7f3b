"""The native backbone: a density network with wide nodes and thin edges.

Work per edge is linear in ``edge_channels``; every dense matrix product acts on atoms. In a layer, for atom i:

1. density      A_i[l2 m2, l1 m1, c] = Σ_j Y[l2 m2](r_ij) R[l2, c](r_ij) h_j[l1 m1, c] / sqrt(avg_neighbors), summed
                before any coupling; then Clebsch-Gordan coupling and a linear map over (path, channel);
2. products     of the density with itself, channel by channel, up to ``body_order``, and a linear map; residual;
3. feed-forward gated by the scalars; residual.

Features are lists by degree l of tensors [2l + 1, n_atoms, C] with parity (-1)^l; only couplings with l1 + l2 + l3 even
exist, so the network is exactly equivariant under rotations and reflections. The density line: ACE (Drautz 2019),
MACE (Batatia 2022), GRACE (Bochkarev 2024); the order "sum, then couple" is MACE's density trick.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import pi, sqrt
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from mffm.batch import Batch
from mffm.blocks import Blocks
from mffm.config.model import DensityConfig
from mffm.edges import Edges
from mffm.errors import InputError
from mffm.keys import N_ELEMENTS
from mffm.models.angular import Constant, coupling, natural_paths, spherical_harmonics
from mffm.models.contraction import Bilinear, Square
from mffm.models.couple import Couplings, SquareCouplings
from mffm.models.density_sum import density_sum
from mffm.models.recompute import recomputed

# Root mean square of silu(x) for x ~ N(0, 1) is 1 / 1.679: weights behind a silu start larger by this factor.
SILU_GAIN = 1.679

# Added to the mean square in every norm. It is of the size of a unit-variance feature: a norm compresses what is large
# and is linear in what is small, so a degree that vanishes by symmetry, or the density of an atom whose last neighbor
# leaves, is not blown up to unit size (which would make energies steep and Hessians wrong there).
NORM_FLOOR = 0.1

# Up to here a compiled step writes out the sums of a coupling (see ``couple``); at lmax 4 they have thousands of terms.
FUSED_LMAX = 3

MAX_CHARGE, MAX_SPIN = 20, 20  # e; multiplicity

Modulation = tuple[Tensor | None, Tensor | None]


class Backbone(Protocol):
    """Features of atoms from edge vectors and a conditioning.

    Attributes:
        n_features: width of the output.
        l_out: highest degree of ``features``; 0 unless it was made for direct heads.
        cutoff: Å; an edge of this length has no effect.
        sites: name → width of the places where scalars accept a scale and a shift; "output" is the last.
        recompute: keep no activations in training, compute them again (activation checkpointing).
    """

    n_features: int
    l_out: int
    cutoff: float
    sites: dict[str, int]
    recompute: bool

    def __call__(self, batch: Batch, edge_vectors: Tensor, modulations: Mapping[str, Modulation]) -> Tensor:
        """Return invariant features [n_atoms, n_features]; modulations: site → (scale, shift), [n_atoms, width]."""
        ...

    def features(self, batch: Batch, edge_vectors: Tensor, modulations: Mapping[str, Modulation]) -> list[Tensor]:
        """Return features by degree l ≤ ``l_out``, [2l + 1, n_atoms, n_features]; of degree 0 those of the call."""
        ...

    def site(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """Return weight [in, width] and bias [width] of the linear map whose output the site is; not of "output"."""
        ...

    def multiply_in(self, dtype: torch.dtype | None) -> None:
        """Do the dense products on atoms in another dtype in training; None: in the weights' own."""
        ...

    def check(self, batch: Batch) -> None:
        """Refuse what the backbone was not made for.

        Raises:
            InputError: a charge, a spin multiplicity or an element.
        """
        ...


class EdgeBasis(NamedTuple):
    """What depends on edge vectors alone; computed once per step.

    Attributes:
        harmonics: [n_slots, (lmax + 1)^2].
        radial: [n_slots, radial_hidden, or n_radial], smooth functions of the distance times the envelope.
    """

    harmonics: Tensor
    radial: Tensor


def envelope(x: Tensor, power: int) -> Tensor:
    """Return the polynomial envelope of x = r / cutoff: 1 - O(x^power) at 0; 0 with two derivatives at 1, 0 beyond.

    It is Gasteiger's (2020) polynomial in the form (1 - x)^3 Σ_{k<p} (k+1)(k+2)/2 x^k, which is exact near x = 1.
    """
    t = F.relu(1 - x)
    series = torch.full_like(x, 0.5 * power * (power + 1))
    for k in range(power - 2, -1, -1):
        series = series * x + 0.5 * (k + 1) * (k + 2)
    return t * t * t * series


def bessel(x: Tensor, n: int) -> Tensor:
    """Return sqrt(2/3) sin(k π x) / x, k = 1..n, [E, n]: unit mean square for neighbors spread evenly in space."""
    frequencies = pi * torch.arange(1, n + 1, dtype=x.dtype, device=x.device)
    return torch.sin(x.unsqueeze(-1) * frequencies) * (sqrt(2 / 3) / x).unsqueeze(-1)


def normal_parameter(*shape: int, fan_in: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * (gain / sqrt(fan_in)))


class DegreeLinear(nn.Module):
    """One matrix for each degree: [2l + 1, N, inputs[l]] → [2l + 1, N, outputs[l]]; a bias on the scalars."""

    def __init__(self, inputs: Sequence[int], outputs: Sequence[int], gain: float = 1.0, bias: bool = True):
        super().__init__()
        self.weights = nn.ParameterList(
            normal_parameter(i, o, fan_in=i, gain=gain) for i, o in zip(inputs, outputs, strict=True)
        )
        self.bias = nn.Parameter(torch.zeros(outputs[0])) if bias else None
        self.product_dtype: torch.dtype | None = None  # of the products in training; None: the weights'

    def forward(self, x: Sequence[Tensor], onto: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the maps of the first ``len(weights)`` degrees of ``x``, added to ``onto`` where given."""
        out = []
        for degree, weight in enumerate(self.weights):
            rows = x[degree].reshape(-1, weight.shape[0])
            bias = self.bias if degree == 0 else None
            if self.product_dtype is not None and self.training:
                y = (rows.to(self.product_dtype) @ weight.to(self.product_dtype)).to(rows.dtype)
                y = y if bias is None else y + bias
                y = y if onto is None else y + onto[degree].reshape(-1, weight.shape[1])
            elif onto is not None:
                y = torch.addmm(onto[degree].reshape(-1, weight.shape[1]), rows, weight)
                y = y if bias is None else y + bias
            else:
                y = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
            out.append(y.view(*x[degree].shape[:2], weight.shape[1]))
        return out


class DegreeNorm(nn.Module):
    """Root-mean-square norm of each degree over channels and m, with a floor and learned scales."""

    def __init__(self, l_in: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((l_in + 1, channels), sqrt(1 + NORM_FLOOR)))

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        return [
            y * (y.square().mean(dim=(0, 2)) + NORM_FLOOR).rsqrt().unsqueeze(-1) * weight
            for y, weight in zip(x, self.weight.unbind(0), strict=True)
        ]


def modulated(x: Tensor, modulation: Modulation | None) -> Tensor:
    """Return x * (1 + scale) + shift."""
    if modulation is None:
        return x
    scale, shift = modulation
    x = x if scale is None else torch.addcmul(x, x, scale)
    return x if shift is None else x + shift


def path_tensor(l_first: int, l_second: int, l_out: int, symmetric: bool = False) -> tuple[np.ndarray, list[int]]:
    """Return the couplings of all natural paths, [rows, (l_first + 1)^2, (l_second + 1)^2], and the paths per degree.

    Rows are ordered by output degree, then m, then path: ``by_degree`` makes path and channel adjacent. Factors of unit
    variance give rows of unit mean square; for a symmetric product, whose factors are one, that counts its trace.
    """
    blocks = []
    paths = natural_paths(l_first, l_second, l_out, symmetric)
    for l3, pairs in enumerate(paths):
        block = np.zeros((2 * l3 + 1, len(pairs), (l_first + 1) ** 2, (l_second + 1) ** 2))
        for p, (l1, l2) in enumerate(pairs):
            block[:, p, l1 * l1 : (l1 + 1) ** 2, l2 * l2 : (l2 + 1) ** 2] = coupling(l1, l2, l3).transpose(2, 0, 1)
        if symmetric:
            block = (block + block.swapaxes(2, 3)) / 2
            trace = np.trace(block, axis1=2, axis2=3)
            block /= np.sqrt(2 * (block**2).sum((2, 3)) + trace**2)[..., None, None]
        blocks.append(block.reshape(-1, *block.shape[2:]))
    return np.concatenate(blocks), [len(pairs) for pairs in paths]


def by_degree(rows: Tensor, n_paths: Sequence[int]) -> list[Tensor]:
    """Split [rows, N, C], ordered as in ``path_tensor``, into degrees: [2l + 1, N, n_paths * C]."""
    orders = [2 * degree + 1 for degree in range(len(n_paths))]
    sizes = [m * n for m, n in zip(orders, n_paths, strict=True)]
    n_atoms, channels = rows.shape[1:]
    return [
        part.view(m, n, n_atoms, channels).transpose(1, 2).reshape(m, n_atoms, n * channels)
        for part, m, n in zip(rows.split(sizes), orders, n_paths, strict=True)
    ]


def parts(n_paths: Sequence[int]) -> list[tuple[int, int]]:
    """Return ``couple``'s parts of features by degree, [2l + 1, N, n_paths * C]."""
    return [(2 * degree + 1, n) for degree, n in enumerate(n_paths)]


class Products(nn.Module):
    """The density times itself, channel by channel, up to ``body_order``; linear maps to the degrees ≤ ``l_out``."""

    def __init__(self, lmax: int, l_out: int, channels: int, body_order: int):
        super().__init__()
        out = [channels] * (l_out + 1)
        gain = 1 / sqrt(body_order - 1)  # of the sum of this many unit-variance parts
        self.linear = DegreeLinear(out, out, gain)
        self.square_linear: DegreeLinear | None = None
        self.cube_linear: DegreeLinear | None = None
        self._cube: Bilinear | None = None
        factor = parts([1] * (lmax + 1))
        if body_order > 2:
            l_square = lmax if body_order > 3 else l_out
            tensor, self._square_paths = path_tensor(lmax, lmax, l_square, symmetric=True)
            self._square = Square(tensor)
            self._fused_square = SquareCouplings(tensor, parts(self._square_paths), factor)
            inputs = [n * channels for n in self._square_paths]
            to = [channels] * (l_square + 1)
            self.square_linear = DegreeLinear(inputs, to, gain if body_order == 3 else 1.0, bias=False)
        if body_order > 3:
            tensor, self._cube_paths = path_tensor(lmax, lmax, l_out)
            self._cube = Bilinear(tensor)
            self._fused_cube = Couplings(tensor, parts(self._cube_paths), factor, factor)
            inputs = [(n + 1) * channels for n in self._cube_paths]
            self.cube_linear = DegreeLinear(inputs, out, gain, bias=False)

    def forward(self, x: list[Tensor], onto: list[Tensor | None], fused: bool = False) -> list[Tensor]:
        """Return the products, added to ``onto`` where given; ``fused``: for a compiler (see ``couple``)."""
        out = self.linear(x)
        if self.square_linear is not None:
            packed = None if fused else torch.cat(x)
            squares = self._fused_square(x) if packed is None else by_degree(self._square(packed), self._square_paths)
            if self.cube_linear is None:
                out = self.square_linear(squares, out)
            else:
                assert self._cube is not None
                y = self.square_linear(squares)
                if packed is None:
                    cubes = self._fused_cube(y, x)
                else:
                    cubes = by_degree(self._cube(torch.cat(y), packed), self._cube_paths)
                out = self.cube_linear([torch.cat(pair, dim=-1) for pair in zip(y, cubes, strict=False)], out)
        return [y if h is None else y + h for y, h in zip(out, onto, strict=True)]


class FeedForward(nn.Module):
    """Expansion, silu on scalars, sigmoid gates from the scalars on the other degrees, contraction."""

    def __init__(self, l_out: int, channels: int, expansion: int):
        super().__init__()
        hidden = expansion * channels
        self._hidden = hidden
        self.norm = DegreeNorm(l_out, channels)
        self.up = DegreeLinear([channels] * (l_out + 1), [hidden * (l_out + 1)] + [hidden] * l_out)
        self.down = DegreeLinear([hidden] * (l_out + 1), [channels] * (l_out + 1), SILU_GAIN)

    @property
    def width(self) -> int:
        return self.up.weights[0].shape[1]

    def forward(self, h: list[Tensor], modulation: Modulation | None) -> list[Tensor]:
        up = self.up(self.norm(h))
        scalars, *gates = modulated(up[0], modulation).split(self._hidden, dim=-1)
        hidden = [F.silu(scalars)] + [x * torch.sigmoid(gate) for x, gate in zip(up[1:], gates, strict=True)]
        return self.down(hidden, h)


class Layer(nn.Module):
    """One interaction and one update of the atoms; see the module's docstring.

    Args:
        l_in: highest degree of the incoming features. l_out: of the outgoing ones.
        l_extra: degrees above l_out up to this one are given too, as they leave the products. Their linear maps are all
            that they add: without them the layer is the same.
    """

    def __init__(self, config: DensityConfig, l_in: int, l_out: int, avg_neighbors: float, l_extra: int = 0):
        super().__init__()
        c, c_edge, lmax = config.channels, config.edge_channels, config.lmax
        self._l_in, self._l_out, self._lmax, self._c_edge = l_in, l_out, lmax, c_edge
        self._l_products = max(l_out, l_extra)
        self.norm = DegreeNorm(l_in, c)
        self.send = DegreeLinear([c] * (l_in + 1), [c_edge] * (l_in + 1))
        n_radial, gain = (config.radial_hidden, SILU_GAIN) if config.radial_hidden else (config.n_radial, 1.0)
        self.radial = normal_parameter(n_radial, (lmax + 1) * c_edge, fan_in=n_radial, gain=gain)
        tensor, self._paths = path_tensor(lmax, l_in, lmax)
        matrix = tensor.reshape(len(tensor), -1) / sqrt(max(avg_neighbors, 1e-3))
        self._couple = Constant(matrix)
        self._fused_couple = Couplings(matrix[:, :, None], parts(self._paths), [(1, matrix.shape[1])])
        # Neighbors of one kind add up coherently: half the gain keeps densities, and their squares, of the order of 1.
        self.receive = DegreeLinear([n * c_edge for n in self._paths], [c] * (lmax + 1), gain=0.5)
        self.gate = DegreeLinear([c], [c * (lmax + 1)], gain=0.3)
        assert self.gate.bias is not None
        nn.init.ones_(self.gate.bias)
        self.products = Products(lmax, self._l_products, c, config.body_order)
        self.feed_forward = FeedForward(l_out, c, config.ff_expansion)

    def _fused(self, batch: Batch) -> bool:
        on_cpu = batch.edge_vectors.device.type == "cpu"  # on a GPU the loops have not run yet
        return on_cpu and isinstance(batch, Blocks) and self._lmax <= FUSED_LMAX

    def density(self, sent: list[Tensor], basis: EdgeBasis, batch: Batch) -> list[Tensor]:
        """Return the coupled density by degree, [2l + 1, n_atoms, n_paths * edge_channels]."""
        n_atoms = sent[0].shape[1]
        senders = torch.cat(sent).transpose(0, 1).reshape(n_atoms, -1)
        radial = (basis.radial @ self.radial).view(-1, self._lmax + 1, self._c_edge)
        sums = density_sum(senders, radial, basis.harmonics, batch)
        if self._fused(batch):
            return self._fused_couple([sums.view(1, n_atoms, -1)])
        uncoupled = sums.view(n_atoms, -1, self._c_edge).transpose(0, 1)
        coupled = self._couple.like(radial) @ uncoupled.reshape(-1, n_atoms * self._c_edge)
        return by_degree(coupled.view(-1, n_atoms, self._c_edge), self._paths)

    def forward(
        self, h: list[Tensor], basis: EdgeBasis, batch: Batch, modulations: Mapping[str, Modulation], prefix: str
    ) -> list[Tensor]:
        u = self.norm(h)
        sent = self.send(u)
        sent[0] = modulated(sent[0], modulations.get(f"{prefix}.send"))
        x = self.receive(self.density(sent, basis, batch))
        x[0] = modulated(x[0], modulations.get(f"{prefix}.receive"))
        gates = self.gate(u[:1])[0].chunk(self._lmax + 1, dim=-1)
        x = [y * gate for y, gate in zip(x, gates, strict=True)]
        residual = [h[degree] if degree <= self._l_in else None for degree in range(self._l_products + 1)]
        h = self.products(x, residual, self._fused(batch))
        n = self._l_out + 1
        return [*self.feed_forward(h[:n], modulations.get(f"{prefix}.update")), *h[n:]]


class DensityBackbone(nn.Module):
    """The native backbone; implements ``Backbone``.

    Args:
        avg_neighbors: mean number of neighbors of an atom in the training set; the density is divided by its root.
        l_out: highest degree of ``features``, of which those above 0 come from linear maps of their own in the last
            layer.
    """

    def __init__(self, config: DensityConfig, avg_neighbors: float, l_out: int = 0):
        super().__init__()
        self.config = config
        self.cutoff = config.cutoff
        self.n_features = config.channels
        self.l_out = l_out
        self.elements = nn.Embedding(N_ELEMENTS + 1, config.channels)
        self.charges = self.spins = None
        if config.charge_and_spin:  # at zero: every charge and spin starts as the neutral system
            self.charges = nn.Embedding(2 * MAX_CHARGE + 1, config.channels)
            self.spins = nn.Embedding(MAX_SPIN + 1, config.channels)
            for table in (self.charges, self.spins):
                nn.init.zeros_(table.weight)
        hidden = config.radial_hidden
        self.trunk, self.trunk_bias = nn.ParameterList(), nn.ParameterList()
        if hidden:
            self.trunk.append(normal_parameter(config.n_radial, hidden, fan_in=config.n_radial))
            self.trunk.append(normal_parameter(hidden, hidden, fan_in=hidden, gain=SILU_GAIN))
            self.trunk_bias.extend(nn.Parameter(torch.zeros(hidden)) for _ in range(2))
        degrees = [0] + [config.l_message] * (config.layers - 1) + [0]
        last = config.layers - 1
        self.layers = nn.ModuleList(
            Layer(config, l_in, l_next, avg_neighbors, l_extra=l_out if i == last else 0)
            for i, (l_in, l_next) in enumerate(pairwise(degrees))
        )
        self.sites: dict[str, int] = {}
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            self.sites[f"{i}.send"] = config.edge_channels
            self.sites[f"{i}.receive"] = config.channels
            self.sites[f"{i}.update"] = layer.feed_forward.width
        self.sites["output"] = self.n_features
        self.recompute = False

    def check(self, batch: Batch) -> None:
        """Raises:
        InputError: a charge or a spin multiplicity beyond the tables.
        """
        if self.charges is None:
            return
        for name, value, low, high in (
            ("charge", batch.charge, -MAX_CHARGE, MAX_CHARGE),
            ("spin multiplicity", batch.spin_multiplicity, 0, MAX_SPIN),
        ):
            smallest, largest = (int(v) for v in value.aminmax())
            if smallest < low or largest > high:
                found = smallest if smallest < low else largest
                raise InputError(f"{name} {found}: model.backbone.charge_and_spin covers {low} to {high}")

    def multiply_in(self, dtype: torch.dtype | None) -> None:
        for module in self.modules():
            if isinstance(module, DegreeLinear):
                module.product_dtype = dtype

    def site(self, name: str) -> tuple[nn.Parameter, nn.Parameter]:
        index, place = name.split(".")
        layer = self.layers[int(index)]
        assert isinstance(layer, Layer)
        linear = {"send": layer.send, "receive": layer.receive, "update": layer.feed_forward.up}[place]
        assert linear.bias is not None
        return linear.weights[0], linear.bias

    def edge_basis(self, edge_vectors: Tensor, dtype: torch.dtype, *trunk: Tensor) -> EdgeBasis:
        """Return the basis of the edges [n_slots, 3]; geometry stays in their dtype, the result is in ``dtype``.

        Args:
            trunk: weight and bias of each layer of the radial trunk.
        """
        r = edge_vectors.square().sum(-1).sqrt()
        x = r / self.cutoff
        harmonics = torch.cat(spherical_harmonics(edge_vectors / r.unsqueeze(-1), self.config.lmax), dim=1).to(dtype)
        radial = bessel(x, self.config.n_radial).to(dtype)
        for weight, bias in zip(trunk[::2], trunk[1::2], strict=True):
            radial = F.silu(torch.addmm(bias, radial, weight))
        return EdgeBasis(harmonics, radial * envelope(x, self.config.envelope_power).to(dtype).unsqueeze(-1))

    def equivariant_only(self) -> set[str]:
        """Return the names of the parameters that a backbone with ``l_out`` 1 or 2 has besides those of this with 0."""
        maps = ["linear"]
        if self.config.body_order > 2:  # with a cube, the square has all degrees in any case
            maps.append("square_linear" if self.config.body_order == 3 else "cube_linear")
        last = len(self.layers) - 1
        return {f"layers.{last}.products.{name}.weights.{degree}" for name in maps for degree in (1, 2)}

    def forward(self, batch: Batch, edge_vectors: Tensor, modulations: Mapping[str, Modulation]) -> Tensor:
        """Return the features [n_atoms, n_features]."""
        return self.features(batch, edge_vectors, modulations)[0][0]

    def features(self, batch: Batch, edge_vectors: Tensor, modulations: Mapping[str, Modulation]) -> list[Tensor]:
        """Return features by degree l ≤ ``l_out``, [2l + 1, n_atoms, n_features]."""
        elements = self.elements(batch.atomic_numbers)
        if self.charges is not None and self.spins is not None:
            state = self.charges(batch.charge + MAX_CHARGE) + self.spins(batch.spin_multiplicity)
            elements = elements + batch.of_systems(state)
        trunk = [t for pair in zip(self.trunk, self.trunk_bias, strict=True) for t in pair]
        h = [elements.unsqueeze(0)]
        if self.recompute and self.training and torch.is_grad_enabled():
            basis = self._recomputed_basis(edge_vectors, elements.dtype, trunk)
            for i in range(len(self.layers)):
                h = self._recomputed_layer(i, h, basis, batch, modulations)
        else:
            basis = self.edge_basis(edge_vectors, elements.dtype, *trunk)
            for i, layer in enumerate(self.layers):
                if i and isinstance(batch, Edges):
                    h = batch.with_ghosts(h)
                h = layer(h, basis, batch, modulations, str(i))
        return [modulated(h[0][0], modulations.get("output")).unsqueeze(0), *h[1:]]

    def _recomputed_basis(self, edge_vectors: Tensor, dtype: torch.dtype, trunk: Sequence[Tensor]) -> EdgeBasis:
        def part(edge_vectors: Tensor, *trunk: Tensor) -> tuple[Tensor, ...]:
            basis = self.edge_basis(edge_vectors, dtype, *trunk)
            return basis.harmonics, basis.radial

        return EdgeBasis(*recomputed(part, [edge_vectors], trunk))

    def _recomputed_layer(
        self, index: int, h: list[Tensor], basis: EdgeBasis, batch: Batch, modulations: Mapping[str, Modulation]
    ) -> list[Tensor]:
        layer = self.layers[index]
        names, weights = zip(*layer.named_parameters(), strict=True)
        own = {site: pair for site, pair in modulations.items() if site.startswith(f"{index}.")}
        n_h, n_weights = len(h), len(weights)

        def part(*tensors: Tensor) -> tuple[Tensor, ...]:
            features, shared, rest = list(tensors[:n_h]), EdgeBasis(*tensors[n_h : n_h + 2]), tensors[n_h + 2 :]
            parameters, flat = dict(zip(names, rest[:n_weights], strict=True)), rest[n_weights:]
            pairs = dict(zip(own, zip(flat[::2], flat[1::2], strict=True), strict=True))
            return tuple(functional_call(layer, parameters, (features, shared, batch, pairs, str(index))))

        geometric = [*h, *basis]
        return list(recomputed(part, geometric, [*weights, *(t for pair in own.values() for t in pair)]))
