"""The grid of a study: every cell's recipe, and the trainings that cells share."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mffm.config.base import apply_overrides, as_overrides, read_yaml, validate
from mffm.config.recipe import Recipe
from mffm.config.study import StudyConfig
from mffm.data.checks import SAME_LABEL, same_structures, split_leaks, told_pairs
from mffm.data.pools import build_pools
from mffm.data.store import Store, combined_fingerprint
from mffm.errors import InputError
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY
from mffm.study.cells import Judge
from mffm.study.judges import judges_of

LEAST_VALIDATION_FRAMES = 4


@dataclass(frozen=True)
class Training:
    """One run of the study.

    Attributes:
        name: place in the study's folders, ``methods/<method>/n<labels>-s<seed>`` or ``stages/<stage>/s<seed>``.
        after: name of the training whose run this one starts from.
        tuned: dotted name → value that this trial of its cell has; empty where nothing is tuned.
    """

    name: str
    recipe: Recipe
    after: str | None = None
    tuned: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        n_high: frames with high-fidelity labels.
        training: name of the training whose run is judged.
        fidelity: whose labels it is judged on.
        asked: fidelity that the potential is asked for; another one than ``fidelity`` where references are refitted, or
            where it is a difference.
        high_rows: [n_high] rows of the store with the cell's high-fidelity labels, ascending.
        trials: names of the trainings of which the one with the best validation is judged.
        plus: name of the training whose run is added to the potential.
    """

    method: str
    n_high: int
    seed: int
    training: str
    fidelity: str
    asked: str
    high_rows: np.ndarray
    trials: tuple[str, ...]
    plus: str | None = None

    @property
    def name(self) -> str:
        return f"{self.method}/n{self.n_high}-s{self.seed}"

    @property
    def is_refit(self) -> bool:
        return self.asked != self.fidelity and self.plus is None

    @property
    def judged(self) -> list[str]:
        """Names of the trainings whose runs predict together."""
        return [self.training] if self.plus is None else [self.training, self.plus]

    @property
    def draw(self) -> str:
        """Short digest of the cell's high-fidelity frames."""
        return hashlib.sha256(np.ascontiguousarray(self.high_rows, "<i8").tobytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Grid:
    """A study on a store: what is trained, in an order that suits ``after``, what is judged, and by what besides."""

    config: StudyConfig
    store: Store
    trainings: dict[str, Training]
    cells: list[Cell]
    judges: Sequence[Judge] = ()

    def stages_of(self, cell: Cell) -> list[Training]:
        """Return the trainings that a cell's own training started from, and that is added to it; each once."""
        names = dict.fromkeys((self.trainings[cell.training].after, cell.plus))
        return [self.trainings[name] for name in names if name is not None]

    def steps(self, cell: Cell) -> int:
        """Return the optimiser steps of a cell as its recipes have it, those of its stages included."""
        trainings = [self.trainings[cell.training], *self.stages_of(cell)]
        return sum(training.recipe.train.steps for training in trainings)

    def steps_of(self, method: str) -> list[int]:
        """Return the different optimiser steps of a method's cells and trials, ascending."""
        cells = [cell for cell in self.cells if cell.method == method]
        return sorted({self.steps(replace(cell, training=trial)) for cell in cells for trial in cell.trials})


def expand(config: StudyConfig, path: Path, folder: Path) -> Grid:
    """Return the grid of a study YAML.

    Args:
        path: the study YAML, for the place of the base recipe and for messages.
        folder: of the study; runs lie in ``folder/runs/<training>``.

    Raises:
        InputError: a recipe that does not hold, fidelities or splits that the store lacks, more high-fidelity labels
            than there are, structures in two splits, a training that reads what is judged, a judge's file that does
            not hold.
    """
    base_path = path.parent / config.recipe
    base = apply_overrides(read_yaml(base_path), as_overrides(config.changes))
    if base.get("start_from") is not None:
        raise InputError(f"{base_path}: start_from is set by the study itself, from the stages; leave it out")
    recipe = validate(Recipe, base, f"{base_path} with the changes of {path}")
    store = Store(recipe.data.store, recipe.data.layers)
    _check_store(config, store, path)
    fixed = [*as_overrides(config.changes), *as_overrides({"train.threads": 1, "log.group": config.name})]
    maker = _Maker(config, path, read_yaml(base_path), fixed, store, folder)
    trainings: dict[str, Training] = {}
    for name in config.stages:
        for seed in config.seeds:
            training = maker.stage(name, seed)
            trainings[training.name] = training
    cells = []
    for method in config.methods:
        for n_high in maker.counts(method):
            for seed in config.seeds:
                trials, cell = maker.cell(method, n_high, seed, trainings)
                trainings |= {training.name: training for training in trials}
                cells.append(cell)
    _require_untrained(config, trainings, path)
    _require_no_twins(config, store, trainings)
    _require_pools(store, trainings, path)
    judges = judges_of(config, path.parent, store, [training.recipe for training in trainings.values()])
    return Grid(config, store, trainings, cells, judges)


def _require_untrained(config: StudyConfig, trainings: Mapping[str, Training], path: Path) -> None:
    """Refuse a training that reads a split that is judged."""
    for training in trainings.values():
        data = training.recipe.data
        for split in [*(pool.split for pool in data.plan.pools), data.validation_split]:
            kind = next((k for k, judged in config.splits.items() if judged == split), None)
            if kind is not None:
                raise InputError(
                    f"{path}: {training.name} trains or validates on split {split!r}, which is the {kind} split that "
                    "is judged; give its pools another one"
                )


def _require_no_twins(config: StudyConfig, store: Store, trainings: Mapping[str, Training]) -> None:
    """Refuse judged structures that are within 1e-3 Å of one that trains or validates."""
    recipes = [training.recipe for training in trainings.values()]
    read = {p.split for r in recipes for p in r.data.plan.pools} | {r.data.validation_split for r in recipes}
    rows = [
        np.flatnonzero(np.isin(store.split, [store.split_index(s) for s in splits]))
        for splits in (set(config.splits.values()), read)
    ]
    pairs = same_structures(*((store.geometry(int(row)) for row in of_kind) for of_kind in rows))
    if pairs:
        told = told_pairs(store, [(int(rows[0][a]), int(rows[1][b])) for a, b in pairs])
        raise InputError(
            f"{store.path}: {told}; they are the same within 1e-3 Å, and what is judged must not train: put both into "
            "one split of the data YAML, or leave one out, and ingest again"
        )


def _require_pools(store: Store, trainings: Mapping[str, Training], path: Path) -> None:
    """Refuse a pool without labels now, not when its training starts."""
    seen = set()
    for training in trainings.values():
        recipe = training.recipe
        key = tuple((p.fidelity, p.source, p.split, *p.properties) for p in recipe.data.plan.pools)
        if key in seen:
            continue
        seen.add(key)
        try:
            table = FidelityTable([store.fidelities[name] for name in recipe.fidelities])
            build_pools(store, recipe.data.plan, table, recipe.model.backbone.cutoff)
        except InputError as error:
            raise InputError(f"{path}: {training.name}: {store.path}: {error}") from error


def _check_store(config: StudyConfig, store: Store, path: Path) -> None:
    leaks = split_leaks(store)
    if leaks:
        raise InputError(f"{store.path}: {leaks[0]}; a study's test frames must be in no training set: ingest again")
    places = {"high": config.high}
    places |= {f"methods.{name}.fidelity": m.fidelity for name, m in config.methods.items() if m.fidelity}
    judged = {config.high} | {m.fidelity for m in config.methods.values() if m.plus is None}
    for place, fidelity in places.items():
        if fidelity not in store.fidelities:
            raise InputError(
                f"{path}: {place}: {fidelity!r} is not in the store {store.path}, which has "
                f"{', '.join(store.fidelities.names)}; add it with `mffm ingest --add-labels`, or a difference of two "
                "with `mffm difference`"
            )
        if fidelity not in judged:
            continue
        for kind, split in config.splits.items():
            try:
                counts = store.label_counts(split).get(fidelity, {})
            except InputError as error:
                raise InputError(f"{path}: {kind}: {error}; name one of these, or null for ood") from error
            lacking = next((p for p in config.properties if not counts.get(p)), None)
            if lacking:
                raise InputError(
                    f"{path}: {place}: {kind} split {split!r} of {store.path} has no {fidelity} {lacking} labels to "
                    f"judge by; it has {', '.join(f'{n} {p}' for p, n in counts.items()) or 'none of this fidelity'}; "
                    "change properties, or the split"
                )


def pins_of(store: Store, fidelities: Sequence[str]) -> tuple[list[str], str]:
    """Return the layers of a store that have any of the fidelities, and the fingerprint of the store with these."""
    layers = [layer for layer in store.layers if not set(fidelities).isdisjoint(layer.fidelities)]
    fingerprint = combined_fingerprint(
        store.geometry_fingerprint, [(layer.name, layer.fingerprint) for layer in layers]
    )
    return [layer.name for layer in layers], fingerprint


@dataclass(frozen=True)
class _Maker:
    """Makes the recipes of one study."""

    config: StudyConfig
    path: Path
    base: dict[str, Any]
    fixed: list[str]
    store: Store
    folder: Path

    def recipe_of(self, place: str, changes: Mapping[str, Any], own: Mapping[str, Any]) -> Recipe:
        """Return a recipe that pins the store as it is now, but for layers without a fidelity of its own."""
        overrides = [*self.fixed, *as_overrides(changes), *as_overrides(own)]
        recipe = validate(Recipe, apply_overrides(self.base, overrides), f"{self.path}: {place}")
        layers, fingerprint = pins_of(self.store, recipe.fidelities)
        pins = {"layers": layers, "fingerprint": fingerprint}
        return recipe.model_copy(update={"data": recipe.data.model_copy(update=pins)})

    def run(self, training: str) -> str:
        return str(self.folder / "runs" / training)

    def stage(self, name: str, seed: int) -> Training:
        place = f"stages/{name}/s{seed}"
        own = {"name": f"{self.config.name}-{name}-s{seed}", "run": self.run(place), "seed": seed}
        recipe = self.recipe_of(f"stages.{name}", self.config.stages[name].changes, own)
        if self.config.high in recipe.fidelities:
            raise InputError(
                f"{self.path}: stages.{name}: has a pool of {self.config.high!r}; a stage is shared by cells with "
                "different numbers of these labels, so it has none: change data.plan.pools"
            )
        return Training(place, recipe)

    def counts(self, method: str) -> list[int]:
        """Return the numbers of high-fidelity frames of a method, ascending; `all` resolved."""
        fidelity = self.config.methods[method].fidelity or self.config.high
        resolved = set()
        for n in self.config.methods[method].n_high or self.config.n_high:
            rows = self._high_rows(method, fidelity, None if n == "all" else n, self.config.seeds[0])
            if n != "all" and len(rows) < n:
                raise InputError(
                    f"{self.path}: methods.{method}: {n} frames with {fidelity} labels are asked for, the training "
                    f"split has {len(rows)}; lower n_high, or use `all`"
                )
            resolved.add(len(rows))
        return sorted(resolved)

    def cell(
        self, method: str, n_high: int, seed: int, trainings: Mapping[str, Training]
    ) -> tuple[list[Training], Cell]:
        """Return the trainings of which one judges a cell, its own trials or a stage's training, and the cell."""
        spec = self.config.methods[method]
        fidelity = spec.fidelity or self.config.high
        rows = self._high_rows(method, fidelity, n_high, seed)
        if spec.refit is not None:
            training = self._stage_of_one(f"methods.{method}.refit", trainings[f"stages/{spec.refit}/s{seed}"])
            unlabelled = int((~self.store.has(fidelity, ENERGY)[rows]).sum())
            if unlabelled:
                raise InputError(
                    f"{self.path}: methods.{method}.refit: {unlabelled} of the {n_high} frames have no {fidelity} "
                    "energy to refit references to"
                )
            asked = training.recipe.fidelities[0]
            return [training], Cell(method, n_high, seed, training.name, fidelity, asked, rows, (training.name,))
        place = f"methods/{method}/n{n_high}-s{seed}"
        stage = f"stages/{spec.start_from}/s{seed}" if spec.start_from else None
        trials = []
        for k, tuned in enumerate(self.config.trials(method)):
            name = f"{place}-t{k}" if tuned else place
            recipe = self._recipe_at(method, fidelity, n_high, seed, name, stage, tuned)
            best = recipe.train.best
            if best.endswith("loss") and any(key.split(".")[0] == "loss" for key in tuned):
                raise InputError(
                    f"{self.path}: methods.{method}: the trials have losses of their own, so {best} (train.best) "
                    f"cannot choose between them; take an error, e.g. train.best: val/{fidelity}/forces_mae"
                )
            trials.append(Training(name, recipe, stage, tuned))
        names = tuple(training.name for training in trials)
        if spec.plus is None:
            return trials, Cell(method, n_high, seed, names[0], fidelity, fidelity, rows, names)
        plus = self._stage_of_one(f"methods.{method}.plus", trainings[f"stages/{spec.plus}/s{seed}"])
        self._require_sum(f"methods.{method}.plus", fidelity, plus.recipe.fidelities[0], rows)
        return trials, Cell(method, n_high, seed, names[0], self.config.high, fidelity, rows, names, plus.name)

    def _stage_of_one(self, place: str, training: Training) -> Training:
        """Return the training of a stage; it must know one fidelity, which it is asked for."""
        if len(training.recipe.fidelities) != 1:
            raise InputError(
                f"{self.path}: {place}: stage {training.name.split('/')[1]!r} trains "
                f"{', '.join(training.recipe.fidelities)}; a stage of one fidelity is needed to ask it for that"
            )
        return training

    def _require_sum(self, place: str, difference: str, low: str, rows: np.ndarray) -> None:
        """Energies of a difference and of the stage's fidelity must add up to those of `high`."""
        high, has = self.config.high, self.store.has
        rows = rows[(has(difference, ENERGY) & has(low, ENERGY) & has(high, ENERGY))[rows]]
        energies = [self.store.energies(name, rows) for name in (difference, low, high)]
        off = np.abs(energies[0] + energies[1] - energies[2]) / self.store.n_atoms[rows]
        if off.max(initial=0) > SAME_LABEL[ENERGY]:
            raise InputError(
                f"{self.path}: {place}: energies of {difference} and of {low}, which the stage trains, do not add up "
                f"to {high}: {off.max():.3g} eV/atom off at row {rows[off.argmax()]} of {self.store.path}; give "
                f"fidelity: the difference {high} − {low}, which `mffm difference` makes"
            )

    def _recipe_at(
        self, method: str, fidelity: str, n_high: int | None, seed: int, place: str, stage: str | None,
        tuned: Mapping[str, Any],
    ) -> Recipe:  # fmt: skip
        changes = {**self.config.methods[method].changes, **tuned}
        name = f"{self.config.name}-{method}-{place.rpartition('/')[2]}"
        own: dict[str, Any] = {"name": name, "run": self.run(place), "seed": seed}
        if stage is not None:
            own["start_from"] = self.run(stage)
        elif changes.get("model.init_from"):
            raise InputError(f"{self.path}: methods.{method}: model.init_from needs start_from, the name of a stage")
        # start_from must be there before model.init_from can be checked, so the pools are read from the raw content.
        content = apply_overrides(self.base, [*self.fixed, *as_overrides(changes)])
        pools = content.get("data", {}).get("plan", {}).get("pools")
        high = [
            i for i, pool in enumerate(pools if isinstance(pools, list) else [])
            if isinstance(pool, dict) and pool.get("fidelity") == fidelity
        ]  # fmt: skip
        for i in high:
            own |= {f"data.plan.pools.{i}.max_frames": n_high, f"data.plan.pools.{i}.seed": seed}
        if self.config.validation_share is not None and n_high is not None:
            n_validation = math.ceil(self.config.validation_share * n_high - 1e-9)
            own["data.validation_max_frames"] = max(n_validation, LEAST_VALIDATION_FRAMES)
        recipe = self.recipe_of(f"methods.{method}", changes, own)
        if len(high) != 1 and not (high and self.config.methods[method].n_high == ["all"]):
            raise InputError(
                f"{self.path}: methods.{method}: {len(high)} pools of {fidelity!r}, one is needed, whose max_frames "
                f"the study sets (several with n_high: [all]); pools: "
                f"{', '.join(p.fidelity for p in recipe.data.plan.pools)}"
            )
        return recipe

    def _high_rows(self, method: str, fidelity: str, n_high: int | None, seed: int) -> np.ndarray:
        """Return the rows that a method's pools of high-fidelity labels have; of the base recipe's for a refit."""
        spec = self.config.methods[method]
        if spec.refit is not None:
            recipe = self.recipe_of(f"methods.{method}", {}, {"seed": seed})
        else:
            stage = f"stages/{spec.start_from}/s{seed}" if spec.start_from else None
            tuned = self.config.trials(method)[0]
            recipe = self._recipe_at(method, fidelity, n_high, seed, "rows", stage, tuned)
        pools = [p for p in recipe.data.plan.pools if p.fidelity == fidelity]
        if not pools:
            raise InputError(f"{self.path}: methods.{method}.refit: the base recipe has no pool of {fidelity!r}")
        entries = [pool.model_copy(update={"max_frames": n_high, "seed": seed}) for pool in pools]
        plan = recipe.data.plan.model_copy(update={"pools": entries})
        table = FidelityTable([self.store.fidelities[fidelity]])
        built = build_pools(self.store, plan, table, recipe.model.backbone.cutoff)
        return np.unique(np.concatenate([pool.rows for pool in built]))
