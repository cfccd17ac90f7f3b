"""The third backbone: SevenNet's network (a NequIP), computed by the package sevenn, behind ``Backbone``.

It takes this package's edges, and gives the scalars before SevenNet's last linear map to the same heads, so that a
released checkpoint is a backbone, a linear head and element references (``sevennet_checkpoint``). SevenNet's modalities
are a one-hot beside the scalars of some linear maps: a bias per modality on their output, which is what the
conditioning ``onehot`` adds at the same sites.
SevenNet: Park et al. (arXiv 2402.03789); modalities: Kim et al. (arXiv 2409.07947); NequIP: Batzner et al.
(arXiv 2101.03164).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import sqrt
from typing import Any

import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor, nn

from mffm.batch import Batch
from mffm.config.foreign import SevennetConfig
from mffm.edges import Edges
from mffm.errors import InputError
from mffm.models.density import Modulation

try:
    import sevenn._keys as KEY
    from sevenn._const import DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG
    from sevenn.model_build import build_E3_equivariant_model
except ImportError as error:
    raise InputError(
        f"model.backbone.kind: sevennet needs sevenn ({error}); install it: pip install 'mffm[sevennet]'"
    ) from error

EMBED, HIDDEN, READOUT = "onehot_to_feature_x", "reduce_input_to_hidden", "reduce_hidden_to_energy"
_NOT_OURS = ("onehot_idx_to_onehot", "one_hot_modality", READOUT, "rescale_atomic_energy", "reduce_total_enegy",
             "force_output")  # fmt: skip
_MOST_ELEMENTS = 120


def places(config: SevennetConfig) -> dict[str, str]:
    """Return the modules of SevenNet's network whose scalar outputs are sites → the name of the site."""
    layers = range(config.layers)
    receive = {f"{i}_self_interaction_2": f"{i}.receive" for i in layers}
    return {EMBED: "embed", **{f"{i}_self_interaction_1": f"{i}.send" for i in layers}, **receive, HIDDEN: "output"}


def kind_of(place: str) -> str:
    """Return what of ``modal_sites`` a place is: ``0.send`` is a send."""
    return place.rpartition(".")[2]


