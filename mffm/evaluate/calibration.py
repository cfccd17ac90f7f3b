"""Is the uncertainty of a release what its errors are? Per fidelity: coverage, ranking, likelihood, and a plot."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import erf
from scipy.stats import spearmanr

from mffm import plots
from mffm.data.store import Store
from mffm.errors import InputError, known
from mffm.keys import ENERGY, REPORT_UNITS
from mffm.release import Loaded, uncertainty, write_json

LEVELS = (0.5, 0.68, 0.9, 0.95)  # of a normal distribution


@dataclass(frozen=True)
class Calibration:
    """Total energies of one fidelity, or components of forces.

    Attributes:
        residuals, stds: [n] residuals and standard deviations, eV or eV/Å.
        n_atoms: [n] what errors are given per; ones for forces.
        unit: of errors and standard deviations in reports.
    """

    residuals: np.ndarray
    stds: np.ndarray
    n_atoms: np.ndarray
    unit: str = REPORT_UNITS[ENERGY][0]

    def coverage(self, levels: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return the share of residuals inside of the central interval of each level; the level itself is ideal."""
        inside = erf(np.abs(self.residuals / self.stds) / np.sqrt(2))  # the level at whose edge a residual lies
        return np.asarray([(inside <= level).mean() for level in levels])

    def row(self) -> dict[str, Any]:
        """Return the numbers of a report; energies in meV/atom."""
        z = self.residuals / self.stds
        rank = spearmanr(np.abs(self.residuals) / self.n_atoms, self.stds / self.n_atoms).statistic
        return {
            "n_systems": len(z),
            "mae": float(np.mean(np.abs(self.residuals) / self.n_atoms)) * 1e3,
            "mean_std": float(np.mean(self.stds / self.n_atoms)) * 1e3,
            "unit": self.unit,
            "rms_of_residual_over_std": float(np.sqrt(np.mean(np.square(z)))),
            "rank_correlation": None if np.isnan(rank) else float(rank),
            "negative_log_likelihood": uncertainty.negative_log_likelihood(self.residuals, self.stds),
            "coverage": {f"{level:g}": float(c) for level, c in zip(LEVELS, self.coverage(LEVELS), strict=True)},
        }


def calibrate(
    loaded: Loaded, store: Store, split: str, fidelities: Sequence[str] | None = None
) -> dict[str, Calibration]:
    """Compare residuals with uncertainties on a split, for the fidelities that have an uncertainty and labels.

    Raises:
        InputError: there is none of these.
    """
    names = list(fidelities) if fidelities else [n for n in loaded.fidelities.names if n in store.fidelities]
    tensors = {} if loaded.contents is None else loaded.contents.uncertainty
    found = {}
    for name in names:
        rows = store.rows(split=split, fidelity=name, prop=ENERGY)
        if f"{name}.factor" in tensors and len(rows):
            systems = uncertainty.systems(loaded, store, rows, name)
            known_ones = np.isfinite(systems.residuals)
            if known_ones.any():
                stds = uncertainty.of(loaded, name).of(systems.inputs)
                found[name] = Calibration(*(a[known_ones] for a in (systems.residuals, stds, systems.n_atoms)))
    if not found:
        raise InputError(f"{loaded.path}: no uncertainty and energy labels of {known(names)} in split {split!r}")
    return found


def write(found: dict[str, Calibration], loaded: Loaded, store: Store, split: str, folder: Path) -> tuple[Path, Path]:
    """Write ``calibration-<split>.json`` and ``.png`` into a folder; return both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    report, figure = (folder / f"calibration-{split}.{kind}" for kind in ("json", "png"))
    rows = {name: one.row() for name, one in found.items()}
    head = {
        "split": split,
        "potential": str(loaded.path),
        "weights_sha256": loaded.weights_sha256,
        "store_fingerprint": store.fingerprint,
    }
    write_json(report, {**head, "fidelities": rows})
    levels = np.linspace(0.02, 0.98, 49)
    panels = {}
    for name, one in found.items():
        errors, stds = (1e3 * values / one.n_atoms for values in (np.abs(one.residuals), one.stds))
        panels[name] = (stds, errors, levels, one.coverage(levels), one.unit)
    plots.calibration(figure, panels)
    return report, figure
