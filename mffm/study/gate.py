"""Is a low fidelity of use for a high one? Energies after element references, and forces, on frames that have both."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mffm.data.checks import element_fit
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.keys import ENERGY, FORCES
from mffm.study.grid import Grid

FRAMES = 2000  # at most, evenly spaced over the training split
LEAST_R2 = 0.5  # below it the low energies say less of the high ones than they leave open: an error in the data, mostly
LEAST_FRAMES = 10


@dataclass(frozen=True)
class Gate:
    """How two fidelities compare on the training frames that have both.

    Attributes:
        r2: of the high energies per atom by the low ones, a least-squares fit of composition taken off both; None with
            too few frames.
        force_cosine: cosine between the force vectors of all frames; None without both forces.
    """

    low: str
    n_frames: int
    r2: float | None
    force_cosine: float | None
    split: str = "train"


def compare(store: Store, split: str, low: str, high: str) -> Gate:
    """Return how ``low`` compares to ``high`` on a split."""
    both = np.flatnonzero(
        store.has(low, ENERGY) & store.has(high, ENERGY) & (store.split == store.split_index(split))
    )  # fmt: skip
    rows = both[:: max(len(both) // FRAMES, 1)]
    counts = store.composition(rows)
    n_elements = int((counts.sum(0) > 0).sum()) if len(rows) else 0
    if len(rows) < LEAST_FRAMES + n_elements:
        return Gate(low, len(rows), None, None, split)
    residual_low, residual_high = (element_fit(counts, store.energies(name, rows))[1] for name in (low, high))
    spread = float(np.square(residual_high).sum())
    r2 = 1 - float(np.square(residual_high - residual_low).sum()) / spread if spread > 0 else None
    products = np.zeros(3)
    for row in rows:
        a, b = (store.labels(int(row), name).get(FORCES) for name in (low, high))
        if a is not None and b is not None:
            a, b = a.astype(np.float64), b.astype(np.float64)
            products += [(a * b).sum(), (a * a).sum(), (b * b).sum()]
    cosine = float(products[0] / np.sqrt(products[1] * products[2])) if products[1] * products[2] > 0 else None
    return Gate(low, len(rows), r2, cosine, split)


def gates(grid: Grid) -> list[Gate]:
    """Return how every other fidelity that the study trains compares to the high one.

    Raises:
        InputError: R² of the energies below 0.5, of a fidelity that the study does not name as weak.
    """
    high = grid.config.high
    own = {cell.fidelity for cell in grid.cells} | {cell.asked for cell in grid.cells if not cell.is_refit}
    lows = dict.fromkeys(
        (pool.fidelity, pool.split) for training in grid.trainings.values() for pool in training.recipe.data.plan.pools
        if pool.fidelity not in own
    )  # fmt: skip
    found = [compare(grid.store, split, low, high) for low, split in lows]
    _require([gate for gate in found if gate.low not in grid.config.weak], high)
    return found


def _require(found: Sequence[Gate], high: str) -> None:
    for gate in found:
        if gate.r2 is not None and gate.r2 < LEAST_R2:
            raise InputError(
                f"{gate.low} says little of {high}: R² of the energies per atom after element references is "
                f"{gate.r2:.2f} over {gate.n_frames} frames of split {gate.split!r} that have both, {LEAST_R2} is the "
                "least; look for a wrong unit, charge, periodicity or order of frames, or name it in `weak` if it is "
                "meant to be"
            )
