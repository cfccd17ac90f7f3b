"""Relaxations of WBM crystals: formation energies, geometries, and on the whole test set the discovery metrics.

Protocol: FIRE with a FrechetCellFilter, fmax 0.05 eV/Å, 500 steps, no symmetry constraint; unconverged ones count.
"""

import csv
import gzip
import json
import math
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.io import read

from mffm.errors import InputError
from mffm.evaluate.benchmark.task import MATBENCH_DISCOVERY, DataFile, Options, Score
from mffm.evaluate.matbench_discovery import artefacts, discovery, energies, geometry
from mffm.evaluate.relaxation import relax

FMAX, STEPS = 0.05, 500
EVALUATION = {"max_force": FMAX, "max_steps": STEPS, "ase_optimizer": "FIRE", "cell_filter": "FrechetCellFilter"}
FIGSHARE = "figshare.com/files/"
REFERENCES = DataFile(
    "wbm972/2023-02-07-mp-elemental-reference-entries.json.gz",
    "github.com/janosh/matbench-discovery data/mp/",
    "element → pymatgen ComputedEntry as JSON",
    "9fd6ef848a91c88840a0d1709b5856d0edb4af22095237e59db52f2acd6bbf79",
)
BOOTSTRAP = 2000
N_WBM = 256_963


@dataclass(frozen=True)
class Material:
    """One crystal of the test set.

    Attributes:
        structures: returns the structure that relaxations start from, and DFT's as a pymatgen dict; they are read when
            asked for, as 257 thousand do not fit every worker.
        e_form: label, eV/atom, with MP2020 corrections.
        references: element → energy, eV/atom.
        e_above_hull: label, eV/atom; NaN where the set has no hull.
        is_unique: one of the unique prototypes.
    """

    structures: Callable[[], tuple[Atoms, dict[str, Any]]]
    e_form: float
    references: Mapping[str, float]
    e_above_hull: float = math.nan
    is_unique: bool = True