class Site(nn.Module):
    """Scalars of a linear map of e3nn with a bias and a shift by the conditioning, as beside m modalities.

    e3nn divides by the root of the number of scalar inputs: n + m with a one-hot of m modalities beside them. So the
    map's own scalars, which it divides by sqrt(n), are multiplied by sqrt(n / (n + m)), and bias and shift by
    1 / sqrt(n + m): a modality's row of weights is a shift as it is. A head folds a shift of features as it is, too:
    features are in units of ``unit``.

    Attributes:
        unit: 1 / sqrt(n + m); 1 without modalities.
    """

    columns: Tensor

    def __init__(self, linear: Any, modalities: int, is_features: bool):
        super().__init__()
        n = sum(multiplicity for multiplicity, irrep in linear.irreps_in if irrep.is_scalar())
        self.unit = 1 / sqrt(n + modalities) if modalities else 1.0
        self.ratio, self.norm = sqrt(n) * self.unit if modalities else 1.0, self.unit
        if is_features:
            self.ratio, self.norm = self.ratio / self.unit, 1.0
        columns = scalar_columns(linear)
        self.register_buffer("columns", torch.tensor(columns), persistent=False)
        self.bias = nn.Parameter(torch.zeros(len(columns)))

    def forward(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """Return x [n_atoms, dim] with its scalars changed; shift: [n_atoms, width]."""
        scalars = x.index_select(1, self.columns)
        moved = self.bias if shift is None else self.bias + shift
        return x.index_copy(1, self.columns, scalars * self.ratio + moved * self.norm)


def scalar_columns(linear: Any) -> list[int]:
    """Return the columns of a linear map's output that are even scalars."""
    found: list[int] = []
    for (_, irrep), part in zip(linear.irreps_out, linear.irreps_out.slices(), strict=True):
        found += range(part.start, part.stop) if irrep.is_scalar() else []
    return found


class SevennetBackbone(nn.Module):
    """SevenNet's network; implements ``Backbone``.

    Args:
        avg_neighbors: not used; every layer divides by a number of its own.
        l_out: 0; the last layer has scalars alone.
    """

    type_of: Tensor

    def __init__(self, config: SevennetConfig, avg_neighbors: float, l_out: int = 0):
        super().__init__()
        assert l_out == 0, l_out
        self.config = config
        self.cutoff = config.cutoff
        self.n_features = config.n_hidden
        self.l_out = 0
        self.recompute = False
        self.place = places(config)
        modal = set(config.modal_sites)
        with _float32():  # sevenn builds in nothing else
            built = build_E3_equivariant_model(arguments(config))
            self.network = nn.ModuleDict({name: m for name, m in built.named_children() if name not in _NOT_OURS})
            self.site_modules = nn.ModuleDict()
            for name, place in self.place.items():
                n = config.modalities if kind_of(place) in modal else 0
                self.site_modules[name] = Site(self.network[name].linear, n, is_features=name == HIDDEN)
        for i in range(config.layers):  # a constant of the configuration
            convolution: Any = self.network[f"{i}_convolution"]
            value = convolution.denominator.data
            del convolution.denominator
            convolution.register_buffer("denominator", value)
        self.sites: dict[str, int] = {"embed.system": self._width(EMBED)} if "embed" in modal else {}
        for i in range(config.layers):
            self.sites[f"{i}.send"] = self._width(f"{i}_self_interaction_1")
            # The scalars that are received are those of the node's update.
            self.sites[f"{i}.receive"] = self.sites[f"{i}.update"] = self._width(f"{i}_self_interaction_2")
        self.sites["output"] = self.n_features
        types = torch.full((_MOST_ELEMENTS,), -1)
        types[list(_type_map(config))] = torch.arange(len(config.elements))
        self.register_buffer("type_of", types, persistent=False)
        for module in self.modules():  # constants, under e3nn's private names: weights alone are saved
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer, persistent=False)

    def site_of(self, name: str) -> Site:
        """Return what the scalars of a module of the network go through."""
        found = self.site_modules[name]
        assert isinstance(found, Site)
        return found

    def _width(self, name: str) -> int:
        return self.site_of(name).bias.shape[0]

    def site(self, name: str) -> tuple[Tensor, Tensor]:
        """Return an empty weight, as no conditioning scales these sites, and the bias of a site."""
        index, _, kind = name.rpartition(".")
        layer = {"send": f"{index}_self_interaction_1", "system": EMBED}.get(kind, f"{index}_self_interaction_2")
        bias = self.site_of(layer).bias
        return bias.new_empty(0), bias

    def multiply_in(self, dtype: torch.dtype | None) -> None:
        if dtype is not None:
            raise InputError("train.precision: bfloat16 is for the density backbone; set float32 or tf32 with sevennet")

    def equivariant_only(self) -> set[str]:
        """Return the names of the parameters that ``l_out`` 1 adds: none."""
        return set()

    def check(self, batch: Batch) -> None:
        """Raises:
        InputError: an element that the network does not know.
        """
        # The dummy system of a rank without any is a hydrogen atom, whatever the elements.
        is_dummy = (batch.rows.eq(-1) & batch.n_atoms.eq(1)).index_select(0, batch.system_idx)
        unknown = batch.atomic_numbers[self.type_of[batch.atomic_numbers].lt(0) & ~is_dummy]
        if len(unknown):
            symbols = ", ".join(chemical_symbols[z] for z in unknown.unique().tolist())
            raise InputError(
                f"{symbols}: not among the elements of this sevennet backbone, which are "
                f"{', '.join(sorted(self.config.elements))}; leave these structures out"
            )

    def forward(self, batch: Batch, edge_vectors: Tensor, modulations: Mapping[str, Modulation]) -> Tensor:
        """Return the features [n_atoms, n_features].

        Raises:
            InputError: activation checkpointing was asked for.
        """
        if self.recompute:
            raise InputError(
                "train.activation_checkpointing is for the density backbone; set it to false with sevennet"
            )
        receivers, senders, vectors = batch.receivers, batch.neighbors, edge_vectors
        if not isinstance(batch, Edges):
            slots = batch.neighbor_mask.nonzero().flatten()
            receivers, senders = receivers[slots], senders[slots]
            vectors = edge_vectors.index_select(0, slots)
        types = self.type_of[batch.atomic_numbers].clamp(min=0)
        onehot = nn.functional.one_hot(types, len(self.config.elements)).to(edge_vectors.dtype)
        data: dict[str, Tensor] = {
            KEY.NODE_FEATURE: onehot,
            KEY.NODE_ATTR: onehot,
            KEY.ATOM_TYPE: types,
            KEY.EDGE_IDX: torch.stack([receivers, senders]),
            KEY.EDGE_VEC: vectors,
        }
        for name, module in self.network.items():
            data = _convolved(module, data) if name.endswith("_convolution") else module(data)
            if name in self.place:
                shift = _shift(modulations, self.place[name])
                data[KEY.NODE_FEATURE] = self.site_of(name)(data[KEY.NODE_FEATURE], shift)
        return data[KEY.NODE_FEATURE]

    def features(self, batch: Batch, edge_vectors: Tensor, modulations: Mapping[str, Modulation]) -> list[Tensor]:
        """Return features by degree l ≤ 0, [1, n_atoms, n_features]."""
        return [self(batch, edge_vectors, modulations).unsqueeze(0)]


