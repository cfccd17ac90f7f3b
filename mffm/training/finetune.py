"""What a fine-tuning takes from its release: fidelities, heads, parents of new fidelities, elements, replay.

A recipe with a section ``fine_tune`` leaves these open; ``resolved``, ``with_elements`` and ``with_parents`` fill them
in before the run is built, and the resolved recipe in the run's folder says what came out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import nn

from mffm.batch import reference_energy
from mffm.config.base import apply_overrides, read_yaml, validate
from mffm.config.model import DensityConfig
from mffm.config.recipe import FineTuneSection, PoolConfig, Recipe
from mffm.data.pools import Pool, choose
from mffm.data.references import ElementReferences
from mffm.data.store import Store
from mffm.errors import InputError, known
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY, FORCES, N_ELEMENTS, STRESS, Property
from mffm.loss import ErrorSums
from mffm.release import Loaded, edit, load, refit_references, systems_at
from mffm.training import predicted

MOST_ROWS = 200  # training structures that parents are compared on

Errors = dict[Property, float]  # mean absolute errors, eV/atom, eV/Å, eV/Å³


@dataclass(frozen=True)
class Start:
    """How a fine-tuning begins.

    Attributes:
        base: the release, with heads of their own where it had none, and rows for new elements.
        candidates: new fidelity → fidelity of the release → errors on its training labels, references refitted; of
            those that the recipe names no parent for.
        split_heads: whether the shared head was copied for each fidelity.
    """

    base: Loaded
    candidates: dict[str, dict[str, Errors]] = field(default_factory=dict)
    split_heads: bool = False


def recipe_of(release: Path | str, recipe: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe of a fine-tuning YAML, whose model is the release's.

    Raises:
        InputError: faults of the YAML; it says something about the model that is the release's to say.
    """
    content = apply_overrides(read_yaml(recipe), overrides)
    own = content.get("model") or {}
    others = sorted(set(own) - {"init_from", "d3"}) if isinstance(own, dict) else []
    if others:
        raise InputError(
            f"{recipe}: model.{others[0]}: a fine-tuning has the model of its release; leave it out (of model, "
            "init_from and d3 may be given)"
        )
    base = load(release)
    model = base.spec.model.model_dump(mode="json")
    model["heads"]["init_from"] = {}
    section = content.get("fine_tune") or {}
    if isinstance(own, dict) and isinstance(section, dict):
        content["model"] = {**model, "init_from": own.get("init_from", {}), "d3": {**model["d3"], **own.get("d3", {})}}
        content["fine_tune"] = {**section, "fidelities": list(base.fidelities.names)}
    content["start_from"] = str(release)
    return validate(Recipe, content, str(recipe))


def resolved(recipe: Recipe, base: Loaded, store: Store) -> tuple[Recipe, Start, Store]:
    """Return the recipe with the release's fidelities and the pools of the replay, and the store as the run sees it.

    Doing it again changes nothing: a run that was killed before its first checkpoint starts from its resolved recipe.

    Raises:
        InputError: a level of theory, conditioning or heads that differ; nothing to replay.
    """
    if not base.potential.is_conservative:
        raise InputError(
            f"{base.path}: its forces are direct, which fine_tune is not for; start from it with start_from alone"
        )
    names = base.fidelities.names
    for name in recipe.trained:
        store.fidelities.index(name)
        if name in names and store.fidelities[name].level_of_theory != base.fidelities[name].level_of_theory:
            raise InputError(
                f"fidelity {name!r} is {store.fidelities[name].level_of_theory!r} in {store.path} and "
                f"{base.fidelities[name].level_of_theory!r} in {base.path}: give the data's another name, so that it "
                "becomes a fidelity of its own"
            )
    _require_same_readout(recipe, base)
    recipe = _with(recipe, fidelities=list(names))
    before = base
    if len(recipe.fidelities) > 1:
        base = edit.with_own_heads(base)
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"heads": base.spec.model.heads})})
    recipe, store = _replayed(recipe, base, store)
    return recipe, Start(base, split_heads=base is not before), store


def _section(recipe: Recipe) -> FineTuneSection:
    assert recipe.fine_tune is not None
    return recipe.fine_tune


def _with(recipe: Recipe, **values: Any) -> Recipe:
    return recipe.model_copy(update={"fine_tune": _section(recipe).model_copy(update=values)})


def _require_same_readout(recipe: Recipe, base: Loaded) -> None:
    """Raises:
    InputError: the recipe's conditioning, heads or ZBL are not those of the release.
    """
    theirs = base.spec.model
    of_run = edit.with_own_heads(base).spec.model.heads  # of a run that goes on from its resolved recipe
    found: list[tuple[str, Any, list[Any]]] = [
        ("conditioning", recipe.model.conditioning, [theirs.conditioning]),
        ("heads", recipe.model.heads, [theirs.heads, of_run]),
        ("zbl", recipe.model.zbl, [theirs.zbl]),
    ]
    for name, mine, allowed in found:
        plain = [x.model_copy(update={"init_from": {}}) if name == "heads" else x for x in (mine, *allowed)]
        if plain[0] not in plain[1:]:
            raise InputError(
                f"model.{name} is {_shown(plain[0])}, but {base.path} has {_shown(plain[1])}: a fine-tuning has the "
                "model of its release; `mffm finetune` takes it from there"
            )


