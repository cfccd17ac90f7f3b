"""Systems of a store as a loaded potential reads them, and references refitted on its predictions."""

from collections.abc import Iterator

import numpy as np
import torch

from mffm.batch import Batch
from mffm.data.loader import collate, evaluation_batches
from mffm.data.store import Store
from mffm.fidelity import FidelityTable
from mffm.keys import N_ELEMENTS
from mffm.release.loading import Loaded

EVALUATION_EDGES = 20_000  # edges of a forward without training; bounds the memory


def systems_at(loaded: Loaded, store: Store, rows: np.ndarray, fidelity: str, asked: str) -> Iterator[Batch]:
    """Yield batches with the labels of one fidelity, put to the potential as another (or the same)."""
    own = FidelityTable([store.fidelities[fidelity]])
    index = loaded.fidelities.index(asked)
    for batch in evaluation_batches(store, rows, fidelity, own, loaded.spec.model.backbone.cutoff, EVALUATION_EDGES):
        yield batch.with_fidelity(torch.full_like(batch.fidelity_idx, index))


def same_systems(loaded: Loaded, store: Store, batch: Batch, fidelity: str, asked: str) -> Batch:
    """Return the systems of a batch from ``systems_at``, in its order, as another potential reads them; no labels."""
    own, n = FidelityTable([store.fidelities[fidelity]]), batch.n_systems
    cutoff = loaded.spec.model.backbone.cutoff
    systems = collate(store, batch.rows.cpu().numpy(), np.zeros(n, np.int64), own, [()] * n, cutoff)
    return systems.with_fidelity(torch.full_like(systems.fidelity_idx, loaded.fidelities.index(asked)))


def refit_references(
    loaded: Loaded, store: Store, rows: np.ndarray, fidelity: str, asked: str, fixed: np.ndarray | None = None
) -> np.ndarray:
    """Fit references of one fidelity for a potential that predicts another: least squares on label − prediction.

    The strongest use of a potential of another level without training: what remains is what references cannot mend.

    Args:
        fixed: [N_ELEMENTS + 1] eV; elements that have a value here keep it.

    Returns:
        [N_ELEMENTS + 1] float64, eV; NaN for elements that the rows lack and that are not fixed.
    """
    rows = np.sort(rows)
    energies: dict[int, float] = {}
    for batch in systems_at(loaded, store, rows, fidelity, asked):
        prediction = loaded.potential(batch, forces=False)
        energies.update(zip(batch.rows.tolist(), prediction.energy.tolist(), strict=True))
    composition = store.composition(rows)
    present = np.flatnonzero(composition.sum(0) > 0)
    # From the asked fidelity's references on: what few labels leave undetermined stays as it was there.
    start = np.nan_to_num(loaded.spec.references.array([asked])[0])
    free = present
    if fixed is not None:
        start = np.where(np.isnan(fixed), start, fixed)
        free = present[np.isnan(fixed[present])]
    residual = store.energies(fidelity, rows) - np.array([energies[int(r)] for r in rows]) - composition @ start
    references = np.full(N_ELEMENTS + 1, np.nan) if fixed is None else fixed.copy()
    references[present] = start[present]
    references[free] += np.linalg.lstsq(composition[:, free], residual, rcond=None)[0]
    return references
