"""Errors of a release or run on the labels of a store: per fidelity and property, with parity plots and JSON."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mffm import plots
from mffm.batch import Batch, reference_energy
from mffm.data.store import Store
from mffm.errors import InputError, known
from mffm.keys import ENERGY, FORCES, PROPERTIES, REPORT_UNITS, STRESS, Property
from mffm.models.potential import Prediction
from mffm.release import Loaded, same_systems, systems_at, write_json


@dataclass(frozen=True)
class FrameErrors:
    """Absolute errors of one fidelity and property, frame by frame; ``sums.sum() / counts.sum()`` is the MAE.

    Attributes:
        rows: [n_systems] int64, of the store, ascending.
        sums: [n_systems] float64, sum of the absolute errors of a frame's label, in the report's units.
        counts: [n_systems] int64, entries of a frame's label: 1 energy, 3 per atom forces, 9 stress.
    """

    rows: np.ndarray
    sums: np.ndarray
    counts: np.ndarray


@dataclass
class Evaluation:
    """Labels and predictions by (fidelity, property), and the table made from them.

    Energies are per atom, the element references of the fidelity subtracted from both, in eV. Frames come in the order
    of the predictions: ``frames`` holds the rows of the store and the number of entries of each one's label.
    """

    split: str
    labels: dict[tuple[str, Property], np.ndarray] = field(default_factory=dict)
    predictions: dict[tuple[str, Property], np.ndarray] = field(default_factory=dict)
    frames: dict[tuple[str, Property], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    unreferenced: dict[str, int] = field(default_factory=dict)
    without_stress: int = 0  # stress labels that the potential has no prediction for

    def rows(self) -> list[dict[str, Any]]:
        """Return one row per fidelity and property: mae, rmse, bias in the report's units, R², number of systems."""
        table = []
        for key, label in self.labels.items():
            unit, factor = REPORT_UNITS[key[1]]
            error = self.predictions[key] - label
            spread = float(np.square(label - label.mean()).sum())
            table.append(
                {
                    "fidelity": key[0],
                    "property": key[1],
                    "unit": unit,
                    "mae": float(np.abs(error).mean()) * factor,
                    "rmse": float(np.sqrt(np.square(error).mean())) * factor,
                    "bias": float(error.mean()) * factor,
                    "r2": 1 - float(np.square(error).sum()) / spread if spread > 0 else None,
                    "n_systems": len(self.frames[key][0]),
                }
            )
        return table

    def frame_errors(self, fidelity: str) -> dict[Property, FrameErrors]:
        """Return property → errors of every frame, for the properties that were compared."""
        found = {}
        for (name, prop), (rows, counts) in self.frames.items():
            if name == fidelity:
                errors = np.abs(self.predictions[name, prop] - self.labels[name, prop]) * REPORT_UNITS[prop][1]
                sums = np.add.reduceat(errors, np.cumsum(counts) - counts)
                order = np.argsort(rows)
                found[prop] = FrameErrors(rows[order], sums[order], counts[order])
        return found

    def panels(self) -> list[tuple[str, str, np.ndarray, np.ndarray]]:
        units = {ENERGY: "eV/atom", FORCES: "eV/Å", STRESS: "eV/Å³"}
        return [(f"{f} {p}", units[p], label, self.predictions[f, p]) for (f, p), label in self.labels.items()]


@dataclass(frozen=True)
class Addend:
    """A potential whose predictions, at the fidelity ``asked``, are added to those of another: a low fidelity below a
    learned difference.
    """

    loaded: Loaded
    asked: str

    def added_to(
        self, prediction: Prediction, reference: torch.Tensor, batch: Batch, store: Store, fidelity: str, stress: bool
    ) -> tuple[Prediction, torch.Tensor]:
        """Return the sums of both predictions and of both energies of the element references. [n_systems] float64, eV

        Args:
            prediction, reference: of the other potential for ``batch``, whose labels are of ``fidelity``.
        """
        device = batch.rows.device
        systems = same_systems(self.loaded, store, batch, fidelity, self.asked).to(device)
        own = self.loaded.potential(systems, forces=True, stress=stress)
        both = Prediction(
            prediction.energy + own.energy,
            prediction.atom_energies + own.atom_energies,
            _sum(prediction.forces, own.forces),
            _sum(prediction.stress, own.stress),
        )
        return both, reference + reference_energy(systems, self.loaded.spec.reference_table(device))


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return None if a is None or b is None else a + b