def _shown(value: Any) -> str:
    return str(value.model_dump(mode="json", exclude_defaults=True) if hasattr(value, "model_dump") else value)


def _replayed(recipe: Recipe, base: Loaded, store: Store) -> tuple[Recipe, Store]:
    """Add a pool for each fidelity of the release that has none; their shares of the draws are equal."""
    section = _section(recipe)
    if section.replay == "none":
        return recipe, store
    pools = list(recipe.data.plan.pools)
    mine = {p.fidelity for p in pools if p.source != predicted.SOURCE}
    old = [n for n in base.fidelities.names if n not in mine]
    if not old:  # a run that starts again from its resolved recipe, or pools of the user's own choice
        return recipe, store
    if section.replay == "predictions":
        used = {prop for pool in pools for prop in pool.properties}
        properties: list[Property] = [ENERGY, FORCES, *([STRESS] if STRESS in used else [])]
        folder = Path(recipe.run_folder) / predicted.FOLDER
        store = predicted.beside(base, store, old, folder, properties, section.replay_frames)
        known_pools = {p.fidelity for p in pools}
        live = {n: _live(store, n, properties) for n in old if n not in known_pools}
        added = [PoolConfig(fidelity=n, source=predicted.SOURCE, properties=own) for n, own in live.items() if own]
    else:
        counts = store.label_counts("train")
        there = [n for n in old if counts.get(n)]
        if not there:
            raise InputError(
                f"fine_tune.replay: data: {store.path} has no training label of {', '.join(old)}, fidelities of "
                f"{base.path}; add labels with `mffm ingest`, or take replay: predictions"
            )
        most = section.replay_frames
        added = [PoolConfig(fidelity=n, properties=list(counts[n]), max_frames=most) for n in there]
    if added:
        given = [p.weight for p in pools]
        weights = [float(w) for w in given if isinstance(w, int | float)]
        if len(weights) not in (0, len(given)) or any(isinstance(w, dict) for w in given):
            raise InputError(
                "fine_tune.replay: data.plan.pools have weights for some pools only, or such that change with the "
                "step: give one number for each or none, or pools of the old fidelities instead of replay"
            )
        weights = weights or [1.0] * len(pools)
        share = section.replay_share
        own = [(1 - share) * w / sum(weights) for w in weights]
        pools = [p.model_copy(update={"weight": w}) for p, w in zip(pools, own, strict=True)]
        weight: float | dict[int, float] = share / len(added)
        if recipe.heads_first_steps:  # until then only what is new moves
            weight = {0: 0.0, recipe.heads_first_steps: share / len(added)}
        pools += [p.model_copy(update={"weight": weight}) for p in added]
    plan = recipe.data.plan.model_copy(update={"pools": pools})
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"plan": plan})}), store


def _live(store: Store, name: str, properties: Sequence[Property]) -> list[Property]:
    return [p for p in properties if len(store.rows(split="train", source=predicted.SOURCE, fidelity=name, prop=p))]


def with_elements(recipe: Recipe, start: Start, store: Store, pools: Sequence[Pool]) -> Start:
    """Return a start that knows the elements of the pools: each new one as the recipe maps it.

    The new element's row of the embedding is a copy, and so is its reference: of that the refit starts.

    Raises:
        InputError: an element that the release does not know and the recipe does not map, or maps without need or to
            an element that the release does not know either.
    """
    base, elements = start.base, _section(recipe).elements
    covered = set(edit.elements_of(base).tolist())
    place = "fine_tune.elements"
    for new, old in elements.items():
        for symbol in (new, old):
            if not 0 < atomic_numbers.get(symbol, 0) <= N_ELEMENTS:
                raise InputError(f"{place}: {symbol!r} is not an element symbol")
        if atomic_numbers[new] in covered:
            raise InputError(f"{place}: {base.path} knows {new} already; leave it out")
        if atomic_numbers[old] not in covered:
            raise InputError(f"{place}.{new}: {base.path} does not know {old}; it knows: {_symbols(covered)}")
    present = np.zeros(N_ELEMENTS + 1)
    for pool in pools:
        for at in range(0, len(pool.rows), 10_000):
            present += (store.composition(pool.rows[at : at + 10_000]) > 0).sum(0)
    new_ones = [z for z in np.flatnonzero(present).tolist() if z not in covered]
    unmapped = [z for z in new_ones if chemical_symbols[z] not in elements]
    if unmapped and covered:
        told = ", ".join(f"{chemical_symbols[z]} ({int(present[z])} structures)" for z in unmapped)
        example = f"{{{chemical_symbols[unmapped[0]]}: {chemical_symbols[max(covered)]}}}"
        raise InputError(
            f"{base.path} does not know {told}; it knows: {_symbols(covered)}. Leave these structures out, or say from "
            f"which element each starts: {place}={example}"
        )
    if not elements:
        return start
    if not isinstance(base.spec.model.backbone, DensityConfig):
        raise InputError(f"{place} is for the density backbone, this one is {base.spec.model.backbone.kind!r}")
    embedding = base.potential.learned.backbone.elements
    table = {name: values.copy() for name, values in base.spec.references.table.items()}
    assert isinstance(embedding, nn.Embedding)
    with torch.no_grad():
        for new, old in elements.items():
            embedding.weight[atomic_numbers[new]] = embedding.weight[atomic_numbers[old]]
            for values in table.values():
                values[atomic_numbers[new]] = values[atomic_numbers[old]]
    known_references = ElementReferences(table, base.spec.references.report)
    return replace(start, base=replace(base, spec=replace(base.spec, references=known_references)))


