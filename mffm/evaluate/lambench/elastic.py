"""Elastic moduli: 1181 crystals of de Jong et al., Sci. Data 2, 150009 (2015).

Protocol: relax (FIRE, FrechetCellFilter, fmax 1e-3, 500 steps, no symmetry); 4 normal strains within ±0.01 and 4 shears
within ±0.06 along each of the six components, atoms not relaxed again; linear fits of stress with the relaxed cell's
among the points; Voigt-Reuss-Hill averages.
"""

import gzip
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.io import read
from ase.units import GPa

from mffm.evaluate.benchmark.task import LAMBENCH, DataFile, Options, Score, mean_absolute
from mffm.evaluate.relaxation import relax
from mffm.properties.elastic import elastic

FMAX, STEPS = 1e-3, 500
NORMAL, SHEAR = np.linspace(-0.01, 0.01, 4).tolist(), np.linspace(-0.06, 0.06, 4).tolist()
ZERO = 1e-7 / GPa  # GPa; elastic constants below are taken for zero
LARGEST_MODULUS = 1000.0  # GPa, twice diamond's: reported, and counted as the suite does
N_OF_SUITE = 1181


class Crystal(NamedTuple):
    """A structure and its moduli, GPa."""

    atoms: Atoms
    shear: float
    bulk: float


def moduli(atoms: Atoms) -> tuple[float, float]:
    """Return shear and bulk modulus in GPa of a relaxed crystal with its calculator, as the protocol has them."""
    from pymatgen.analysis.elasticity import ElasticTensor

    found = elastic(atoms, relaxed=False, normal=NORMAL, shear=SHEAR, shape="upper")
    tensor = ElasticTensor.from_voigt(found.tensor).zeroed(ZERO)
    return float(tensor.g_vrh), float(tensor.k_vrh)


class Elastic:
    """MAE of shear and bulk moduli; a failure is left out of the MAE and divides the score."""

    name, suite = "elastic", LAMBENCH
    title = "elastic moduli"
    files = (
        DataFile(
            "elastic2015/elastic.json.gz",
            "PyPI sdist matminer-0.3.2, datasets/elastic_tensor.csv (LBNL BSD); Dryad of 10.1038/sdata.2015.9 (CC0)",
            "list of {material_id, formula, poscar, G_VRH, K_VRH (GPa)}",
            "876263afcf57b8d3e41ddb34ad58225f9db30a016931b08443156e3ca631fe72",
        ),
    )

    def load(self, data: Path) -> Mapping[str, Crystal]:
        return _load(data)

    def run(self, item: Crystal, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
        found = relax(item.atoms, calculator, FMAX, STEPS)
        found.atoms.calc = calculator
        shear, bulk = moduli(found.atoms)
        if not (math.isfinite(shear) and math.isfinite(bulk)):
            raise FloatingPointError(f"moduli {shear} and {bulk} GPa")
        return {"G": shear, "K": bulk, "converged": found.converged, "n_steps": found.n_steps}

    def doubt(self, item: Crystal, result: Mapping[str, Any]) -> str | None:
        values = [result["G"], result["K"]]
        if max(map(abs, values)) > LARGEST_MODULUS or min(values) < 0:
            return f"G {values[0]:.4g}, K {values[1]:.4g} GPa; counts, as in the suite"
        return None

    def score(self, items: Mapping[str, Crystal], results: Mapping[str, Mapping[str, Any]]) -> Score:
        done = [i for i in items if i in results]
        label = np.array([(items[i].shear, items[i].bulk) for i in done]).reshape(-1, 2)
        value = np.array([(results[i]["G"], results[i]["K"]) for i in done]).reshape(-1, 2)
        error = value - label
        metrics: dict[str, float | None] = {
            "MAE_G_VRH": mean_absolute(error[:, 0].tolist()),
            "MAE_K_VRH": mean_absolute(error[:, 1].tolist()),
            "success_rate": len(done) / len(items),
        }
        if len(done) > 1:  # errors are heavy-tailed: of a part of the set the reader must see how much they vary
            for k, name in enumerate(("G", "K")):
                metrics[f"standard error {name}"] = float(np.abs(error[:, k]).std(ddof=1) / math.sqrt(len(done)))
        is_whole = len(items) == N_OF_SUITE
        panels = [(f"{n} modulus", "GPa", label[:, k], value[:, k]) for k, n in enumerate(("shear", "bulk"))]
        return Score(
            metrics,
            "GPa",
            len(items),
            len(items) - len(done),
            {k: k for k in ("MAE_G_VRH", "MAE_K_VRH", "success_rate")} if is_whole else {},
            "" if is_whole else f"{len(items)} of {N_OF_SUITE}: not to be compared with the leaderboard",
            panels if done else (),
        )

    def write(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Write nothing: the suite takes no submissions of this task."""


@lru_cache(maxsize=1)
def _load(data: Path) -> dict[str, Crystal]:
    with gzip.open(data / Elastic.files[0].path, "rt") as file:
        entries = json.load(file)
    found = {}
    for entry in entries:
        atoms = read(StringIO(entry["poscar"]), format="vasp")
        assert isinstance(atoms, Atoms)
        found[entry["material_id"]] = Crystal(atoms, float(entry["G_VRH"]), float(entry["K_VRH"]))
    return found


TASK = Elastic()
