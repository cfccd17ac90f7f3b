"""Lattice thermal conductivity against DFT, mode by mode (Póta et al., arXiv:2408.00755; ``metrics/phonons.py``).

103 binary crystals at 300 K. κ of a material is the mean of its three diagonal elements. SRME compares the conductivity
that every phonon mode carries, so errors of modes cannot cancel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WORST = 2.0  # SRE and SRME of a material that failed
ACOUSTIC_AT_GAMMA = -0.01  # THz, what numerical noise may do to the three acoustic modes


@dataclass(frozen=True)
class Conductivity:
    """Mode-resolved conductivity of a material at one temperature.

    Attributes:
        kappa: W/(m K), mean of the diagonal; None where it could not be computed.
        mode_kappa: [n_q, n_modes] W/(m K) × weight, or None.
        weights: [n_q] multiplicity of the q-points, or None.
        frequencies: [n_q, n_modes] THz, or None.
        space_groups: before and after relaxation; a None is not compared.
        has_imaginary: True: the structure is not a minimum, and scores worst.
    """

    kappa: float | None
    mode_kappa: np.ndarray | None = None
    weights: np.ndarray | None = None
    frequencies: np.ndarray | None = None
    space_groups: tuple[int | None, int | None] = (None, None)
    has_imaginary: bool = False


def from_record(record: Mapping[str, Any]) -> Conductivity:
    """Return the conductivity of a record of the suite's JSON, a reference or a prediction."""
    kappa = _array(record.get("kappa_tot_avg", record.get("kappa_TOT_ave")))
    if kappa is None and (tensor := _array(record.get("kappa_tot_rta"))) is not None:
        kappa = np.ravel(average(tensor))
    mode = _array(record.get("mode_kappa_tot_avg", record.get("mode_kappa_TOT_ave")))
    if mode is None and (tensor := _array(record.get("mode_kappa_tot_rta"))) is not None:
        mode = average(tensor)
    weights = _array(record.get("mode_weights", record.get("weights")))
    relaxed = record.get("final_spg_num")
    initial = record.get("init_spg_num", record.get("symm.no", record.get("spg_num")))
    return Conductivity(
        float(kappa.ravel()[0]) if kappa is not None and kappa.size == 1 else None,
        None if mode is None else mode.reshape(-1, mode.shape[-1]),
        weights,
        _array(record.get("ph_freqs", record.get("frequencies"))),
        (initial, relaxed),
        bool(record.get("has_imag_ph_modes") or record.get("imaginary_freqs")),
    )


def _array(value: Any) -> np.ndarray | None:
    """Return a value as finite numbers, None where it is none."""
    try:
        found = np.asarray(value, dtype=float)
    except (TypeError, ValueError):
        return None
    return found if found.size and bool(np.isfinite(found).all()) else None


def average(kappa: np.ndarray) -> np.ndarray:
    """Return the mean over directions of [..., 3, 3] tensors, [..., 6] Voigt or [..., 3] diagonals."""
    if kappa.shape[-2:] == (3, 3):
        return np.trace(kappa, axis1=-2, axis2=-1) / 3
    assert kappa.shape[-1] in (3, 6), kappa.shape
    return kappa[..., :3].mean(axis=-1)


def mode_total(particle: np.ndarray, coherence: np.ndarray, heat_capacity: np.ndarray) -> np.ndarray:
    """Return particle-like plus coherence conductivity by mode, κ_P,i + 2 Σ_j κ_C,ij c_i / (c_i + c_j).

    Args:
        particle: [T, n_q, n_modes, directions].
        coherence: [T, n_q, n_modes, n_modes, directions].
        heat_capacity: [T, n_q, n_modes].
    """
    c = heat_capacity[..., None]
    both = c + np.swapaxes(c, -1, -2)
    share = np.divide(np.broadcast_to(c, both.shape), both, out=np.zeros_like(both), where=both != 0)
    return particle + 2 * (coherence * share[..., None]).sum(axis=2)


