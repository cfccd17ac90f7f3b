"""The fidelities of a potential: add, copy, rename and drop one, as functions that leave what they are given as it is.

What remains predicts what it did: ``require_same`` compares it with the reference outputs of before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mffm.config.model import ModelConfig
from mffm.data.references import ElementReferences
from mffm.errors import InputError, known
from mffm.fidelity import Fidelity, FidelityTable
from mffm.release import container, outputs
from mffm.release.card import licence_chain
from mffm.release.inspection import stored_outputs
from mffm.release.loading import Loaded
from mffm.release.saving import write
from mffm.release.spec import code_version

_OF_DELTA = "the others are corrections to its head"


def tells_apart(config: ModelConfig) -> bool:
    """Return whether a potential has anything of a fidelity's own but element references."""
    return config.conditioning.kind != "none" or config.heads.kind != "shared"


def with_own_heads(loaded: Loaded) -> Loaded:
    """Return a potential that predicts the same, with a copy of the shared head for each fidelity.

    Two fidelities of a potential without conditioning and with one head could differ in element references alone.
    """
    config = loaded.spec.model
    if tells_apart(config):
        return loaded
    heads = config.heads.model_copy(update={"kind": "independent"})
    spec = replace(loaded.spec, model=config.model_copy(update={"heads": heads}))
    potential = spec.build().to(next(loaded.potential.parameters()))
    state, stacked = dict(loaded.potential.state_dict()), potential.per_fidelity()
    n = len(spec.fidelities)
    potential.load_state_dict({k: v.expand(n, *v.shape).clone() if k in stacked else v for k, v in state.items()})
    return replace(loaded, spec=spec, potential=potential.eval().requires_grad_(False))


def add(loaded: Loaded, fidelity: Fidelity, parent: str, references: np.ndarray | None = None, how: str = "") -> Loaded:
    """Return a potential with one more fidelity, which predicts what the parent does but for its element references.

    Args:
        references: [N_ELEMENTS + 1] eV, NaN where there is none; None: the parent's.
        how: where the references come from, for the report.

    Raises:
        InputError: the name is taken, or there is no such parent.
    """
    spec = loaded.spec
    spec.fidelities.index(parent)
    if fidelity.name in spec.fidelities:
        raise InputError(f"{loaded.path}: has a fidelity {fidelity.name!r} already: give another name, or rename it")
    loaded = with_own_heads(loaded)
    names = [*spec.fidelities.names, fidelity.name]
    edited = _with(loaded, [*spec.fidelities, fidelity], {**{n: n for n in names}, fidelity.name: parent})
    entry = {**edited.spec.references.report.get(fidelity.name, {}), "warnings": []}
    entry |= {"method": "kept", "reason": how or f"those of {parent!r}"}
    if references is not None:
        edited.spec.references.table[fidelity.name] = references
        entry |= {"method": "refitted", "elements": edited.spec.references.elements(fidelity.name)}
    edited.spec.references.report[fidelity.name] = entry
    edited.spec.label_counts[fidelity.name] = {}
    return edited


def copy(loaded: Loaded, old: str, new: str) -> Loaded:
    """Return a potential with a second fidelity like ``old`` in everything.

    Raises:
        InputError: the name is taken, or there is no ``old``.
    """
    edited = add(loaded, replace(loaded.fidelities[old], name=new), old)
    edited.spec.references.report[new] = dict(loaded.spec.references.report.get(old, {}))
    edited.spec.label_counts[new] = dict(loaded.spec.label_counts.get(old, {}))
    return edited


def rename(loaded: Loaded, old: str, new: str) -> Loaded:
    """Return a potential whose fidelity ``old`` is called ``new``.

    Raises:
        InputError: the name is taken, or there is no ``old``.
    """
    loaded.fidelities.index(old)
    if new in loaded.fidelities:
        raise InputError(f"{loaded.path}: has a fidelity {new!r} already: give another name, or drop it first")
    called = {n: new if n == old else n for n in loaded.fidelities.names}
    fidelities = [replace(f, name=called[f.name]) for f in loaded.fidelities]
    return _with(loaded, fidelities, {now: before for before, now in called.items()})


def drop(loaded: Loaded, name: str) -> Loaded:
    """Return a potential without a fidelity.

    Raises:
        InputError: there is no such fidelity, it is the only one, or others are corrections to it.
    """
    loaded.fidelities.index(name)
    if len(loaded.fidelities) == 1:
        raise InputError(f"{loaded.path}: {name!r} is its only fidelity")
    if name == loaded.spec.model.heads.base:
        raise InputError(
            f"{loaded.path}: {name!r} is the base of its delta heads, {_OF_DELTA}; take one of the others out with "
            "mffm release --fidelity"
        )
    left = [f for f in loaded.fidelities if f.name != name]
    return _with(loaded, left, {f.name: f.name for f in left})


