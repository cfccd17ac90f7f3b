"""Releases of what other packages trained: a checkpoint of SevenNet becomes one that predicts what it did."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ase
import numpy as np
import torch

from mffm.config.model import ConditioningConfig, HeadsConfig, ModelConfig
from mffm.data.references import ElementReferences
from mffm.errors import InputError, known
from mffm.fidelity import Fidelity, FidelityTable
from mffm.models.potential import Potential
from mffm.release import container, outputs
from mffm.release.files import sha256
from mffm.release.loading import Loaded
from mffm.release.saving import write
from mffm.release.spec import PotentialSpec, code_version

if TYPE_CHECKING:
    from mffm.models.sevennet_checkpoint import Checkpoint

_CONDITIONING, _HEADS = ("none", "onehot", "embedding"), ("shared", "independent")
_MP = {"code": "VASP", "settings": "Materials Project; no corrections"}
_PBE = Fidelity("pbe_mp", "PBE, PBE+U for oxides and fluorides of some metals", **_MP)
_R2SCAN = Fidelity("r2scan_mp", "r2SCAN", **_MP)
_PAPER = "Park et al., J. Chem. Theory Comput. 20, 4857 (2024)"
_MPTRJ = "trained on MPtrj, Deng et al., Nat. Mach. Intell. 5, 1031 (2023)"
# Checkpoint in the package sevenn → modality → fidelity, and what to cite.
SHIPPED: dict[str, tuple[dict[str, Fidelity], str]] = {
    "7net-0": ({"": _PBE}, f"{_PAPER}; {_MPTRJ}"),
    "7net-l3i5": ({"": _PBE}, f"{_PAPER}; {_MPTRJ}"),
    "7net-mf-0": (
        {"PBE": _PBE, "R2SCAN": _R2SCAN},
        f"Kim et al., J. Am. Chem. Soc. 147, 1042 (2025); {_MPTRJ}, and on its r2SCAN calculations",
    ),
}
_COMPARED = (1, 2, 3, 4, 5, 6)  # of the structures of the reference outputs: a dimer, molecules, crystals
_SINGLE = 1e-5  # of the largest number: two orders of the same float32 sums leave about 1e-6
_MARGIN = 20.0  # times what float32 is off by: where large terms cancel, they leave more
_REFUSED = {
    "mace": "a MACE model is a pickle of classes that need e3nn 0.4.4, which sevenn and fairchem-core exclude; let "
    "MACE label structures in an environment of its own, and train on these labels as a fidelity (docs/foreign.md)",
    "fairchem": "weights of fairchem's eSCN-MD start a run by model.backbone: {kind: escn, weights: FILE}; its energy "
    "heads and references are not taken over (docs/foreign.md)",
}


def convert(
    source: str,
    target: Path | str,
    fidelities: Sequence[tuple[str, str]] = (),
    conditioning: str | None = None,
    heads: str = "shared",
    licence: str = "",
) -> tuple[Path, dict[str, float]]:
    """Write a release of a checkpoint that another package wrote, whose predictions are the original's.

    They are compared with those of the package's own ASE calculator before anything is written.

    Args:
        source: ``sevennet:`` and the name of a checkpoint that the package sevenn ships, or the path of another.
        fidelities: name and level of theory of each of the checkpoint's modalities, in its order; those of shipped
            checkpoints are known.
        conditioning: none, onehot or embedding. None: ``onehot`` for a checkpoint with modalities, else ``none``. With
            ``onehot`` or ``embedding`` a checkpoint of one level of theory can take further ones in fine-tuning; it
            starts at zero.
        heads: shared, or independent: a linear head for each fidelity, so that fine-tuning can add more.
        licence: of a checkpoint that is not shipped.

    Returns:
        the target, and quantity → largest difference, eV/atom, eV/Å, eV/Å³.

    Raises:
        InputError: an unknown kind of source; not a checkpoint; a network that the adapter does not cover; the target
            exists; fidelities that are not those of the checkpoint; predictions that differ.
    """
    target = Path(target)
    container.refuse_existing(target)
    kind, _, name = source.partition(":")
    if kind in _REFUSED:
        raise InputError(f"{source}: {_REFUSED[kind]}")
    if kind != "sevennet" or not name:
        raise InputError(f"{source}: a source is like sevennet:7net-0 or sevennet:checkpoint.pth")
    for option, given, allowed in (("conditioning", conditioning or "none", _CONDITIONING), ("heads", heads, _HEADS)):
        if given not in allowed:
            raise InputError(f"--{option} {given}: a conversion takes {known(allowed)}")
    from mffm.models.sevennet_checkpoint import find, read_checkpoint

    checkpoint = read_checkpoint(find(name))
    modalities = checkpoint.modalities or ("",)
    chosen, citation = [Fidelity(*pair) for pair in fidelities], ""
    if name in SHIPPED:
        ours, citation = SHIPPED[name]
        chosen, licence = chosen or [ours[modality] for modality in modalities], licence or "MIT"
    if len(chosen) != len(modalities):
        raise InputError(
            f"{source}: holds {len(modalities)} level(s) of theory"
            f"{' (' + ', '.join(checkpoint.modalities) + ', in this order)' if checkpoint.modalities else ''}, "
            f"{len(chosen)} named: say what each is called and is, as in --fidelity pbe_mp='PBE, VASP'"
        )
    loaded = _loaded(checkpoint, FidelityTable(chosen), conditioning, heads)
    differences = _compared(loaded, checkpoint, source)
    called = f"sevennet:{Path(name).name}"  # not the folder on this machine
    record = {
        "from": called,
        "sha256": sha256(checkpoint.path),
        "package": f"sevenn {version('sevenn')}",
        "largest_differences": differences,
    }
    weights = {"name": f"weights of {Path(name).name}, by SevenNet", "licence": licence or "not stated"}
    loaded.spec.provenance = {
        **code_version(),
        "sources": [{**weights, "citation": citation}],
        "converted": record,
        "release": {
            "from": called,
            "weights": "converted",
            "written_by": code_version(),
            "licences": [weights["licence"]],
        },
    }
    return write(loaded, target, {}, {}, {}), differences


def _loaded(checkpoint: "Checkpoint", fidelities: FidelityTable, conditioning: str | None, heads: str) -> Loaded:
    potential = potential_of(checkpoint, fidelities.names, conditioning, heads)
    values = [checkpoint.references[name] for name in checkpoint.modalities or ("",)]
    spec = PotentialSpec(
        model=potential.config,
        fidelities=fidelities,
        references=ElementReferences(dict(zip(fidelities.names, values, strict=True))),
        avg_neighbors=potential.avg_neighbors,
        scale=potential.scale,
        label_counts={name: {} for name in fidelities.names},
    )
    for name in fidelities.names:
        elements = spec.references.elements(name)
        spec.references.report[name] = {
            "method": "given", "reason": "shifts of the checkpoint", "n_labels": 0, "elements": elements,
            "warnings": [],
        }  # fmt: skip
    return Loaded(spec, potential, checkpoint.path, "converted", "")


def potential_of(
    checkpoint: "Checkpoint", fidelities: Sequence[str], conditioning: str | None = None, heads: str = "shared"
) -> Potential:
    """Return the potential of a checkpoint, in eval mode; conditioning adds 0 where the checkpoint adds nothing.

    Args:
        fidelities: names, one for each modality.
        conditioning, heads: see ``convert``.

    Raises:
        InputError: another conditioning than a onehot for modalities.
    """
    kind = conditioning or ("onehot" if checkpoint.modalities else "none")
    if checkpoint.modalities and kind != "onehot":
        raise InputError(f"--conditioning {kind}: the modalities of {checkpoint.path} are a onehot; leave it out")
    model = ModelConfig(
        backbone=checkpoint.config,
        conditioning=ConditioningConfig.model_validate({"kind": kind}),
        heads=HeadsConfig.model_validate({"kind": heads, "hidden": []}),
    )
    potential = Potential(model, fidelities, checkpoint.config.denominators[0], checkpoint.scale)
    state = dict(potential.state_dict())
    state |= {f"terms.learned.backbone.{name}": value for name, value in checkpoint.weights.items()}
    for name, value in zip(("weights", "biases"), checkpoint.head, strict=True):
        key = f"terms.learned.heads.mlp.{name}.0"
        state[key] = value.expand_as(state[key])
    if checkpoint.rows:
        widths, n = potential.learned.conditioning.sites, len(fidelities)
        columns = [checkpoint.rows.get(site, torch.zeros(n, width)) for site, width in widths.items()]
        state["terms.learned.conditioning.table"] = torch.cat(columns, dim=1)
    potential.load_state_dict(state)
    return potential.eval().requires_grad_(False)


def _compared(loaded: Loaded, checkpoint: "Checkpoint", source: str) -> dict[str, float]:
    """Return the largest differences from the predictions of sevenn's own calculator, in float32.

    Raises:
        InputError: they are larger than what rounding explains, judged by what float32 and float64 differ by here.
    """
    from sevenn.calculator import SevenNetCalculator

    structures = [outputs.make_structures(loaded.spec)[i] for i in _COMPARED]
    model: Any = checkpoint.model
    found: dict[str, float] = {}
    for name, modality in zip(loaded.fidelities.names, checkpoint.modalities or (None,), strict=True):
        calculator = SevenNetCalculator(model, "model_instance", device="cpu", modal=modality)
        double = outputs.predict(loaded.potential.double(), loaded.spec, structures, name)
        single = outputs.predict(loaded.potential.float(), loaded.spec, structures, name)
        for i, (structure, exact, ours) in enumerate(zip(structures, double, single, strict=True)):
            rounding = {quantity: value for quantity, value, _ in outputs.differences(exact, ours)}
            for quantity, value, size in outputs.differences(ours, _original(calculator, structure)):
                found[quantity] = max(found.get(quantity, 0.0), value)
                if not value <= _SINGLE * max(size, 1.0) + _MARGIN * rounding[quantity]:
                    raise InputError(
                        f"{source}: at {name!r} {quantity} of structure {_COMPARED[i]} differs by {value:.3g} from "
                        f"sevenn's own ({size:.3g}): this checkpoint is not covered; report it"
                    )
    return found


def _original(calculator: Any, structure: outputs.Structure) -> outputs.Values:
    """Return what the package's own calculator predicts."""
    numbers, positions, cell, pbc = structure.geometry
    atoms = ase.Atoms(numbers, positions, cell=cell, pbc=pbc, calculator=calculator)
    stress = np.array(atoms.get_stress(voigt=False)) if pbc.all() else None
    return outputs.Values(float(atoms.get_potential_energy()), None, atoms.get_forces().astype(float), stress)
