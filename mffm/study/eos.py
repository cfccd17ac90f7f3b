"""Lattice constants and bulk moduli from equations of state, against those of a method with more labels."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from mffm.config.study import EosConfig
from mffm.errors import InputError
from mffm.properties.eos import fit
from mffm.release import sha256
from mffm.study.cells import Energies, Results, geometry, read_groups
from mffm.study.tables import over_seeds, spread, table

NAME = "eos"
MEASURES = {"a": "a0", "b": "B"}


@dataclass(frozen=True)
class Eos:
    """The judge of equations of state.

    Attributes:
        cells: name → structure.
        group_of: name → group.
    """

    config: EosConfig
    path: Path
    cells: Mapping[str, Atoms]
    group_of: Mapping[str, str]
    digest: str
    name: str = NAME

    @classmethod
    def read(cls, config: EosConfig, base: Path) -> "Eos":
        """Return the judge.

        Raises:
            InputError: a file, key or group that does not hold; a structure that is not periodic in all directions.
        """
        path, groups = read_groups(config, base, NAME)
        cells: dict[str, Atoms] = {}
        group_of: dict[str, str] = {}
        for group, frames in groups.items():
            for frame in frames:
                if not frame.pbc.all():
                    raise InputError(f"eos.file: {path}: {frame.get_chemical_formula()} is not periodic: no volume")
                name = base_name = f"{group} {frame.get_chemical_formula()}"
                while name in cells:
                    name = f"{base_name} #{sum(n.startswith(base_name) for n in cells) + 1}"
                cells[name], group_of[name] = frame, group
        read = config.model_dump(include={"group", "where", "strain", "points"})
        return cls(config, path, cells, group_of, hashlib.sha256(f"{sha256(path)} {read}".encode()).hexdigest())

    def judge(self, energies: Energies) -> dict[str, Any]:
        """Return cell → length of the first cell vector at the minimum (Å) and bulk modulus (GPa), or None."""
        scales = 1 + np.linspace(-self.config.strain, self.config.strain, self.config.points)
        all_energies = energies([geometry(cell, s) for cell in self.cells.values() for s in scales])
        found: dict[str, Any] = {}
        for (name, cell), own in zip(self.cells.items(), all_energies.reshape(-1, len(scales)), strict=True):
            volume = cell.get_volume()
            fitted = fit(volume * scales**3, own)
            found[name] = fitted and {
                "a": float(cell.cell.lengths()[0] * np.cbrt(fitted.volume / volume)),
                "b": fitted.bulk_modulus,
            }
        return found

    def summarise(self, results: Results) -> dict[str, Any]:
        """Return errors in % of every method and number of labels, and the fits that failed."""
        of_reference = results.get(self.config.against, {})
        most = max(of_reference, default=None)
        reference = {} if most is None else of_reference[most]
        methods: dict[str, list[dict[str, Any]]] = {}
        failed = []
        for method, counts in results.items():
            methods[method] = []
            for n, seeds in sorted(counts.items()):
                lost = {s: [name for name in self.cells if found[name] is None] for s, found in seeds.items()}
                failed += [
                    {"method": method, "n_high": n, "seed": s, "cells": names} for s, names in lost.items() if names
                ]
                compared = [self._compare(found, reference[s]) for s, found in seeds.items() if s in reference]
                n_lost = sum(len(names) for names in lost.values())
                methods[method].append({"n_high": n, **_measures(compared), "failed": n_lost})
        methods.pop(self.config.against, None)
        return {
            "file": self.path.name,
            "cells": len(self.cells),
            "strain": self.config.strain,
            "points": self.config.points,
            "uncovered": self.config.uncovered,
            "against": self.config.against,
            "against_n_high": most,
            "reference": {str(seed): found for seed, found in reference.items()},
            "methods": methods,
            "failed": failed,
        }

    def _compare(self, found: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float]:
        """Return MAE in % of a0 and B for uncovered and covered cells, of those that both fitted."""
        maes: dict[str, float] = {}
        for key in MEASURES:
            errors: dict[str, list[float]] = {"uncovered": [], "covered": []}
            for name, group in self.group_of.items():
                if found[name] is not None and reference[name] is not None:
                    kind = "uncovered" if group in self.config.uncovered else "covered"
                    errors[kind].append(100 * abs(found[name][key] / reference[name][key] - 1))
            maes |= {f"{key}_{kind}": float(np.mean(e)) for kind, e in errors.items() if e}
        return maes


def _measures(compared: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    keys = [f"{key}_{kind}" for key in MEASURES for kind in ("uncovered", "covered")]
    return {key: over_seeds([c[key] for c in compared if key in c]) for key in keys}


def section(found: Mapping[str, Any], titles: Mapping[str, str], high: str) -> list[str]:
    """Return the lines of the report."""
    columns = [(f"{key}_{kind}", f"{shown}, {kind}") for key, shown in MEASURES.items() for kind in
               ("uncovered", "covered")]  # fmt: skip
    rows = [
        [titles[m], str(p["n_high"]), *(spread(p[key]) for key, _ in columns), str(p["failed"] or "")]
        for m in titles for p in found["methods"].get(m, [])
    ]  # fmt: skip
    n = found["against_n_high"]
    lines = [
        "## Lattice constants and bulk moduli", "",
        f"MAE in % of {titles[found['against']]}" + (f" ({n} frames), same seed," if n else ", **not finished yet**,")
        + f" over {found['cells']} cells of `{found['file']}`: lengths ±{100 * found['strain']:g} %, "
        f"{found['points']} volumes, atoms not relaxed, Birch-Murnaghan. Uncovered: "
        f"{', '.join(found['uncovered']) or 'none'}. Cells without a fit are left out.", "",
        *table(["method", f"`{high}` frames", *(shown for _, shown in columns), "fits that failed"], rows),
    ]  # fmt: skip
    if found["failed"]:
        lines += ["", "No minimum within the volumes:", ""]
        lines += [
            f"- {titles[f['method']]}, {f['n_high']} frames, seed {f['seed']}: {', '.join(f['cells'])}"
            for f in found["failed"]
        ]
    return lines
