"""The element references that a run begins with: fitted on its training labels, or those of what it starts from."""

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from mffm.config.recipe import Recipe
from mffm.data import references
from mffm.data.store import Store
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY, N_ELEMENTS
from mffm.release import Loaded, refit_references

STATISTICS_FRAMES = 2000  # frames that a pool, or all of them, give to a statistic


def fit_references(
    recipe: Recipe, store: Store, fidelities: FidelityTable, rows: dict[str, np.ndarray], base: Loaded | None
) -> references.ElementReferences:
    """Return the element references of a run.

    A fidelity that the base has keeps the base's: its weights were trained against them. One that starts from another
    of the base (``model.init_from``) gets references fitted on what the base's predictions leave of its labels: it
    starts as its parent with refitted references, not thousands of eV off, unless ``references.refit`` is false.
    """
    if base is None:
        return _without_d3(references.fit(store, fidelities.names, rows, recipe.references), recipe, store, rows)
    refitted = {}
    refit = recipe.references.refit
    for name, parent in recipe.model.init_from.items():
        labelled = rows[name][store.has(name, ENERGY)[rows[name]]]
        if name not in recipe.references.given and (len(labelled) or not refit):
            parents = base.spec.references.array([parent])[0]
            values = refit_references(base, store, labelled, name, parent) if refit else parents
            refitted[name] = {chemical_symbols[z]: float(values[z]) for z in np.flatnonzero(~np.isnan(values))}
    old = [n for n in fidelities.names if n in base.fidelities and n not in {*refitted, *recipe.references.given}]
    kept = {n: _kept(recipe, store, base, n, rows[n]) for n in old}
    config = recipe.references.model_copy(update={"given": {**recipe.references.given, **refitted, **kept}})
    result = references.fit(store, fidelities.names, rows, config)
    for name in kept:
        result.report[name].update(
            method="kept", reason=f"those of {base.path}, which the weights were trained against"
        )
    for name in refitted:
        origin = f"of {base.path} at {recipe.model.init_from[name]!r}"
        result.report[name].update(
            method="refitted" if refit else "kept",
            reason=f"fitted on the labels minus the predictions {origin}" if refit else f"those {origin}, not refitted",
        )
    return _without_d3(result, recipe, store, rows)


def _kept(recipe: Recipe, store: Store, base: Loaded, name: str, rows: np.ndarray) -> dict[str, float]:
    """Return the base's references of a fidelity; of a new element one that is fitted to what is left of its labels."""
    values = base.spec.references.array([name])[0].copy()
    new = [atomic_numbers[symbol] for symbol in (recipe.fine_tune.elements if recipe.fine_tune else ())]
    values[new] = np.nan  # the base has the ones of the elements that they start from there
    labelled = rows[store.has(name, ENERGY)[rows]] if len(rows) else rows
    if new and len(labelled) and (store.composition(labelled)[:, new] > 0).any():
        values = refit_references(base, store, labelled, name, name, values)
    return {chemical_symbols[z]: float(values[z]) for z in np.flatnonzero(~np.isnan(values))}


def _without_d3(
    fitted: references.ElementReferences, recipe: Recipe, store: Store, rows: dict[str, np.ndarray]
) -> references.ElementReferences:
    """Take off the references that were fitted on labels what the term for DFT-D3 adds to them.

    Least squares of the dispersion energies per atom on composition, over frames of all pools: since it is linear, that
    equals a fit on labels less DFT-D3 where the frames are the same. References that were given or kept are left alone.
    """
    if not recipe.model.d3:
        return fitted
    from mffm.models.d3 import dispersion

    chosen = _some_of_each_element(store, np.unique(np.concatenate(list(rows.values()))))
    composition = store.composition(chosen).astype(np.float64)
    per_atom = 1 / composition.sum(1)
    for name, config in recipe.model.d3.items():
        entry = fitted.report[name]
        if entry["method"] not in ("fit", "paired"):
            continue
        geometries = (store.geometry(int(row)) for row in chosen)
        energies = np.array([dispersion(config, f"model.d3.{name}", *g).atom_energies.sum() for g in geometries])
        fractions = composition * per_atom[:, None]
        fitted.table[name] = fitted.table[name] - np.linalg.lstsq(fractions, energies * per_atom, rcond=None)[0]
        entry["reason"] += f"; less a fit of DFT-D3 on the compositions of {len(chosen)} structures"
    return fitted


def _some_of_each_element(store: Store, rows: np.ndarray) -> np.ndarray:
    """Return evenly spaced rows, and the first few with each element."""
    chosen = [rows[:: max(len(rows) // STATISTICS_FRAMES, 1)]]
    found = np.zeros(N_ELEMENTS + 1, np.int64)
    for start in range(0, len(rows), 10_000):
        part = rows[start : start + 10_000]
        has = store.composition(part) > 0
        few = has & (found + has.cumsum(0) <= 3)
        chosen.append(part[few.any(1)])
        found += has.sum(0)
    return np.unique(np.concatenate(chosen))