def _symbols(numbers: set[int]) -> str:
    return " ".join(chemical_symbols[z] for z in sorted(numbers))


def with_parents(recipe: Recipe, start: Start, store: Store, pools: Sequence[Pool]) -> tuple[Recipe, Start]:
    """Return the recipe with a parent for every new fidelity: the fidelity of the release that predicts it best.

    Best is the smallest product of the errors of energy (after refitted references) and forces on training labels.

    Raises:
        InputError: the recipe names a parent that is not there; no fidelity of the release knows the elements.
    """
    base, found = start.base, dict(recipe.model.init_from)
    for name, parent in found.items():
        if parent not in base.fidelities:
            raise InputError(
                f"model.init_from.{name}: {parent!r} is not a fidelity of {base.path}; it has: "
                f"{known(base.fidelities.names)}"
            )
    candidates: dict[str, dict[str, Errors]] = {}
    for name in recipe.trained:
        if name in base.fidelities or name in found:
            continue
        rows = choose(store, rows_of(pools, name), 0, MOST_ROWS)
        tried = {}
        for old in base.fidelities.names:
            covered = base.spec.references.covers(old, store.composition(rows))
            if covered.all() or len(base.fidelities) == 1:
                tried[old] = refitted_errors(base, store, rows, name, old)
        if not any(tried.values()):
            raise InputError(
                f"fidelity {name!r} is new, and none of {base.path} knows all elements of its labels "
                f"({known(base.fidelities.names)}): name one with model.init_from.{name}"
            )
        found[name] = min(tried, key=lambda old: float(np.prod([max(e, 1e-9) for e in tried[old].values()])))
        candidates[name] = tried
    model = recipe.model.model_copy(update={"init_from": found})
    return recipe.model_copy(update={"model": model}), replace(start, candidates=candidates)


def rows_of(pools: Sequence[Pool], fidelity: str) -> np.ndarray:
    """Return the rows of the pools of a fidelity, ascending. [n] int64"""
    return np.unique(np.concatenate([p.rows for p in pools if p.fidelity == fidelity]))


def refitted_errors(loaded: Loaded, store: Store, rows: np.ndarray, fidelity: str, asked: str) -> Errors:
    """Return the errors of predictions at ``asked`` on labels of ``fidelity``, references refitted to these labels."""
    labelled = rows[store.has(fidelity, ENERGY)[rows]]
    references = refit_references(loaded, store, labelled, fidelity, asked) if len(labelled) else None
    return errors(loaded, store, rows, fidelity, asked, references)


def errors(
    loaded: Loaded, store: Store, rows: np.ndarray, fidelity: str, asked: str, references: np.ndarray | None
) -> Errors:
    """Return the mean absolute errors of predictions at ``asked`` on labels of ``fidelity``.

    Args:
        references: [N_ELEMENTS + 1] eV; None: energies are not compared.
    """
    table = loaded.spec.reference_table()
    index = loaded.fidelities.index(asked)
    table[index] = torch.nan if references is None else torch.as_tensor(references)
    sums = ErrorSums(loaded.fidelities.names)
    for batch in systems_at(loaded, store, rows, fidelity, asked):
        reference = reference_energy(batch, table)
        batch.masks[ENERGY] &= ~reference.isnan()
        wants_stress = loaded.potential.has_stress and bool(batch.masks[STRESS].any())
        sums.add(loaded.potential(batch, forces=True, stress=wants_stress), batch, torch.nan_to_num(reference))
    return {prop: entry["mae"] for prop, entry in sums.errors().get(asked, {}).items()}


def fidelities_of(recipe: Recipe, store: Store, others: FidelityTable) -> FidelityTable:
    """Return the run's fidelities: those that the store lacks as the release, or the run that goes on, has them."""
    names = recipe.fidelities
    return FidelityTable(store.fidelities[n] if n in store.fidelities else others[n] for n in names)


def kept_counts(base: Loaded, counts: Mapping[str, dict[str, int]], recipe: Recipe) -> dict[str, dict[str, int]]:
    """Return fidelity → property → training labels: the release's where none of its own were trained."""
    own = {p.fidelity for p in recipe.data.plan.pools if p.source != predicted.SOURCE}
    return {n: dict(c if n in own else base.spec.label_counts.get(n, {})) for n, c in counts.items()}
