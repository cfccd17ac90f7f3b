"""Energy differences at equal composition: an energy error that no element reference enters."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mffm.config.study import StudyConfig
from mffm.data.records import Geometry
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.keys import ENERGY
from mffm.study.cells import Energies, Results
from mffm.study.tables import over_seeds, spread, table

NAME = "relative_energies"


def pair_errors(compositions: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return the errors of the energy difference of every pair of structures of one composition, per atom.

    Args:
        compositions: [n, n_elements] atoms of each element.
        errors: [n] prediction - label, up to a sum over elements, eV.

    Returns:
        [n_pairs] eV per atom, absolute.
    """
    n_atoms = compositions.sum(1)
    i, j = np.triu_indices(len(errors), 1)
    same = (compositions[i] == compositions[j]).all(1)
    i, j = i[same], j[same]
    return np.asarray(np.abs(errors[i] - errors[j]) / n_atoms[i])


@dataclass(frozen=True)
class Relative:
    """The judge of energy differences.

    Attributes:
        structures, compositions, labels: of each kind of split; [n, n_elements] and [n] eV.
    """

    structures: Mapping[str, list[Geometry]]
    compositions: Mapping[str, np.ndarray]
    labels: Mapping[str, np.ndarray]
    digest: str
    name: str = NAME

    @classmethod
    def read(cls, config: StudyConfig, store: Store) -> "Relative":
        """Return the judge of the splits of a study.

        Raises:
            InputError: a split without two labelled structures of one composition.
        """
        rows = {
            kind: store.rows(split=split, fidelity=config.high, prop=ENERGY) for kind, split in config.splits.items()
        }
        compositions = {kind: store.composition(r) for kind, r in rows.items()}
        for kind, counts in compositions.items():
            if len(pair_errors(counts, np.zeros(len(counts)))) == 0:
                raise InputError(
                    f"relative_energies: {kind} split {config.splits[kind]!r} has no two structures of one composition "
                    f"with {config.high} energies"
                )
        return cls(
            {kind: [store.geometry(int(row)) for row in r] for kind, r in rows.items()}, compositions,
            {kind: store.energies(config.high, r) for kind, r in rows.items()},
            f"{store.fingerprint} {config.high}",
        )  # fmt: skip

    def judge(self, energies: Energies) -> dict[str, Any]:
        """Return kind of split → MAE in meV per atom and pairs."""
        found = {}
        for kind, structures in self.structures.items():
            errors = pair_errors(self.compositions[kind], energies(structures) - self.labels[kind])
            found[kind] = {"mae": float(errors.mean()) * 1e3, "pairs": len(errors)}
        return found

    def summarise(self, results: Results) -> dict[str, Any]:
        """Return the errors of every method and number of labels."""
        return {
            "kinds": list(self.structures),
            "pairs": {k: len(pair_errors(c, np.zeros(len(c)))) for k, c in self.compositions.items()},
            "methods": {
                method: [
                    {"n_high": n, **{k: over_seeds([f[k]["mae"] for f in seeds.values()]) for k in self.structures}}
                    for n, seeds in sorted(counts.items())
                ]
                for method, counts in results.items()
            },
        }


def section(found: Mapping[str, Any], titles: Mapping[str, str], high: str) -> list[str]:
    """Return the lines of the report."""
    rows = [
        [titles[m], str(point["n_high"]), *(spread(point[kind]) for kind in found["kinds"])]
        for m in titles for point in found["methods"].get(m, [])
    ]  # fmt: skip
    pairs = " and ".join(f"{n} {kind.upper()}" for kind, n in found["pairs"].items())
    return [
        "## Energy differences at equal composition", "",
        f"MAE in meV/atom over {pairs} pairs of structures; element references cancel. Means over the seeds; in "
        "brackets the least and the most of a seed.", "",
        *table(["method", f"`{high}` frames", *(kind.upper() for kind in found["kinds"])], rows),
    ]  # fmt: skip
