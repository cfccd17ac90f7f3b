"""Discovery metrics: is a crystal predicted on or below the convex hull, and how far off is its energy.

Rules of the suite (``metrics/discovery.py``, ``data.py`` at 2c7f9fc): a formation energy more than 5 eV/atom off counts
as missing; labels and predictions are rounded to 1 meV/atom before they are scored; the hull is never rebuilt, so an
error of the hull distance is an error of the formation energy; a missing prediction counts as unstable for the
classification and is left out of MAE, RMSE and R².
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

STABLE_AT = 0.0  # eV/atom above the hull, at most
LARGEST_ERROR = 5.0  # eV/atom of formation energy; a prediction further off counts as missing
DECIMALS = 3
N_MOST_STABLE = 10_000
# Stable among unique prototypes by labels that are not rounded: 32,942 is the one count that gives every published DAF
# (124 values of 62 rows); rounding the labels to 1 meV turns 432 more stable.
WBM_PREVALENCE = 32_942 / 215_488

FULL, UNIQUE, MOST_STABLE = "full_test_set", "unique_prototypes", "most_stable_10k"
Metrics = dict[str, float]


@dataclass(frozen=True)
class Labels:
    """What the test set says of each material.

    Attributes:
        ids: [n] material ids.
        e_above_hull: [n] eV/atom; stable ones are at most 0.
        e_form: [n] eV/atom, formation energy with MP2020 corrections.
        is_unique: [n] bool, one of the unique prototypes.
    """

    ids: tuple[str, ...]
    e_above_hull: np.ndarray
    e_form: np.ndarray
    is_unique: np.ndarray

    def prevalence(self) -> float:
        """Return the stable share among unique prototypes, by the labels as they are."""
        return float((self.e_above_hull[self.is_unique] <= STABLE_AT).mean())


@dataclass(frozen=True)
class Confusion:
    """Counts of a classification: true or false, predicted stable (positive) or not."""

    tp: int
    fp: int
    tn: int
    fn: int

    def metrics(self, prevalence: float | None = None) -> Metrics:
        """Return the rates. DAF is precision over prevalence; of these counts themselves where none is given.

        A rate whose denominator is zero is NaN.
        """
        stable, unstable = self.tp + self.fn, self.tn + self.fp
        precision = _ratio(self.tp, self.tp + self.fp)
        recall = _ratio(self.tp, stable)
        if prevalence is None:
            prevalence = _ratio(stable, stable + unstable)
        return {
            "F1": _ratio(2 * precision * recall, precision + recall),
            "DAF": _ratio(precision, prevalence),
            "Precision": precision,
            "Recall": recall,
            "Accuracy": _ratio(self.tp + self.tn, stable + unstable),
            "TPR": recall,
            "FPR": _ratio(self.fp, unstable),
            "TNR": _ratio(self.tn, unstable),
            "FNR": _ratio(self.fn, stable),
            "TP": self.tp,
            "FP": self.fp,
            "TN": self.tn,
            "FN": self.fn,
        }


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else float("nan")


def classify(label: np.ndarray, prediction: np.ndarray) -> Confusion:
    """Count right and wrong calls of stability.

    Args:
        label, prediction: [n] eV/atom above the hull; a missing prediction is NaN and counts as unstable.
    """
    stable, called = label <= STABLE_AT, prediction <= STABLE_AT  # NaN <= 0 is false: unstable
    return Confusion(
        int((stable & called).sum()),
        int((~stable & called).sum()),
        int((~stable & ~called).sum()),
        int((stable & ~called).sum()),
    )


def regression(label: np.ndarray, prediction: np.ndarray) -> Metrics:
    """Return MAE and RMSE (eV/atom) and R² over the predictions that are there; R² needs two of them."""
    there = ~(np.isnan(label) | np.isnan(prediction))
    label, prediction = label[there], prediction[there]
    if not len(label):
        return {"MAE": float("nan"), "RMSE": float("nan"), "R2": float("nan")}
    error = prediction - label
    spread = float(np.square(label - label.mean()).sum())
    r2 = 1 - float(np.square(error).sum()) / spread if len(label) > 1 and spread > 0 else float("nan")
    return {"MAE": float(np.abs(error).mean()), "RMSE": float(np.sqrt(np.square(error).mean())), "R2": r2}


def cleaned(e_form_label: np.ndarray, e_form_prediction: np.ndarray) -> np.ndarray:
    """Return the predictions with those absurdly far off as NaN. [n] eV/atom"""
    kept = e_form_prediction.astype(float)
    kept[~(np.abs(kept - e_form_label) <= LARGEST_ERROR)] = np.nan
    return kept


def aligned(labels: Labels, predictions: Mapping[str, float]) -> np.ndarray:
    """Return predictions in the order of the labels, NaN where there is none. [n]

    Raises:
        ValueError: an id that the test set does not have.
    """
    unknown = set(predictions) - set(labels.ids)
    if unknown:
        raise ValueError(f"materials not in the test set: {', '.join(sorted(unknown)[:5])}")
    return np.array([predictions.get(i, np.nan) for i in labels.ids], dtype=float)


def score(labels: Labels, e_form: np.ndarray, prevalence: float | None = None) -> dict[str, Metrics]:
    """Return the metrics of the suite's three subsets, not rounded.

    Args:
        e_form: [n] eV/atom, predicted formation energies in the order of the labels, NaN where missing.
        prevalence: denominator of DAF for unique prototypes and the most stable; ``WBM_PREVALENCE`` on the suite's own
            test set; of the labels, not rounded, where not given.
    """
    if prevalence is None:
        prevalence = labels.prevalence()
    prediction = np.round(cleaned(labels.e_form, e_form), DECIMALS)
    e_form_label = np.round(labels.e_form, DECIMALS)
    label = np.round(labels.e_above_hull, DECIMALS)
    distance = label + prediction - e_form_label
    unique = np.flatnonzero(labels.is_unique)
    # NaN sorts last: a missing prediction enters the most stable only where there are too few others.
    most_stable = unique[np.argsort(distance[unique], kind="stable")[:N_MOST_STABLE]]
    found = {}
    for name, rows in ((FULL, np.arange(len(label))), (UNIQUE, unique), (MOST_STABLE, most_stable)):
        counts = classify(label[rows], distance[rows])
        found[name] = {
            **counts.metrics(None if name == FULL else prevalence),
            **regression(label[rows], distance[rows]),
            "missing_preds": int(np.isnan(distance[rows]).sum()),
        }
    return found
