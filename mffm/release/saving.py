"""Writing a release: of a run, of a checkpoint, or of another release; of all its fidelities or folded to one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mffm.data.store import Store
from mffm.errors import InputError
from mffm.release import container, outputs, uncertainty
from mffm.release.card import card, licence_chain
from mffm.release.files import read_json, sha256
from mffm.release.loading import Loaded, load
from mffm.release.spec import PotentialSpec, code_version

_FOLDED_EXACTLY = 1e-10  # eV/atom, eV/Å: in float64 folding reorders sums only


def save(
    run: Path | str,
    target: Path | str,
    weights: str = "best",
    fidelity: str | None = None,
    fit_uncertainty_on: Store | None = None,
) -> Path:
    """Write a release as a folder, or as a single file where the name ends in ``.safetensors``.

    Args:
        run: of whose weights; a checkpoint of a run (``RUN/checkpoints/step-...``); or a release, of any format version
            and either form, to be written anew.
        weights: see ``load``.
        fidelity: fold the potential to this one: a plain potential without conditioning and with one head that predicts
            the same, which is verified.

    Raises:
        InputError: the target exists, the run has no such weights, or there is no such fidelity.
    """
    run, target = Path(run), Path(target)
    container.refuse_existing(target)
    loaded = load(run, weights)
    metrics = _metrics(run, loaded)
    spec = loaded.spec
    record = {
        **_earlier(loaded),
        "written_by": code_version(),
        "licences": sorted({str(s.get("licence")) for s in licence_chain(spec.provenance)}),
    }
    spec.provenance = {**_without_places(spec.provenance), "release": record}
    tensors, report = _uncertainty(loaded, fit_uncertainty_on)
    if fidelity is not None:
        loaded = folded(loaded, fidelity)
        tensors, report = uncertainty.kept(tensors, report, fidelity)
        metrics = {
            split: {**report, "rows": [row for row in report["rows"] if row["fidelity"] == fidelity]}
            for split, report in metrics.items()
        }
    return write(loaded, target, metrics, tensors, report)


def write(
    loaded: Loaded,
    target: Path,
    metrics: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    report: Mapping[str, Any],
) -> Path:
    """Write what is loaded as a release, with reference outputs and a card of its own.

    Args:
        metrics: split → report of an evaluation of these weights.
        tensors, report: of the uncertainty; empty where it was not fitted.
    """
    stored = outputs.compute(loaded.potential, loaded.spec)
    documents = {**loaded.spec.documents(), "metrics.json": dict(metrics), "outputs.json": stored.to_dict()}
    if tensors:
        documents["uncertainty.json"] = dict(report)
    name = target.name.removesuffix(container.SINGLE_SUFFIX)
    text = card(name, target.name, loaded.spec, loaded.potential.n_parameters, metrics)
    return container.write(target, documents, loaded.potential.state_dict(), text, tensors)


def folded(loaded: Loaded, fidelity: str) -> Loaded:
    """Return a potential of one fidelity that predicts what the loaded one does there, at no cost of conditioning.

    It is folded in float64 and compared with the original on the structures of the reference outputs before its
    weights are rounded to float32. ``provenance["release"]["folded"]`` says what the rounding is worth.

    Raises:
        InputError: the fidelity is unknown.
    """
    index = loaded.fidelities.index(fidelity)
    before = next(loaded.potential.parameters()).dtype
    original = loaded.potential.double()
    plain = original.folded(fidelity).eval().requires_grad_(False)
    own = loaded.spec
    record = {**own.provenance.get("release", {})}
    spec = PotentialSpec(
        model=plain.config,
        fidelities=type(own.fidelities)([own.fidelities[fidelity]]),
        references=type(own.references)(
            {fidelity: own.references.table[fidelity]},
            {fidelity: own.references.report[fidelity]} if fidelity in own.references.report else {},
        ),
        avg_neighbors=own.avg_neighbors,
        scale=own.scale,
        label_counts={fidelity: own.label_counts.get(fidelity, {})},
        provenance={**own.provenance, "release": record},
    )
    structures = outputs.make_structures(own)
    expected = outputs.predict(original, own, structures, fidelity)

    def off() -> float:
        pairs = zip(expected, outputs.predict(plain, spec, structures, fidelity), strict=True)
        return max(value for a, b in pairs for _, value, _ in outputs.differences(a, b))

    exact, size = off(), max(float(np.abs(v.forces).max()) for v in expected)
    if not exact <= _FOLDED_EXACTLY * max(size, 1.0):
        raise InputError(
            f"{loaded.path}: folding to {fidelity!r} changes predictions by {exact:.3g} eV/atom or eV/Å, which it must "
            "not: report it, and release all fidelities instead"
        )
    plain.to(before).double()  # as it will be stored
    rounded = off()
    record["folded"] = {
        "from_fidelities": list(loaded.fidelities.names),
        "index": index,
        "from_weights_sha256": loaded.weights_sha256,
        "largest_difference": exact,
        "largest_difference_rounded": rounded,
        "n_parameters": [original.n_parameters, plain.n_parameters],
    }
    original.to(before)
    return Loaded(spec, plain.to(before), loaded.path, loaded.weights, loaded.weights_sha256)


def _uncertainty(loaded: Loaded, store: Store | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if store is not None:
        return uncertainty.fit(loaded, store)
    if loaded.contents is None:
        return {}, {}
    return loaded.contents.uncertainty, loaded.contents.documents.get("uncertainty.json", {})


def _metrics(run: Path, loaded: Loaded) -> dict[str, Any]:
    """Return split → report; an evaluation of other weights (raw, or of an earlier state) says nothing about these."""
    if loaded.contents is not None:
        return dict(loaded.contents.documents.get("metrics.json", {}))
    metrics = {p.stem.removeprefix("evaluation-"): read_json(p) for p in sorted(run.glob("evaluation-*.json"))}
    return {split: report for split, report in metrics.items() if report["weights_sha256"] == loaded.weights_sha256}


def _without_places(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return a provenance that names the run, and what it was fine-tuned from, without their folders.

    ``recipe.data.store`` keeps its path: ``mffm evaluate`` and ``--uncertainty`` open it where no store is given.
    """
    found = dict(provenance)
    if "recipe" in found:
        recipe = found["recipe"]
        names = {key: Path(recipe[key]).name for key in ("run", "start_from") if recipe.get(key)}
        found["recipe"] = {**recipe, **names}
    if "start_from" in found:
        base = found["start_from"]
        found["start_from"] = {
            **base, "path": Path(base["path"]).name, "provenance": _without_places(base["provenance"])
        }  # fmt: skip
    return found


def _earlier(loaded: Loaded) -> dict[str, Any]:
    """Return what ``provenance["release"]`` says of the training: kept where a release is written anew."""
    if loaded.contents is not None:
        return dict(loaded.spec.provenance.get("release", {}))
    is_checkpoint = (loaded.path / "state.json").is_file()
    run = loaded.path.parent.parent if is_checkpoint else loaded.path
    log = run / "metrics.jsonl"
    return {
        "from": f"{run.name}/{loaded.path.name}" if is_checkpoint else run.name,
        "weights": loaded.weights,
        "training_log_sha256": sha256(log) if log.is_file() else None,
    }