def evaluate(
    loaded: Loaded,
    store: Store,
    split: str,
    fidelities: Sequence[str] | None = None,
    predict_as: str | None = None,
    references: np.ndarray | None = None,
    plus: Addend | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[int], None] = lambda n: None,
) -> Evaluation:
    """Predict every labelled frame of a split and collect the errors.

    Args:
        fidelities: those whose labels are compared; None: all that the potential and the store share.
        predict_as: ask the potential for this fidelity instead of the labels' own.
        references: [N_ELEMENTS + 1] eV, with ``predict_as``: element references of the labels' fidelity for these
            predictions, from ``release.refit_references``.
        plus: what is compared is the sum of this one's predictions and the potential's, with both element references.
        progress: called with the number of frames done.

    Raises:
        InputError: the potential lacks a fidelity, or no frame of the split has a label of any.
    """
    shared = [n for n in loaded.fidelities.names if n in store.fidelities]
    names = list(fidelities) if fidelities else shared
    for name in names:
        store.fidelities.index(name)
        loaded.fidelities.index(predict_as or name)
    table = loaded.spec.reference_table(device)
    predicts_stress = all(one.potential.has_stress for one in (loaded, *([plus.loaded] if plus else [])))
    if references is not None:
        assert predict_as is not None
        table[loaded.fidelities.index(predict_as)] = torch.as_tensor(references, device=device)
    result = Evaluation(split)
    for name in names:
        rows = store.rows(split=split, fidelity=name)
        asked = predict_as or name
        parts: dict[Property, tuple[list[np.ndarray], list[np.ndarray]]] = {p: ([], []) for p in PROPERTIES}
        frames: dict[Property, tuple[list[np.ndarray], list[np.ndarray]]] = {p: ([], []) for p in PROPERTIES}
        for batch in systems_at(loaded, store, rows, name, asked):
            batch = batch.to(device)
            if not predicts_stress:
                result.without_stress += int(batch.masks[STRESS].sum())
                batch.masks[STRESS] = torch.zeros_like(batch.masks[STRESS])
            has_stress = bool(batch.masks[STRESS].any())
            prediction = loaded.potential(batch, forces=True, stress=has_stress)
            reference = reference_energy(batch, table)
            if plus is not None:
                prediction, reference = plus.added_to(prediction, reference, batch, store, name, has_stress)
            known_elements = ~reference.isnan()
            lost = int((batch.masks[ENERGY] & ~known_elements).sum())
            if lost:
                result.unreferenced[name] = result.unreferenced.get(name, 0) + lost
            for prop in PROPERTIES:
                mask = batch.masks[prop] & (known_elements if prop == ENERGY else True)
                if not mask.any():
                    continue
                n_atoms = batch.n_atoms[mask]
                counts = {ENERGY: torch.ones_like(n_atoms), FORCES: 3 * n_atoms}.get(prop, torch.full_like(n_atoms, 9))
                frames[prop][0].append(batch.rows[mask].cpu().numpy())
                frames[prop][1].append(counts.cpu().numpy())
                value = getattr(prediction, prop)
                label = batch.labels[prop]
                if prop == ENERGY:
                    value, label = (value / batch.n_atoms)[mask], ((label - reference) / batch.n_atoms)[mask]
                else:
                    entries = mask[batch.system_idx] if prop == FORCES else mask
                    value, label = value[entries].flatten(), label[entries].flatten()
                parts[prop][0].append(label.double().cpu().numpy())
                parts[prop][1].append(value.double().cpu().numpy())
            progress(batch.n_systems)
        for prop, (label_parts, value_parts) in parts.items():
            if label_parts:
                result.labels[name, prop] = np.concatenate(label_parts)
                result.predictions[name, prop] = np.concatenate(value_parts)
                result.frames[name, prop] = np.concatenate(frames[prop][0]), np.concatenate(frames[prop][1])
    if not result.labels:
        raise InputError(f"{store.path}: split {split!r} has no label of {known(names)}")
    return result


def write(
    evaluation: Evaluation, loaded: Loaded, store: Store, folder: Path, others: Sequence[Loaded] = ()
) -> tuple[Path, Path]:
    """Write ``evaluation-<split>.json`` and ``parity-<split>.png`` into a folder; return both paths.

    Args:
        others: of an ensemble's mean, the members besides ``loaded``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = folder / f"evaluation-{evaluation.split}.json"
    figure = folder / f"parity-{evaluation.split}.png"
    write_json(
        report,
        {
            "split": evaluation.split,
            "potential": str(loaded.path),
            "weights": loaded.weights,
            "weights_sha256": loaded.weights_sha256,
            **({"ensemble": [str(one.path) for one in (loaded, *others)]} if others else {}),
            "store": store.path.name,
            "store_fingerprint": store.fingerprint,
            "is_conservative": loaded.potential.is_conservative,
            "energies_without_references": evaluation.unreferenced,
            "stresses_without_prediction": evaluation.without_stress,
            "rows": evaluation.rows(),
        },
    )
    plots.parity(figure, evaluation.panels())
    return report, figure