def _convolved(convolution: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Do what sevenn's convolution does; its own sum over neighbors fixes the number of atoms of a trace."""
    receivers, senders = data[KEY.EDGE_IDX].unbind(0)
    x = data[KEY.NODE_FEATURE]
    weights = convolution.weight_nn(data[KEY.EDGE_EMBEDDING])
    messages = convolution.convolution(x.index_select(0, senders), data[KEY.EDGE_ATTR], weights)
    sums = x.new_zeros(x.shape[0], messages.shape[1]).index_add(0, receivers, messages)
    return {**data, KEY.NODE_FEATURE: sums / convolution.denominator}


def _shift(modulations: Mapping[str, Modulation], place: str) -> Tensor | None:
    """Return the sum of the shifts of the sites at a place, None where there is none."""
    index, _, kind = place.rpartition(".")
    names = {"receive": (place, f"{index}.update"), "embed": ("embed.system",)}.get(kind, (place,))
    found = [modulations[name][1] for name in names if name in modulations]
    shifts = [shift for shift in found if shift is not None]
    return sum(shifts[1:], shifts[0]) if shifts else None


def arguments(config: SevennetConfig) -> dict[str, Any]:
    """Return the configuration that sevenn builds the network from."""
    envelope = {"cutoff_function_name": "poly_cut", "poly_cut_p_value": config.envelope_power}
    if config.envelope_from is not None:
        envelope = {"cutoff_function_name": "XPLOR", "cutoff_on": config.envelope_from}
    connections = config.self_connections * (config.layers if len(config.self_connections) == 1 else 1)
    return {
        **DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG,
        KEY.CUTOFF: config.cutoff,
        KEY.NUM_SPECIES: len(config.elements),
        KEY.TYPE_MAP: _type_map(config),
        KEY.IRREPS_MANUAL: config.irreps,
        KEY.LMAX: config.lmax,
        KEY.IS_PARITY: config.parity,
        KEY.NUM_CONVOLUTION: config.layers,
        KEY.RADIAL_BASIS: {"radial_basis_name": "bessel", "bessel_basis_num": config.n_radial},
        KEY.CUTOFF_FUNCTION: envelope,
        KEY.ACTIVATION_RADIAL: config.radial_activation,
        KEY.ACTIVATION_SCARLAR: {"e": config.scalar_activation, "o": config.odd_scalar_activation},
        KEY.ACTIVATION_GATE: {"e": config.gate_activation, "o": config.odd_gate_activation},
        KEY.CONVOLUTION_WEIGHT_NN_HIDDEN_NEURONS: list(config.radial_hidden),
        KEY.CONV_DENOMINATOR: list(config.denominators),
        KEY.SELF_CONNECTION_TYPE: connections,
        KEY._NORMALIZE_SPH: config.normalize_harmonics,
        KEY.SHIFT: 0.0,
        KEY.SCALE: 1.0,
    }


def _type_map(config: SevennetConfig) -> dict[int, int]:
    """Return atomic number → index of the one-hot."""
    for symbol in config.elements:
        if not 0 < atomic_numbers.get(symbol, 0) < _MOST_ELEMENTS:
            raise InputError(f"model.backbone.elements: {symbol!r} is not an element symbol")
    return {atomic_numbers[symbol]: i for i, symbol in enumerate(config.elements)}


@contextmanager
def _float32() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
