"""What a checkpoint of SevenNet holds, in this package's terms: backbone, one-hot rows, linear head, references."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from operator import attrgetter
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor, nn

from mffm.config.foreign import SEVENNETS, SevennetConfig
from mffm.errors import InputError, known
from mffm.keys import N_ELEMENTS
from mffm.models.foreign import HIDDEN, KEY, READOUT, SevennetBackbone, kind_of

_MODAL_SITES = {
    "embed": "use_modal_node_embedding", "send": "use_modal_self_inter_intro",
    "receive": "use_modal_self_inter_outro", "output": "use_modal_output_block",
}  # fmt: skip
_RESCALE, _EDGES = "rescale_atomic_energy", "edge_embedding"


@dataclass
class Checkpoint:
    """A checkpoint of SevenNet.

    Attributes:
        model: as sevenn builds it, in float32 and eval mode.
        modalities: names in the order of the rows; none for one level of theory.
        weights: of a ``SevennetBackbone``.
        rows: site of its conditioning → what each modality adds there, [n_modalities, width]; none where it adds
            nothing.
        head: weight [n_hidden, 1] and bias [1] of a linear head with this ``scale``, eV.
        references: modality, "" for the only one → [N_ELEMENTS + 1] float64, eV, NaN for elements that it lacks.
    """

    path: Path
    config: SevennetConfig
    model: nn.Module
    modalities: tuple[str, ...]
    weights: dict[str, Tensor]
    rows: dict[str, Tensor]
    head: tuple[Tensor, Tensor]
    scale: float
    references: dict[str, np.ndarray]


def find(name: str) -> Path:
    """Return the file of a checkpoint: one that the package sevenn ships, or a path.

    Raises:
        InputError: neither.
    """
    from sevenn.util import pretrained_name_to_path

    if name in SEVENNETS:
        return Path(pretrained_name_to_path(name))
    if not Path(name).is_file():
        raise InputError(
            f"{name}: neither a file nor a checkpoint in the package sevenn, which holds {known(SEVENNETS)}; "
            "get others from SevenNet's releases, and give the path of the .pth file"
        )
    return Path(name)


def read_checkpoint(path: Path) -> Checkpoint:
    """Return what a checkpoint of SevenNet holds. The file is a pickle: open only what you trust.

    Raises:
        InputError: not such a checkpoint, or a network that the adapter does not cover.
    """
    from sevenn.checkpoint import SevenNetCheckpoint

    try:
        checkpoint = SevenNetCheckpoint(path)
        options, model = checkpoint.config, checkpoint.build_model()
    except (OSError, EOFError, UnpicklingError, AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not a checkpoint that this version of sevenn reads: {reason}") from error
    parts: dict[str, Any] = dict(model.named_children())
    if READOUT not in parts:
        raise InputError(f"{path}: its readout is an MLP (readout_as_fcn); the adapter covers the linear one")
    modal = options.get(KEY.MODAL_MAP) if options.get(KEY.USE_MODALITY) else None
    modalities = tuple(sorted(modal, key=lambda name: int(modal[name]))) if modal else ()
    config = _config(options, parts, len(modalities))
    weights, rows = _weights(SevennetBackbone(config, 1.0), parts)
    readout, n = parts[READOUT].linear, config.n_hidden
    unit = 1 / sqrt(_scalars(parts[HIDDEN]._irreps_in_wo_modal) + config.modalities) if "output" in rows else 1.0
    scale, shifts = _rescaling(parts[_RESCALE], modalities, len(config.elements), str(path))
    bias = readout.bias.detach() * (sqrt(n) / unit) if readout.bias.numel() else torch.zeros(1)
    return Checkpoint(
        path=path,
        config=config,
        model=model.eval(),
        modalities=modalities,
        weights=weights,
        rows=rows,
        head=(readout.weight.detach().view(n, 1).clone(), bias),
        scale=scale * unit / sqrt(n),
        references={name: _by_element(shift, config.elements) for name, shift in shifts.items()},
    )


def _scalars(irreps: Any) -> int:
    return sum(multiplicity for multiplicity, irrep in irreps if irrep.is_scalar())


def _config(options: Mapping[str, Any], parts: Mapping[str, Any], modalities: int) -> SevennetConfig:
    n_layers = options[KEY.NUM_CONVOLUTION]
    inputs = [parts[f"{i}_self_interaction_1"] for i in range(n_layers)] + [parts[HIDDEN]]
    edges, types = parts[_EDGES], options[KEY.TYPE_MAP]
    sites = [kind for kind, key in _MODAL_SITES.items() if modalities > 1 and options.get(key)]
    envelope: dict[str, Any] = {"envelope_from": None, "envelope_power": int(getattr(edges.cutoff_function, "p", 6))}
    if hasattr(edges.cutoff_function, "r_on"):
        envelope["envelope_from"] = float(edges.cutoff_function.r_on)
    connections = options[KEY.SELF_CONNECTION_TYPE]
    config = SevennetConfig(
        kind="sevennet",
        cutoff=float(options[KEY.CUTOFF]),
        elements=[chemical_symbols[z] for z in sorted(types, key=lambda z: int(types[z]))],
        lmax=edges.spherical.lmax,
        parity=bool(options[KEY.IS_PARITY]),
        irreps=["+".join(f"{n}x{irrep}" for n, irrep in part._irreps_in_wo_modal) for part in inputs],
        n_radial=edges.basis_function.num_basis,
        radial_hidden=list(options[KEY.CONVOLUTION_WEIGHT_NN_HIDDEN_NEURONS]),
        radial_activation=options[KEY.ACTIVATION_RADIAL],
        scalar_activation=options[KEY.ACTIVATION_SCARLAR]["e"],
        odd_scalar_activation=options[KEY.ACTIVATION_SCARLAR]["o"],
        gate_activation=options[KEY.ACTIVATION_GATE]["e"],
        odd_gate_activation=options[KEY.ACTIVATION_GATE]["o"],
        self_connections=[connections] if isinstance(connections, str) else list(connections),
        denominators=[float(parts[f"{i}_convolution"].denominator) for i in range(n_layers)],
        normalize_harmonics=bool(options[KEY._NORMALIZE_SPH]),
        modalities=modalities if sites else 0,
        modal_sites=sites,
        **envelope,
    )
    named = [config.model_copy(update={"size": size}) for size in SEVENNETS]
    return next((one for one in named if one == SevennetConfig(kind="sevennet", size=one.size)), config)


def _weights(backbone: SevennetBackbone, parts: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the backbone's weights, and the rows of the one-hot by site."""
    rows: dict[str, Tensor] = {}
    weights: dict[str, Tensor] = {}
    for name, own in backbone.named_parameters():
        _, module, tensor = name.split(".", 2)
        if name.startswith("network."):
            theirs = attrgetter(tensor)(parts[module]).detach()
            weights[name] = theirs[: own.numel()].clone() if theirs.ndim == 1 else theirs.clone()
            continue
        site, linear, ours = backbone.site_of(module), parts[module].linear, backbone.network[module]
        weights[name] = linear.bias.detach() / site.unit if linear.bias.numel() else torch.zeros_like(own)
        place = backbone.place[module]
        if kind_of(place) in backbone.config.modal_sites:
            # e3nn keeps weights input by input; the one-hot is the last one, with a block for each scalar output.
            first = ours.get_parameter("linear.weight").numel()
            flat, n = linear.weight.detach()[first:], backbone.config.modalities
            widths = [m for m, irrep in linear.irreps_out if irrep.is_scalar()]
            blocks = [block.view(n, -1) for block in flat.split([n * width for width in widths])]
            rows["embed.system" if place == "embed" else place] = torch.cat(blocks, dim=1)
    return weights, rows


def _rescaling(
    module: Any, modalities: tuple[str, ...], n_elements: int, place: str
) -> tuple[float, dict[str, np.ndarray]]:
    """Return the scale and each modality's shifts by type.

    Raises:
        InputError: scales that differ between elements or modalities.
    """
    scales = module.scale.detach().double().unique()
    if len(scales) > 1:
        raise InputError(
            f"{place}: scales atom energies differently by element or modality ({float(scales[0]):.4g} to "
            f"{float(scales[-1]):.4g}); a potential here has one scale"
        )
    shift = module.shift.detach().double().numpy()
    return float(scales[0]), {
        name: np.broadcast_to(shift[i] if shift.ndim == 2 else shift, n_elements)
        for i, name in enumerate(modalities or ("",))
    }


def _by_element(shift: np.ndarray, elements: list[str]) -> np.ndarray:
    values = np.full(N_ELEMENTS + 1, np.nan)
    values[[chemical_symbols.index(symbol) for symbol in elements]] = shift
    return values
