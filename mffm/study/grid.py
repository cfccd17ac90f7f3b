"""The grid of a study: every cell's recipe, and the trainings that cells share."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mffm.config.base import apply_overrides, as_overrides, read_yaml, validate
from mffm.config.recipe import Recipe
from mffm.config.study import StudyConfig
from mffm.data.checks import split_leaks
from mffm.data.pools import build_pools
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY
from mffm.study.cells import Judge
from mffm.study.judges import judges_of


@dataclass(frozen=True)
class Training:
    """One run of the study.

    Attributes:
        name: place in the study's folders, ``methods/<method>/n<labels>-s<seed>`` or ``stages/<stage>/s<seed>``.
        after: name of the training whose run this one starts from.
    """

    name: str
    recipe: Recipe
    after: str | None = None


@dataclass(frozen=True)
class Cell:
    """One point of the grid.

    Attributes:
        n_high: frames with high-fidelity labels.
        training: name of the training whose run is judged.
        fidelity: whose labels it is judged on.
        asked: fidelity that the potential is asked for; another one than ``fidelity`` where references are refitted.
        high_rows: [n_high] rows of the store with the cell's high-fidelity labels, ascending.
    """

    method: str
    n_high: int
    seed: int
    training: str
    fidelity: str
    asked: str
    high_rows: np.ndarray

    @property
    def name(self) -> str:
        return f"{self.method}/n{self.n_high}-s{self.seed}"

    @property
    def is_refit(self) -> bool:
        return self.asked != self.fidelity

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

    def stage_of(self, cell: Cell) -> Training | None:
        """Return the training that a cell's own training started from."""
        after = self.trainings[cell.training].after
        return None if after is None else self.trainings[after]

    def steps(self, cell: Cell) -> int:
        """Return the optimiser steps of a cell as its recipes have it, those of its stage included."""
        stage = self.stage_of(cell)
        return self.trainings[cell.training].recipe.train.steps + (stage.recipe.train.steps if stage else 0)


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
    pinned = [*as_overrides(config.changes), *as_overrides(_pins(config, store))]
    maker = _Maker(config, path, read_yaml(base_path), pinned, store, folder)
    trainings: dict[str, Training] = {}
    for name in config.stages:
        for seed in config.seeds:
            training = maker.stage(name, seed)
            trainings[training.name] = training
    cells = []
    for method in config.methods:
        for n_high in maker.counts(method):
            for seed in config.seeds:
                training, cell = maker.cell(method, n_high, seed, trainings)
                trainings[training.name] = training
                cells.append(cell)
    _require_untrained(config, trainings, path)
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


def _pins(config: StudyConfig, store: Store) -> dict[str, Any]:
    """Return what every recipe of the study has: one thread a process, one group, the store as it is now."""
    layers = [layer.name for layer in store.layers]
    return {
        "train.threads": 1, "log.group": config.name, "data.layers": layers, "data.fingerprint": store.fingerprint
    }  # fmt: skip


def _check_store(config: StudyConfig, store: Store, path: Path) -> None:
    leaks = split_leaks(store)
    if leaks:
        raise InputError(f"{store.path}: {leaks[0]}; a study's test frames must be in no training set: ingest again")
    places = {"high": config.high}
    places |= {f"methods.{name}.fidelity": m.fidelity for name, m in config.methods.items() if m.fidelity}
    for place, fidelity in places.items():
        if fidelity not in store.fidelities:
            raise InputError(
                f"{path}: {place}: {fidelity!r} is not in the store {store.path}, which has "
                f"{', '.join(store.fidelities.names)}"
            )
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
        overrides = [*self.fixed, *as_overrides(changes), *as_overrides(own)]
        return validate(Recipe, apply_overrides(self.base, overrides), f"{self.path}: {place}")

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

    def cell(self, method: str, n_high: int, seed: int, trainings: Mapping[str, Training]) -> tuple[Training, Cell]:
        """Return the training that a cell is judged by, its own or a stage's, and the cell."""
        spec = self.config.methods[method]
        fidelity = spec.fidelity or self.config.high
        rows = self._high_rows(method, fidelity, n_high, seed)
        if spec.refit is not None:
            training = trainings[f"stages/{spec.refit}/s{seed}"]
            if len(training.recipe.fidelities) != 1:
                raise InputError(
                    f"{self.path}: methods.{method}.refit: stage {spec.refit!r} trains "
                    f"{', '.join(training.recipe.fidelities)}; a stage of one fidelity is needed to ask it for that"
                )
            unlabelled = int((~self.store.has(fidelity, ENERGY)[rows]).sum())
            if unlabelled:
                raise InputError(
                    f"{self.path}: methods.{method}.refit: {unlabelled} of the {n_high} frames have no {fidelity} "
                    "energy to refit references to"
                )
            return training, Cell(method, n_high, seed, training.name, fidelity, training.recipe.fidelities[0], rows)
        place = f"methods/{method}/n{n_high}-s{seed}"
        stage = f"stages/{spec.start_from}/s{seed}" if spec.start_from else None
        recipe = self._recipe_at(method, fidelity, n_high, seed, place, stage)
        return Training(place, recipe, stage), Cell(method, n_high, seed, place, fidelity, fidelity, rows)

    def _recipe_at(
        self, method: str, fidelity: str, n_high: int | None, seed: int, place: str, stage: str | None
    ) -> Recipe:
        changes = self.config.methods[method].changes
        own: dict[str, Any] = {
            "name": f"{self.config.name}-{method}-n{n_high or 'all'}-s{seed}", "run": self.run(place), "seed": seed
        }  # fmt: skip
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
            recipe = self._recipe_at(method, fidelity, n_high, seed, "rows", stage)
        pools = [p for p in recipe.data.plan.pools if p.fidelity == fidelity]
        if not pools:
            raise InputError(f"{self.path}: methods.{method}.refit: the base recipe has no pool of {fidelity!r}")
        entries = [pool.model_copy(update={"max_frames": n_high, "seed": seed}) for pool in pools]
        plan = recipe.data.plan.model_copy(update={"pools": entries})
        table = FidelityTable([self.store.fidelities[fidelity]])
        built = build_pools(self.store, plan, table, recipe.model.backbone.cutoff)
        return np.unique(np.concatenate([pool.rows for pool in built]))