def _with(loaded: Loaded, fidelities: Sequence[Fidelity], source: Mapping[str, str]) -> Loaded:
    """Return a potential with these fidelities, each with all that its source has in the loaded one."""
    own = loaded.spec
    first = {before: now for now, before in reversed(list(source.items()))}  # a copy does not take its source's name
    base = own.model.heads.base
    heads = own.model.heads.model_copy(update={"base": first[base] if base else None, "init_from": {}})
    d3 = {now: own.model.d3[before] for now, before in source.items() if before in own.model.d3}
    model = own.model.model_copy(update={"heads": heads, "d3": d3, "init_from": {}})
    references = ElementReferences(
        {now: own.references.table[before].copy() for now, before in source.items()},
        {now: dict(own.references.report.get(before, {})) for now, before in source.items()},
    )
    spec = replace(
        own,
        model=model,
        fidelities=FidelityTable(fidelities),
        references=references,
        label_counts={now: dict(own.label_counts.get(before, {})) for now, before in source.items()},
        provenance={**own.provenance, "release": dict(own.provenance.get("release", {}))},
    )
    potential = spec.build().to(next(loaded.potential.parameters()))
    names = own.fidelities.names
    state = dict(loaded.potential.state_dict())
    rows = torch.tensor([names.index(before) for before in source.values()])
    for name in potential.per_fidelity():
        state[name] = state[name].index_select(0, rows)
    potential.load_state_dict(state)
    return replace(loaded, spec=spec, potential=potential.eval().requires_grad_(False))


def require_same(before: Loaded, after: Loaded, called: Mapping[str, str]) -> None:
    """Refuse an edit that changed what fidelities predict.

    Args:
        called: name after → name before, of the fidelities that are compared.

    Raises:
        InputError: with the structure, the fidelity, the quantity, the difference and the tolerance.
    """
    stored = stored_outputs(before) or outputs.compute(before.potential, before.spec)
    values = {now: stored.values[name] for now, name in called.items()}
    expected = replace(stored, values=values)
    own = next(after.potential.parameters()).dtype
    found = outputs.compare(expected, outputs.predictor(after.potential.double(), after.spec))
    after.potential.to(own)
    outputs.refuse_differences(found, expected, str(after.path))


def save_edited(
    before: Loaded, after: Loaded, target: Path, edit: str, renamed: Mapping[str, str] | None = None
) -> Path:
    """Write an edited release, whose old fidelities must predict what they did.

    Args:
        edit: what was done, for the provenance.
        renamed: name after → name before, of those that had another; they keep errors and uncertainty, too.

    Raises:
        InputError: the target exists, or predictions differ.
    """
    container.refuse_existing(target)
    names = {now: (renamed or {}).get(now, now) for now in after.fidelities.names}
    called = {now: name for now, name in names.items() if name in before.fidelities}
    require_same(before, after, called)
    record = after.spec.provenance["release"]
    record["edits"] = [*record.get("edits", []), edit]
    record["written_by"] = code_version()
    record["licences"] = sorted({str(s.get("licence")) for s in licence_chain(after.spec.provenance)})
    contents = before.contents
    documents = {} if contents is None else contents.documents
    metrics = {
        split: {**report, "rows": _renamed(report["rows"], called)}
        for split, report in documents.get("metrics.json", {}).items()
    }
    old = {} if contents is None else contents.uncertainty
    tensors: dict[str, Tensor] = {
        f"{now}.factor": old[f"{name}.factor"] for now, name in called.items() if f"{name}.factor" in old
    }
    report = documents.get("uncertainty.json", {})
    if report:
        entries = report.get("fidelities", {})
        report = {**report, "fidelities": {now: entries[name] for now, name in called.items() if name in entries}}
    return write(after, target, metrics, tensors, report)


def _renamed(rows: Sequence[Mapping[str, Any]], called: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {**row, "fidelity": now} for row in rows for now, name in called.items() if row["fidelity"] == name
    ]  # fmt: skip


def elements_of(loaded: Loaded) -> np.ndarray:
    """Return the atomic numbers that a potential has references of at any fidelity."""
    table = loaded.spec.references.array(loaded.fidelities.names)
    return np.flatnonzero(~np.isnan(table).all(axis=0))


def require_release(loaded: Loaded) -> None:
    """Refuse a run where a release is needed.

    Raises:
        InputError: with the command that makes one.
    """
    if loaded.contents is None:
        raise InputError(
            f"{loaded.path}: a run, not a release; write one with `mffm release {loaded.path} TARGET` (fidelities: "
            f"{known(loaded.fidelities.names)})"
        )
