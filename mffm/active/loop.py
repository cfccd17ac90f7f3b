"""The loop itself: every stage leaves a file when it is done, and what is done is not done again."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mffm.active import task
from mffm.config.active import ActiveConfig
from mffm.config.base import apply_overrides, as_overrides, dump, read_yaml
from mffm.config.base import load as load_config
from mffm.data.pools import choose
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.evaluate import parity
from mffm.executor import Executor, Job, State, locked
from mffm.keys import ENERGY
from mffm.label import levels
from mffm.label import run as labelling
from mffm.label.journal import Limits
from mffm.label.structures import Source
from mffm.label.work import Request
from mffm.release import load, read_json, save, write_json, write_text
from mffm.select import report as selection_report
from mffm.select import run as selection
from mffm.select.pool import Rows

CONFIG, CHOSEN, ERRORS, RELEASE = "config.yaml", "chosen.json", "errors.json", "release"
JOB = "fine-tune"


@dataclass(frozen=True)
class Means:
    """How work is done: processes for labels, an executor for trainings, both on a cluster where there is one.

    Attributes:
        cluster: executor of labels in their folder → tasks of an array, and how many; None: this machine.
        progress: called with what is counted, how many are done, and of how many where it is known.
    """

    executor: Executor
    workers: int
    cluster: Callable[[Path], tuple[Executor, int]] | None
    say: Callable[[str], None]
    progress: Callable[[str, int, int | None], None]


class Loop:
    """An active-learning configuration in its folder."""

    def __init__(self, config: ActiveConfig, source: Path, folder: Path, means: Means):
        """Args:
        source: the YAML, to which the recipe's path is relative.

        Raises:
            InputError: the folder is of another configuration; store, level or recipe are not there.
        """
        self.config, self.folder, self.means = config, folder, means
        self.recipe = source.parent / config.recipe
        self.fidelity = levels.find(config.label.level, config.label.fidelity).fidelity.name
        self.store_path = Path(config.store)
        load(config.release).fidelities.index(config.asked)
        self._recipe_content(1)  # a mistake in it is told before labels are paid for
        for split, n in (("train", config.n * config.rounds), ("val", config.validation), ("test", config.test or 2)):
            there = len(self.store.rows(split=split))
            if there < n:
                raise InputError(
                    f"{config.store}: split {split!r} has {there} structures, {n} are asked for; ask for fewer (n, "
                    "rounds, validation, test), or ingest more"
                )
        self._bind()

    @property
    def store(self) -> Store:
        """The store as it is now: labels are added to it."""
        return Store(self.store_path)

    def _bind(self) -> None:
        path = self.folder / CONFIG
        if path.is_file():
            before, now = (c.model_dump(mode="json") for c in (load_config(ActiveConfig, path), self.config))
            changed = [key for key in now if before[key] != now[key] and key != "rounds"]
            if changed:
                raise InputError(
                    f"{self.folder}: begun with {changed[0]}: {before[changed[0]]!r}, now {now[changed[0]]!r}; give "
                    "another --folder, or the same YAML (rounds may grow)"
                )
            if self.config.rounds < before["rounds"]:
                return
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(path, dump(self.config))

    def run(self) -> list[dict[str, Any]]:
        """Do what is left; return what each round came to.

        Raises:
            InputError: bad input at any stage; another process is at work in the folder.
        """
        with locked(self.folder / "lock"):
            self._hold()
            return [self._round(number) for number in range(1, self.config.rounds + 1)]

    def place(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.folder / f"round-{number:02d}"

    def _round(self, number: int) -> dict[str, Any]:
        place = self.place(number)
        if not (place / ERRORS).is_file():
            place.mkdir(exist_ok=True)
            rows = self._choose(number)
            self._label(rows, f"{self.config.name}-{number:02d}")
            self._fine_tune(number)
            self._judge(number)
        found = read_json(place / ERRORS)
        self.means.say(f"round {number}: {found['n_labels']} labels; {_shown(found['rows'])}")
        return found

    def _hold(self) -> None:
        """Label the validation and test structures: a random choice, made before any other."""
        path = self.folder / "held" / CHOSEN
        if not path.is_file():
            path.parent.mkdir(exist_ok=True)
            store = self.store
            rows = [
                choose(store, store.rows(split=split), self.config.seed, n).tolist()
                for split, n in (("val", self.config.validation), ("test", self.config.test))
            ]
            write_json(path, _described(store, sorted(rows[0] + rows[1])))
        self._label(read_json(path)["rows"], f"{self.config.name}-held")

    def _choose(self, number: int) -> list[int]:
        """Return the rows that a round labels."""
        place, options = self.place(number), self.config.select
        if (place / CHOSEN).is_file():
            return list(read_json(place / CHOSEN)["rows"])
        store = self.store
        potential = Path(self.config.release) if number == 1 else self.place(number - 1) / RELEASE
        knows = self.fidelity in load(potential).fidelities
        failed = [
            row
            for before in range(1, number)
            for row in read_json(self.place(before) / CHOSEN)["rows"]
            if not store.has(self.fidelity, ENERGY)[row]
        ]
        found = selection.select(
            potential,
            [self.store_path],
            selection.Options(
                options.by,
                self.config.n,
                self.fidelity if knows else self.config.asked,
                against=options.against,
                cost=options.cost,
                labelled=[self.store_path],
                level=self.fidelity,
                elements=options.elements,
                compositions_first=options.compositions_first,
                covered=self._covered(),
                per_formula=options.per_formula,
                max_std=options.max_std,
                seed=self.config.seed + number,
                without=failed,
            ),
            place / "selection",
            self.means.progress,
        )
        selection_report.write(found, place / "selection")
        (origin,) = found.pool.origins
        assert isinstance(origin, Rows)
        rows = origin.rows[found.candidates[[pick.index for pick in found.picks]]]
        write_json(place / CHOSEN, _described(store, rows.tolist()))
        return list(rows.tolist())

    def _covered(self) -> np.ndarray:
        """Return the compositions of the new level's training labels. [n, N_ELEMENTS + 1]"""
        store = self.store
        is_known = self.fidelity in store.fidelities
        rows = store.rows(split="train", fidelity=self.fidelity) if is_known else np.zeros(0, np.int64)
        return store.composition(rows)

    def _label(self, rows: list[int], layer: str) -> None:
        settings = self.config.label
        store = self.store
        if self.fidelity in store.fidelities and store.has(self.fidelity, ENERGY)[rows].all():
            return
        if layer in store.source_names:  # what has no label in a finished layer failed
            return
        request = Request(Source(self.store_path.resolve()), settings.level, settings.fidelity, rows=tuple(rows))
        where = labelling.place_of(request, layer, None)
        cluster = None if self.means.cluster is None else self.means.cluster(where)
        done = labelling.label(
            request, layer, None, self.means.workers, Limits(settings.time_limit, settings.memory_limit),
            lambda labels, failures, total: self.means.progress(f"{self.fidelity} labels", labels + failures, total),
            cluster,
        )  # fmt: skip
        if not isinstance(done, str):
            failed = f", {done.n_failed} failed: {done.failures}" if done.n_failed else ""
            self.means.say(f"{layer}: {done.n_labels} labels of {self.fidelity}{failed}")

    def _recipe_content(self, number: int) -> dict[str, Any]:
        """Return the fine-tuning recipe of a round, with all labels so far.

        Every round starts from the same release: what a potential is then depends on its labels, not on their order.
        """
        content = apply_overrides(read_yaml(self.recipe), as_overrides(self.config.changes))
        pools = content.get("data", {}).get("plan", {}).get("pools", [])
        if self.fidelity not in [pool.get("fidelity") for pool in pools]:
            raise InputError(f"{self.recipe}: no pool of {self.fidelity!r}, whose labels are computed; add one")
        own: dict[str, Any] = {"name": f"{self.config.name}-{number:02d}", "run": str(self.place(number) / task.RUN)}
        own |= {"seed": self.config.seed, "data.store": self.config.store}
        return apply_overrides(content, as_overrides(own))

    def _fine_tune(self, number: int) -> None:
        place = self.place(number)
        target = place / RELEASE
        if target.is_dir():
            return
        recipe = place / task.RECIPE
        if not recipe.is_file():
            write_text(recipe, yaml.safe_dump(self._recipe_content(number), sort_keys=False))
        command = [sys.executable, "-m", "mffm.active.task", str(place), self.config.release]
        log = place / "log" / "rank-0.log"
        states = self.means.executor.run([Job(JOB, command, log)], self._report)
        if states[JOB] != "done":
            lines = log.read_text().splitlines() or ["no output"]
            raise InputError(f"{place}: the fine-tuning failed: {lines[-1]} ({log}); the same command tries it again")
        save(place / task.RUN, target, fit_uncertainty_on=self.store if self.config.select.needs_uncertainty else None)

    def _report(self, states: Mapping[str, State]) -> None:
        self.means.progress(JOB, int(states[JOB] == "done"), 1)

    def _judge(self, number: int) -> None:
        """Write the errors of a round's release on the test structures."""
        store, loaded = self.store, load(self.place(number) / RELEASE)
        found = parity.evaluate(loaded, store, "test", [self.fidelity])
        energies = found.frame_errors(self.fidelity)[ENERGY].sums
        labelled = store.rows(split="train", fidelity=self.fidelity)
        write_json(
            self.place(number) / ERRORS,
            {
                "round": number,
                "n_labels": len(labelled),
                "fidelity": self.fidelity,
                "rows": found.rows(),
                "energy_p99": float(np.percentile(energies, 99)),
                "weights": loaded.weights_sha256,
                "store": store.fingerprint,
            },
        )


def _described(store: Store, rows: list[int]) -> dict[str, Any]:
    return {"rows": rows, "frame_ids": [store.frame_id(row) for row in rows]}


def _shown(rows: list[dict[str, Any]]) -> str:
    return ", ".join(f"{r['property']} MAE {r['mae']:.4g} {r['unit']}" for r in rows)
