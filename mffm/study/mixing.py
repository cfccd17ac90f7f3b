"""Mixing energies of pseudo-binaries: does a potential of few high-fidelity labels know compositions without any?"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from mffm import plots
from mffm.config.study import MixingConfig
from mffm.errors import InputError
from mffm.release import sha256
from mffm.study.cells import Energies, Results, geometry, read_groups, value
from mffm.study.tables import over_seeds, spread, table

NAME = "mixing"
MEASURES = ("uncovered", "covered", "r2")


def mixing_energies(orders: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """Return the energies of mixing of what lies between two end members, per replaced atom.

    Whatever is a sum over elements cancels, element references too.

    Args:
        orders: [n] ascending, how many atoms are replaced; the first and the last are the end members.
        energies: [n] eV.

    Returns:
        [n - 2] eV per replaced atom of the last: E(x) - (1 - x) E(0) - x E(1).
    """
    x = _fractions(orders)
    return ((energies - (1 - x) * energies[0] - x * energies[-1]) / (orders[-1] - orders[0]))[1:-1]


def _fractions(orders: np.ndarray) -> np.ndarray:
    return np.asarray((orders - orders[0]) / (orders[-1] - orders[0]))


@dataclass(frozen=True)
class Mixing:
    """The judge of mixing energies.

    Attributes:
        groups: structures of each group, ascending in ``config.order``.
        digest: of the file and of what is read from it.
        methods: of the study; results of others, another code's, are drawn whatever ``config.drawn`` says.
    """

    config: MixingConfig
    path: Path
    groups: Mapping[str, Sequence[Atoms]]
    digest: str
    methods: Collection[str]
    name: str = NAME

    @classmethod
    def read(cls, config: MixingConfig, base: Path, methods: Collection[str]) -> "Mixing":
        """Return the judge.

        Raises:
            InputError: a file, key or group that does not hold; structures that do not lie between end members.
        """
        path, found = read_groups(config, base, NAME)
        groups = {}
        for group, frames in found.items():
            frames.sort(key=lambda f: float(value(f, config.order, path, "mixing.order")))
            _require_line(frames, config.order, f"{path}: group {group!r}")
            groups[group] = frames
            for place, key in {"energy": config.energy, **{f"others.{t}": k for t, k in config.others.items()}}.items():
                for frame in frames:
                    value(frame, key, path, f"mixing.{place}")
        read = config.model_dump(include={"group", "where", "order"})
        return cls(config, path, groups, hashlib.sha256(f"{sha256(path)} {read}".encode()).hexdigest(), methods)

    @property
    def frames(self) -> list[Atoms]:
        return [frame for frames in self.groups.values() for frame in frames]

    def labels(self, key: str) -> dict[str, np.ndarray]:
        """Return group → mixing energies of an info key's energies, eV."""
        return {g: mixing_energies(self._orders(g), _infos(frames, key)) for g, frames in self.groups.items()}

    def judge(self, energies: Energies) -> dict[str, Any]:
        """Return group → mixing energies in eV per replaced atom, in the order of the end members."""
        found = energies([geometry(frame) for frame in self.frames])
        ends = np.cumsum([len(frames) for frames in self.groups.values()])
        parts = dict(zip(self.groups, np.split(found, ends[:-1]), strict=True))
        return {g: mixing_energies(self._orders(g), parts[g]).tolist() for g in self.groups}

    def summarise(self, results: Results) -> dict[str, Any]:
        """Return labels, the measures of every method and number of labels, and what is drawn."""
        labels = self.labels(self.config.energy)
        methods = {
            method: [
                {"n_high": n, **self._measures([self._compare(found) for found in seeds.values()])}
                for n, seeds in sorted(counts.items())
            ]
            for method, counts in results.items()
        }
        return {
            "file": self.path.name,
            "groups": {
                g: {
                    "x": _fractions(self._orders(g)).tolist(),
                    "labels": labels[g].tolist(),
                    "uncovered": g in self.config.uncovered,
                }
                for g in self.groups
            },
            "others": {
                title: self._measures([self._compare({g: e.tolist() for g, e in self.labels(key).items()})])
                for title, key in self.config.others.items()
            },
            "methods": methods,
            "drawn": self._drawn(results),
        }  # fmt: skip

    def _orders(self, group: str) -> np.ndarray:
        return _infos(self.groups[group], self.config.order)

    def _compare(self, found: Mapping[str, Sequence[float]]) -> dict[str, float | None]:
        """Return MAE (meV) of uncovered and covered groups, and R² over all."""
        labels = self.labels(self.config.energy)
        errors = {g: np.array(found[g]) - labels[g] for g in self.groups}
        everything = np.concatenate(list(labels.values()))
        spread_of_all = float(np.square(everything - everything.mean()).sum())
        parts = {
            "uncovered": [e for g, e in errors.items() if g in self.config.uncovered],
            "covered": [e for g, e in errors.items() if g not in self.config.uncovered],
        }
        maes = {k: 1e3 * float(np.abs(np.concatenate(es)).mean()) if es else None for k, es in parts.items()}
        squares = sum(float(np.square(e).sum()) for e in errors.values())
        return {**maes, "r2": 1 - squares / spread_of_all if spread_of_all > 0 else None}

    def _measures(self, compared: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
        return {key: over_seeds([v for c in compared if (v := c[key]) is not None]) for key in MEASURES}

    def _drawn(self, results: Results) -> dict[str, Any]:
        """Return method → labels and, per group, mean predictions over the seeds."""
        found = {}
        others = [method for method in results if method not in self.methods]
        for method in [*self.config.drawn, *others] if self.config.drawn else results:
            counts = results.get(method)
            if counts:
                wanted = self.config.drawn_at
                n = wanted if wanted is not None and wanted in counts else max(counts)
                seeds = list(counts[n].values())
                means = {g: np.mean([s[g] for s in seeds], axis=0).tolist() for g in self.groups}
                found[method] = {"n_high": n, "groups": means}
        return found


def _infos(frames: Sequence[Atoms], key: str) -> np.ndarray:
    return np.array([float(frame.info[key]) for frame in frames])


def _require_line(frames: Sequence[Atoms], order: str, place: str) -> None:
    """Refuse structures whose compositions do not lie between the first's and the last's as their order says."""
    orders = _infos(frames, order)
    if len(orders) < 3 or (np.diff(orders) <= 0).any():
        raise InputError(
            f"{place}: {order} is {', '.join(f'{o:g}' for o in orders)}; needed are one structure each of two end "
            "members and of something between them: narrow `where`"
        )
    elements = np.unique(np.concatenate([frame.numbers for frame in frames]))
    counts = np.array([[int((frame.numbers == z).sum()) for z in elements] for frame in frames], float)
    x = _fractions(orders)[:, None]
    wrong = np.flatnonzero(np.abs(counts - (1 - x) * counts[0] - x * counts[-1]).max(1) > 1e-6)
    if len(wrong):
        first, last, between = (frames[i].get_chemical_formula() for i in (0, -1, wrong[0]))
        raise InputError(
            f"{place}: {between} with {order} {orders[wrong[0]]:g} does not lie between {first} and {last}"
        )


def section(found: Mapping[str, Any], titles: Mapping[str, str], high: str) -> list[str]:
    """Return the lines of the report."""
    apart = [g for g, group in found["groups"].items() if group["uncovered"]]
    rows = [[f"labels of {t}", "", *_cells(measures)] for t, measures in found["others"].items()]
    rows += [[titles[m], str(point["n_high"]), *_cells(point)] for m in titles for point in found["methods"].get(m, [])]
    head = ["method", f"`{high}` frames", "MAE uncovered", "MAE covered", "R² over all"]
    return [
        "## Mixing energies", "",
        f"Of `{found['file']}`, between the two end members of each group, in meV per replaced atom; no training reads "
        f"these structures. Uncovered, without any `{high}` label in training: {', '.join(apart) or 'none'}. Means "
        "over the seeds; in brackets the least and the most of a seed.", "",
        "![mixing energies](mixing.png)", "",
        *table(head, rows),
    ]  # fmt: skip


def _cells(measures: Mapping[str, Any]) -> list[str]:
    return [spread(measures[key]) for key in MEASURES]


def draw(found: Mapping[str, Any], titles: Mapping[str, str], high: str, folder: Path) -> Path:
    """Write ``mixing.png``: energy against composition, a panel for each group."""
    panels = {}
    for group, values in found["groups"].items():
        lines = {f"labels of {high}": [0.0, *values["labels"], 0.0]}
        lines |= {
            f"{titles[m]}, {one['n_high']} frames": [0.0, *one["groups"][group], 0.0]
            for m, one in found["drawn"].items()
        }
        panels[f"{group}, uncovered" if values["uncovered"] else group] = (values["x"], lines)
    path = folder / "mixing.png"
    plots.against_composition(path, panels, "mixing energy, eV per replaced atom")
    return path