def compute(material: Material, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
    """Relax and return energies (eV, eV/atom), the relaxed structure, RMSD and symmetry against DFT's."""
    from pymatgen.core import Structure
    from pymatgen.io.ase import AseAtomsAdaptor

    start, reference = material.structures()
    found = relax(start, calculator, FMAX, STEPS)
    structure = AseAtomsAdaptor.get_structure(
        Atoms(found.atoms.symbols, found.atoms.positions, cell=found.atoms.cell, pbc=True)
    )
    energy = float(found.energies[-1])
    total = energy if options.corrected_energies else energies.corrected_energy(structure, energy)
    if total is None:
        raise ValueError("the MP2020 scheme rejects the entry")
    result = {
        "energy": energy,
        "e_form": energies.formation_energy(found.atoms.symbols, total, material.references),
        "converged": found.converged,
        "n_steps": found.n_steps,
        "structure": structure.as_dict(),
    }
    label = Structure.from_dict(reference)
    result["rmsd"] = geometry.rmsd(structure, label)
    for symprec in geometry.SYMPRECS:
        both = (geometry.symmetry(s, symprec) for s in (structure, label))
        result[f"symmetry {symprec:g}"] = [None if s is None else [s.space_group, s.n_operations] for s in both]
    return json.loads(json.dumps(result))


def doubt(material: Material, result: Mapping[str, Any]) -> str | None:
    """Return why the suite takes a prediction for missing."""
    error = result["e_form"] - material.e_form
    if abs(error) > discovery.LARGEST_ERROR:
        return f"formation energy {error:+.1f} eV/atom off: counts as missing by the suite's rule (5 eV/atom)"
    return None


def geometry_metrics(results: Sequence[Mapping[str, Any] | None], symprec: float) -> dict[str, float]:
    """Return the geometry metrics of results at one tolerance; a failed one has no structure."""
    comparisons = []
    for result in results:
        found = [None, None] if result is None else result[f"symmetry {symprec:g}"]
        symmetries = [None if s is None else geometry.Symmetry(*s) for s in found]
        comparisons.append(geometry.Comparison(None if result is None else result["rmsd"], *symmetries))
    return geometry.metrics(comparisons)


def bootstrap(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the central 95 % of the mean over resampled values."""
    random = np.random.default_rng(seed)
    means = [random.choice(values, len(values)).mean() for _ in range(BOOTSTRAP)]
    return float(np.percentile(means, 2.5)), float(np.percentile(means, 97.5))


def write(results: Mapping[str, Mapping[str, Any]], ids: Sequence[str], folder: Path) -> None:
    """Write the prediction CSV of all ids and the geometries of those that have one."""
    artefacts.write_predictions(
        folder / "discovery.csv.gz", {i: results[i]["e_form"] if i in results else None for i in ids}
    )
    artefacts.write_geometries(
        folder / "geo-opt.jsonl.gz", [{"material_id": i, **results[i]} for i in ids if i in results]
    )


class Wbm972:
    """972 random WBM crystals that the MatCalc benchmark publishes, started from DFT's relaxed structure."""

    name, suite = "wbm972", MATBENCH_DISCOVERY
    title = "WBM-972 (PBE52, relaxed start)"
    files = (
        DataFile(
            "wbm972/wbm-random-pbe52-equilibrium-2025.1.json.gz",
            "github.com/materialsvirtuallab/matcalc benchmark_data/",
            "list of {material_id, formula, structure (pymatgen), energy, corrected_energy}, eV",
            "8fc0aa85e6c9d56b03f8c742a377a143a8fc885b5930e11af596e43c1832d9d0",
        ),
        REFERENCES,
    )

    def load(self, data: Path) -> Mapping[str, Any]:
        return _load_972(data)

    def run(self, item: Material, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
        return compute(item, calculator, options)

    def doubt(self, item: Material, result: Mapping[str, Any]) -> str | None:
        return doubt(item, result)

    def score(self, items: Mapping[str, Material], results: Mapping[str, Mapping[str, Any]]) -> Score:
        label = np.array([m.e_form for m in items.values()])
        asked = np.array([results[i]["e_form"] if i in results else np.nan for i in items])
        prediction = np.round(discovery.cleaned(label, asked), discovery.DECIMALS)
        label = np.round(label, discovery.DECIMALS)
        metrics: dict[str, float | None] = dict(discovery.regression(label, prediction))
        there = ~np.isnan(prediction)
        if there.any():
            metrics["MAE low"], metrics["MAE high"] = bootstrap(np.abs(prediction - label)[there])
        metrics["missing_preds"] = int((~there).sum())
        metrics |= geometry_metrics([results.get(i) for i in items], geometry.SYMPRECS[0])
        return Score(
            metrics,
            "eV/atom; RMSD over (V/N)^(1/3)",
            len(items),
            len(items) - len(results),
            remark=f"{len(items)} random ones of the 256,963 materials, started from DFT's relaxed structure: easier "
            "than the suite's task, not to be compared with the leaderboard. MAE low and high: 95 % of bootstrapped "
            "means",
            panels=[("formation energy", "eV/atom", label[there], prediction[there])] if there.any() else (),
        )

    def write(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        write(results, list(items), folder)


@lru_cache(maxsize=1)
def _load_972(data: Path) -> dict[str, Material]:
    references = energies.read_references(data / REFERENCES.path)
    with gzip.open(data / Wbm972.files[0].path, "rt") as file:
        entries = json.load(file)
    found = {}
    for entry in entries:
        structure = entry["structure"]
        symbols = [site["species"][0]["element"] for site in structure["sites"]]
        atoms = Atoms(
            symbols,
            cell=structure["lattice"]["matrix"],
            scaled_positions=[s["abc"] for s in structure["sites"]],
            pbc=True,
        )
        e_form = energies.formation_energy(symbols, entry["corrected_energy"], references)
        found[entry["material_id"]] = Material(partial(_both, atoms, structure), e_form, references)
    return found


def _both(atoms: Atoms, structure: dict[str, Any]) -> tuple[Atoms, dict[str, Any]]:
    return atoms, structure


class Wbm:
    """The suite's own test set: 256,963 WBM crystals from their initial structures."""

    name, suite = "wbm", MATBENCH_DISCOVERY
    title = "WBM, whole test set"
    files = (
        DataFile(
            "matbench_discovery/wbm/2023-12-13-wbm-summary.csv.gz",
            FIGSHARE + "64706751",
            "columns material_id, e_form_per_atom_mp2020_corrected, e_above_hull_mp2020_corrected_ppd_mp,"
            " unique_prototype",
            "1555268d3aa59d20262cb9d01ce0994b",
        ),
        DataFile(
            "matbench_discovery/wbm/2024-08-04-wbm-initial-atoms.extxyz.zip",
            FIGSHARE + "48169597",
            "one extxyz a material, material_id in its comment",
            "2a292211ca6acb30ed8416178d644098",
        ),
        DataFile(
            "matbench_discovery/wbm/2024-08-04-wbm-relaxed-atoms.extxyz.zip",
            FIGSHARE + "48169600",
            "one extxyz a material, material_id in its comment",
            "4726643ac0dfbab69a4284454c891e68",
        ),
        REFERENCES,
    )

    def load(self, data: Path) -> Mapping[str, Any]:
        return read_whole(*(data / f.path for f in self.files))

    def run(self, item: Material, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
        return compute(item, calculator, options)

    def doubt(self, item: Material, result: Mapping[str, Any]) -> str | None:
        return doubt(item, result)

    def score(self, items: Mapping[str, Material], results: Mapping[str, Mapping[str, Any]]) -> Score:
        materials = list(items.values())
        labels = discovery.Labels(
            tuple(items),
            np.array([m.e_above_hull for m in materials]),
            np.array([m.e_form for m in materials]),
            np.array([m.is_unique for m in materials], dtype=bool),
        )
        predicted = np.array([results[i]["e_form"] if i in results else np.nan for i in items])
        is_whole = len(items) == N_WBM
        found = discovery.score(labels, predicted, discovery.WBM_PREVALENCE if is_whole else None)
        shapes = {f"symprec={s:.0e}".replace("e-0", "e-"): self._geometry(items, results, s) for s in geometry.SYMPRECS}
        unique = found[discovery.UNIQUE]
        rmsd = shapes["symprec=1e-5"]["rmsd"]
        metrics: dict[str, float | None] = {k: unique[k] for k in ("F1", "DAF", "Precision", "Recall", "Accuracy")}
        metrics |= {"MAE": unique["MAE"], "RMSE": unique["RMSE"], "R2": unique["R2"], "rmsd": rmsd}
        return Score(
            metrics,
            "of unique prototypes; MAE and RMSE in eV/atom; RMSD over (V/N)^(1/3)",
            len(items),
            len(items) - len(results),
            {**{k: f"uniq_{k}" for k in metrics if k != "rmsd"}, "rmsd": "geo_rmsd"} if is_whole else {},
            "" if is_whole else f"{len(items)} of {N_WBM:,} materials: not to be compared with the leaderboard",
            submission={
                "discovery": {k: artefacts.rounded(v, 3) for k, v in found.items()},
                "geo_opt": {k: artefacts.rounded(v, 4) for k, v in shapes.items()},
            }
            if is_whole
            else {},
        )

    @staticmethod
    def _geometry(
        items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], symprec: float
    ) -> dict[str, float]:
        return geometry_metrics([results.get(i) for i in items], symprec)

    def write(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        if len(items) == N_WBM:  # a part is no submission
            write(results, list(items), folder)


def read_whole(summary: Path, initial: Path, relaxed: Path, references: Path) -> dict[str, Material]:
    """Return the suite's test set from its files; structures are read from the archives when asked for."""
    energies_of = energies.read_references(references)
    archives = (zipfile.ZipFile(initial), zipfile.ZipFile(relaxed))
    with gzip.open(summary, "rt") as file:
        return {
            row["material_id"]: Material(
                partial(_read_both, archives, row["material_id"]),
                float(row["e_form_per_atom_mp2020_corrected"]),
                energies_of,
                float(row["e_above_hull_mp2020_corrected_ppd_mp"]),
                row["unique_prototype"].lower() == "true",
            )
            for row in csv.DictReader(file)
        }


def _read_both(archives: tuple[zipfile.ZipFile, zipfile.ZipFile], key: str) -> tuple[Atoms, dict[str, Any]]:
    from pymatgen.io.ase import AseAtomsAdaptor

    start, relaxed = (_read(archive, key) for archive in archives)
    return start, AseAtomsAdaptor.get_structure(relaxed).as_dict()


def _read(archive: zipfile.ZipFile, key: str) -> Atoms:
    try:
        text = archive.read(f"{key}.extxyz").decode()
    except KeyError as error:
        raise InputError(f"{archive.filename}: no {key}.extxyz; its first file is {archive.namelist()[:1]}") from error
    atoms = read(StringIO(text), format="extxyz")
    assert isinstance(atoms, Atoms)
    return Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=True)  # without stored results
