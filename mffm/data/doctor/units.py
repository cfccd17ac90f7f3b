"""Units and signs: the checks of an ingest on a sample of every fidelity, and the pressure of compressed cells."""

import numpy as np

from mffm.data.checks import SAMPLE, Finding, Severity, check_derivatives, check_sample
from mffm.data.doctor.duplicates import EXAMPLES
from mffm.data.doctor.inputs import Frames
from mffm.data.doctor.outliers import LARGE_STRESS
from mffm.data.doctor.scan import Columns
from mffm.data.packed import Packed
from mffm.frame import Frame
from mffm.keys import ENERGY, FORCES, STRESS, Property

_RUN = 40  # frames that follow each other in their file are often close in geometry
_RUNS = 50
# Solids break under a tension of 20 GPa, few hold 30 (diamond 90): a larger mean stress is a compression.
MANY_GPA = 0.12  # eV/Å³
_LEAST = 8  # frames with such a stress
_MOSTLY = 0.8


def check_units(frames: Frames, columns: Columns) -> list[Finding]:
    """Return what speaks for a wrong unit or sign, of every fidelity."""
    findings = []
    for k, fidelity in enumerate(columns.fidelities):
        has = np.isfinite(columns.energy[k]) & ~columns.isolated
        rows = np.flatnonzero(has)
        if len(rows) >= 4:
            sample = rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE]
            of_size = check_sample(fidelity, columns.composition(sample), columns.energy[k, sample], sample)
            findings += [f for f in of_size if f.check != "outliers"]  # told with every frame by ``outliers``
            starts = rows[:: max(1, len(rows) // _RUNS)]
            runs = np.unique((starts[:, None] + np.arange(_RUN)).ravel())
            runs = runs[runs < columns.n]
            findings += check_derivatives(fidelity, pack([frames.frame(row) for row in runs[has[runs]]], fidelity))
        known = {f.check for f in findings if f.fidelity == fidelity}
        if "stress_sign" not in known:
            findings += _compressed(frames, columns.mean_stress[k], fidelity)
        if "stress_unit" not in known:
            findings += _too_large(columns.largest_stress[k], fidelity)
    return findings


def pack(found: list[Frame], fidelity: str) -> Packed:
    """Return frames at one fidelity as packed arrays."""

    def label(frame: Frame, prop: Property, shape: tuple[int, ...]) -> np.ndarray:
        value = frame.labels.get((fidelity, prop))
        return np.zeros(shape) if value is None else np.asarray(value, np.float64).reshape(shape)

    has = np.array([[(fidelity, p) in f.labels for f in found] for p in (ENERGY, FORCES, STRESS)], bool)
    return Packed(
        np.array([f.n_atoms for f in found], np.int64),
        np.concatenate([f.atomic_numbers for f in found]).astype(np.uint8),
        np.concatenate([f.positions for f in found]),
        np.stack([f.cell for f in found]),
        np.stack([f.pbc for f in found]),
        np.array([float(label(f, ENERGY, ())) for f in found]),
        np.concatenate([label(f, FORCES, (f.n_atoms, 3)) for f in found]).astype(np.float32),
        np.stack([label(f, STRESS, (3, 3)) for f in found]),
        *has,
    )


def _compressed(frames: Frames, mean_stress: np.ndarray, fidelity: str) -> list[Finding]:
    """Report stresses beyond what matter holds in tension that are mostly positive: pressures."""
    rows = np.flatnonzero(np.abs(np.nan_to_num(mean_stress)) > MANY_GPA)
    if len(rows) < _LEAST:
        return []
    share = float((mean_stress[rows] > 0).mean())
    if share < _MOSTLY:
        return []
    severity: Severity = "error" if share > 0.9 else "warning"
    order = rows[np.argsort(-mean_stress[rows])]
    return [
        Finding(
            "stress_sign", fidelity,
            f"{share:.0%} of {len(rows)} frames with a mean stress beyond {MANY_GPA:g} eV/Å³ (20 GPa) are under "
            "tension, which solids do not hold", severity,
            tuple((frames.place(int(r)), f"mean stress {mean_stress[r]:+.4g} eV/Å³") for r in order[:EXAMPLES]),
            "pressure given as stress: `negate: true`",
        )
    ]  # fmt: skip


def _too_large(largest_stress: np.ndarray, fidelity: str) -> list[Finding]:
    """Report stresses most of which are beyond what any laboratory reaches: another unit."""
    values = largest_stress[np.isfinite(largest_stress)]
    if len(values) < _LEAST or float(np.median(values)) < LARGE_STRESS:
        return []
    return [
        Finding(
            "stress_unit", fidelity,
            f"half of {len(values)} frames have a stress beyond {np.median(values):.3g} eV/Å³ "
            f"({160.2 * np.median(values):.4g} GPa)", "warning",
            remedy="stress in GPa or kbar read as eV/Å³: give its unit",
        )
    ]  # fmt: skip
