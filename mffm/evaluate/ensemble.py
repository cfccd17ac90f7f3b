"""Errors of the mean of several potentials on the labels of a store, and how well their spread tells them."""

from collections.abc import Sequence

import numpy as np

from mffm.data.store import Store
from mffm.deploy.ensemble import require_ensemble
from mffm.errors import InputError
from mffm.evaluate import parity
from mffm.evaluate.calibration import Calibration
from mffm.keys import ENERGY, FORCES, REPORT_UNITS
from mffm.release import Loaded


def evaluate(
    members: Sequence[Loaded], store: Store, split: str, fidelities: Sequence[str] | None = None
) -> tuple[parity.Evaluation, dict[str, Calibration]]:
    """Predict every labelled frame of a split with every member.

    Args:
        fidelities: those whose labels are compared; None: all that the members and the store share.

    Returns:
        the errors of the mean, and by "<fidelity>" and "<fidelity> forces" how residuals compare with the standard
        deviation of the members (n - 1 in the denominator).

    Raises:
        InputError: what ``parity.evaluate`` raises; no ensemble; members that know other elements or properties.
    """
    shared = [
        n for n in members[0].fidelities.names if n in store.fidelities and all(n in m.fidelities for m in members)
    ]
    names = list(fidelities) if fidelities else shared
    require_ensemble(members, names)
    found = [parity.evaluate(member, store, split, names) for member in members]
    first = found[0]
    for member, one in zip(members, found, strict=True):
        if set(one.frames) != set(first.frames) or any(
            not np.array_equal(one.frames[key][0], rows) for key, (rows, _) in first.frames.items()
        ):
            raise InputError(
                f"{member.path} predicts other frames of split {split!r} than {members[0].path}: members of an "
                "ensemble know the same elements and properties"
            )
    mean = parity.Evaluation(
        split, first.labels, {}, first.frames, first.unreferenced, max(one.without_stress for one in found)
    )
    calibrations = {}
    for key, label in first.labels.items():
        # Each member has element references of its own: labels less these differ, residuals are of the same energies.
        residuals = np.stack([one.predictions[key] - one.labels[key] for one in found])
        mean.predictions[key] = label + residuals.mean(0)
        if key[1] == ENERGY:
            n_atoms = store.n_atoms[first.frames[key][0]].astype(np.float64)
            calibrations[key[0]] = _calibration(residuals * n_atoms, n_atoms, REPORT_UNITS[ENERGY][0])
        elif key[1] == FORCES:
            calibrations[f"{key[0]} forces"] = _calibration(residuals, np.ones(len(label)), REPORT_UNITS[FORCES][0])
    return mean, calibrations


def _calibration(residuals: np.ndarray, n_atoms: np.ndarray, unit: str) -> Calibration:
    """Args:
    residuals: [n_members, n]
    """
    return Calibration(residuals.mean(0), residuals.std(0, ddof=1), n_atoms, unit)