def has_imaginary_modes(frequencies: np.ndarray) -> bool:
    """Return whether a spectrum has imaginary modes. [n_q, n_modes] THz, Γ first; all NaN counts as imaginary."""
    if bool(np.isnan(frequencies).all()):
        return True
    gamma, others = frequencies[0], frequencies[1:]
    return bool((gamma[3:] < 0).any() or (gamma[:3] < ACOUSTIC_AT_GAMMA).any() or (others < 0).any())


def srd(predicted: Conductivity, label: Conductivity) -> float:
    """Return the symmetric relative difference 2 (κ − κ_DFT) / (κ + κ_DFT), −2 where there is no prediction."""
    assert label.kappa is not None
    if predicted.kappa is None or not np.isfinite(predicted.kappa) or predicted.kappa < 0:
        return -WORST
    both = predicted.kappa + label.kappa
    return 2 * (predicted.kappa - label.kappa) / both if both else 0.0


def srme(predicted: Conductivity, label: Conductivity) -> float | None:
    """Return 2 Σ|κ_mode − κ_DFT,mode| / Σ weights / (κ + κ_DFT), in 0 to 2.

    None where it scores worst, 2: imaginary modes, a space group that relaxation changed, another mesh, no result.
    """
    assert label.kappa is not None
    assert label.mode_kappa is not None
    before, after = predicted.space_groups
    before = label.space_groups[0] if before is None else before
    if predicted.has_imaginary or (after is not None and before is not None and after != before):
        return None
    if predicted.kappa is None or predicted.mode_kappa is None or predicted.weights is None:
        return None
    if predicted.kappa < 0 or predicted.mode_kappa.shape != label.mode_kappa.shape or predicted.weights.sum() <= 0:
        return None
    error = np.abs(predicted.mode_kappa - label.mode_kappa).sum() / predicted.weights.sum()
    both = predicted.kappa + label.kappa
    value = (0.0 if error == 0 else WORST) if both == 0 else 2 * error / both
    return float(value) if 0 <= value <= WORST else None


def spectrum_w1(predicted: Conductivity, label: Conductivity) -> float | None:
    """Return the Wasserstein-1 distance of two spectra in THz, None where one is missing."""
    from scipy.stats import wasserstein_distance

    if predicted.frequencies is None or label.frequencies is None:
        return None
    values = (predicted.frequencies.ravel(), label.frequencies.ravel())
    return float(wasserstein_distance(*values, _mode_weights(predicted), _mode_weights(label)))


def _mode_weights(spectrum: Conductivity) -> np.ndarray | None:
    assert spectrum.frequencies is not None
    n_q, n_modes = spectrum.frequencies.shape
    if spectrum.weights is None or spectrum.weights.shape != (n_q,) or spectrum.weights.sum() <= 0:
        return None  # a full mesh
    return np.repeat(spectrum.weights, n_modes)


def mean_srme(values: Sequence[float | None]) -> tuple[float, float]:
    """Return the mean SRME with failures as 2, and the share of failures."""
    return (
        float(np.mean([WORST if v is None else v for v in values])),
        float(np.mean([v is None for v in values])),
    )


def metrics(predicted: Mapping[str, Conductivity], labels: Mapping[str, Conductivity]) -> dict[str, float | None]:
    """Return the suite's metrics over all materials of the reference; one without prediction scores worst."""
    nothing = Conductivity(None)
    pairs = [(predicted.get(i, nothing), label) for i, label in labels.items()]
    error, failed = mean_srme([srme(p, label) for p, label in pairs])
    difference = np.array([srd(p, label) for p, label in pairs])
    distances = [round(d, 4) for p, label in pairs if (d := spectrum_w1(p, label)) is not None]
    return {
        "κ_SRME": error,
        "κ_SRE": float(np.abs(difference).mean()),
        "κ_SRD": float(difference.mean()),
        "κ_failure_rate": failed,
        "imaginary_mode_rate": float(np.mean([p.has_imaginary for p, _ in pairs])),
        "spectrum_w1": float(np.mean(distances)) if distances else None,
    }
