"""What a release says of itself, how it differs from another, and whether it still predicts what it did."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mffm.errors import InputError
from mffm.release import outputs
from mffm.release.card import licence_chain
from mffm.release.loading import Loaded, require_device

_SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Change:
    """One thing that two releases have differently: part (config, references, …), where, and both values as text."""

    part: str
    where: str
    a: str
    b: str


def facts(loaded: Loaded) -> dict[str, str]:
    """Return what a reader wants to know first, name → text, in order."""
    spec, model, contents = loaded.spec, loaded.spec.model, loaded.contents
    provenance = spec.provenance
    release, converted = provenance.get("release", {}), provenance.get("converted")
    found = {
        "form": "a run's folder" if contents is None else "single file" if contents.is_single_file else "folder",
        "format version": "" if contents is None else str(contents.version),
        "SHA-256": "" if contents is None else str(contents.manifest.get("own_sha256", "none: written by version 1")),
        "weights": f"{loaded.weights}, {loaded.potential.n_parameters:,} parameters",
        "from": str(release.get("from") or ""),
        "folded": "to one fidelity out of " + ", ".join(release["folded"]["from_fidelities"])
        if "folded" in release
        else "",
        "backbone": f"{model.backbone.kind}, cutoff {model.backbone.cutoff:g} Å, {model.backbone.layers} layer(s)",
        "conditioning, heads": f"{model.conditioning.kind}, {model.heads.kind}",
        "forces": "conservative" if loaded.potential.is_conservative else "direct: not conservative",
        "further terms": ", ".join([*(["ZBL"] if model.zbl else []), *(f"DFT-D3 at {n}" for n in model.d3)]),
        "converted from": f"{converted['from']}, {converted['package']}" if converted else "",
        "trained with": "" if converted else f"mffm {provenance.get('mffm')}, torch {provenance.get('torch')}",
        "store": "" if converted else f"{provenance.get('store')} {provenance.get('store_fingerprint')}",
        "plan": str(provenance.get("plan_fingerprint", "")),
        "training log": str(release.get("training_log_sha256") or ""),
        "fine-tuned from": str(provenance.get("start_from", {}).get("path", "")),
        "licences": ", ".join(sorted({str(s.get("licence")) for s in licence_chain(provenance)})),
        "reference outputs": "" if contents is None else _outputs_fact(loaded),
    }
    fitted = {} if contents is None else contents.documents.get("uncertainty.json", {}).get("fidelities", {})
    found["uncertainty"] = "; ".join(
        f"{name}: {entry['n_training']} systems, calibrated on {entry['n_validation']}"
        for name, entry in fitted.items()
        if "alpha" in entry
    )
    return {name: text for name, text in found.items() if text}


def _outputs_fact(loaded: Loaded) -> str:
    stored = stored_outputs(loaded)
    if stored is None:
        return "none: written by version 1; mffm release writes it anew with them"
    return f"{len(stored.structures)} structures, written by " + ", ".join(
        f"{k} {v}" for k, v in stored.written_by.items() if k in ("mffm", "torch")
    )


def fidelity_rows(loaded: Loaded) -> list[list[str]]:
    """Return per fidelity: name, level of theory, code, labels, how its references were found, elements."""
    spec, rows = loaded.spec, []
    for fidelity in spec.fidelities:
        report = spec.references.report.get(fidelity.name, {})
        labels = ", ".join(f"{n:,} {p}" for p, n in spec.label_counts.get(fidelity.name, {}).items())
        method = str(report.get("method", ""))
        if report.get("rank") is not None:
            method += f", rank {report['rank']} of {report['n_free']}"
        elements = " ".join(spec.references.elements(fidelity.name)) or "none"
        rows.append([fidelity.name, fidelity.level_of_theory, fidelity.code, labels, method, elements])
    return rows


def stored_outputs(loaded: Loaded) -> outputs.Outputs | None:
    """Return the reference outputs of a release; None for a run and for version 1."""
    documents = {} if loaded.contents is None else loaded.contents.documents
    return (
        outputs.Outputs.from_dict(documents["outputs.json"], str(loaded.path)) if "outputs.json" in documents else None
    )


def check(loaded: Loaded, device: str = "cpu") -> dict[str, list[outputs.Difference]]:
    """Predict all structures of the reference outputs at every fidelity, in both dtypes, on a device.

    Returns:
        dtype → differences, worst of each fidelity and quantity.

    Raises:
        InputError: there are no reference outputs: a run, or written by version 1; a device that cannot be used.
    """
    require_device(device)
    stored, found = stored_outputs(loaded), {}
    if stored is None:
        raise InputError(
            f"{loaded.path}: no reference outputs to check, a run and a release of version 1 have none; mffm release "
            "writes one that has them"
        )
    for name, dtype in (("float64", torch.float64), ("float32", torch.float32)):
        potential = loaded.potential.to(device=device, dtype=dtype)
        worst: dict[tuple[str, str], outputs.Difference] = {}
        for one in outputs.compare(stored, outputs.predictor(potential, loaded.spec), name):
            key = one.fidelity, one.quantity
            if key not in worst or not one.value <= worst[key].value:
                worst[key] = one
        found[name] = list(worst.values())
    return found


def require_within(found: Mapping[str, list[outputs.Difference]], loaded: Loaded) -> None:
    """Refuse predictions beyond the tolerances.

    Raises:
        InputError: naming the worst.
    """
    stored = stored_outputs(loaded)
    for differences in found.values():
        assert stored is not None
        outputs.refuse_differences(differences, stored, str(loaded.path))


def changes(a: Loaded, b: Loaded) -> list[Change]:
    """Return all that two releases (or runs) have differently; empty where they are the same but for their card."""
    found = []
    mine, theirs = _documents(a), _documents(b)
    for name in dict.fromkeys([*mine, *theirs]):
        found += list(_leaves_that_differ(name, mine.get(name, {}), theirs.get(name, {})))
    states = [x.potential.state_dict() for x in (a, b)]
    factors = [{} if x.contents is None else x.contents.uncertainty for x in (a, b)]
    found += [*_tensors("weights", *states), *_tensors("uncertainty", *factors)]
    return [*found, *_predictions(a, b)]


def _documents(loaded: Loaded) -> dict[str, Any]:
    documents = loaded.spec.documents()
    further = {} if loaded.contents is None else loaded.contents.documents
    by_name = {row["name"]: row for row in documents["fidelities.json"]["fidelities"]}
    return {
        "config": documents["config.json"],
        "fidelities": by_name,
        "provenance": documents["provenance.json"],
        "metrics": further.get("metrics.json", {}),
        "uncertainty": further.get("uncertainty.json", {}),
    }


def _leaves_that_differ(part: str, a: Any, b: Any, where: str = "") -> Iterator[Change]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys([*a, *b]):
            place = f"{where}.{key}" if where else str(key)
            if key not in a or key not in b:
                yield Change(part, place, _text(a.get(key)) if key in a else "—", _text(b[key]) if key in b else "—")
            else:
                yield from _leaves_that_differ(part, a[key], b[key], place)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _leaves_that_differ(part, x, y, f"{where}.{i}")
    elif a != b:
        yield Change(part, where, _text(a), _text(b))


def _text(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def _tensors(part: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> Iterator[Change]:
    for name in dict.fromkeys([*mine, *theirs]):
        if name not in mine or name not in theirs:
            shapes = [_text(list(s[name].shape)) if name in s else "—" for s in (mine, theirs)]
            yield Change(part, name, *shapes)
        elif mine[name].shape != theirs[name].shape:
            yield Change(part, name, _text(list(mine[name].shape)), _text(list(theirs[name].shape)))
        elif not torch.equal(mine[name], theirs[name]):
            x, y = mine[name].double(), theirs[name].double()
            rms = [f"rms {float(t.square().mean().sqrt()):.4g}" for t in (x, y)]
            yield Change(part, name, rms[0], f"{rms[1]}, differing by up to {float((x - y).abs().max()):.3g}")


def _predictions(a: Loaded, b: Loaded) -> Iterator[Change]:
    """Tell how far apart the two predict, at the fidelities of both, for the structures of the first."""
    structures = outputs.make_structures(a.spec)
    shared = [n for n in a.fidelities.names if n in b.fidelities]
    for name in shared:
        try:
            pair = [outputs.predict(x.potential, x.spec, structures, name) for x in (a, b)]
        except InputError:  # a charge or spin that one of the two does not take
            continue
        energy = max(
            abs((x.interaction_energy or 0.0) - (y.interaction_energy or 0.0)) / len(x.forces)
            for x, y in zip(*pair, strict=True)
        )
        forces = max(float(np.abs(x.forces - y.forces).max()) for x, y in zip(*pair, strict=True))
        if energy > 0 or forces > 0:
            text = f"up to {energy:.3g} eV/atom (without references), {forces:.3g} eV/Å"
            yield Change("predictions", name, "", f"differ by {text} over {len(structures)} structures")
