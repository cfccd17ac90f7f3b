"""Thermal conductivity of 103 crystals of PhononDB end to end (protocol ``phonondb-v1`` of the suite).

Relax with the space group kept (FIRE, FrechetCellFilter without tilts, fmax 1e-4 eV/Å, 300 steps); force constants of
second and third order by displacements in the supercells of the reference; conductivity at 300 K with isotopes in the
Wigner formulation. No third order where the spectrum has imaginary modes or the space group changed: these score worst.

Published values come from phono3py up to 3.30, ``MS-SMM19``, which later versions do not have. Their ``SMM19`` has
another velocity operator: on Cu3Au with EMT and a 5×5×5 mesh κ is 0.8 % lower (3.175 against 3.200 W/(m K)) and the
SRME between the two is 0.024. With phono3py==3.30.0 installed, its formulation is used; the record names it.
"""

import contextlib
import gzip
import io
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.io import iread

from mffm.evaluate import published
from mffm.evaluate.benchmark.task import MATBENCH_DISCOVERY, DataFile, Options, Score
from mffm.evaluate.matbench_discovery import artefacts, kappa
from mffm.evaluate.relaxation import relax

TEMPERATURE = 300.0  # K
FMAX, STEPS, RELAX_SYMPREC, SYMPREC = 1e-4, 300, 0.01, 1e-5
NO_TILTS = [True, True, True, False, False, False]
BOUNDARY = 1e6  # µm, mean free path
ABSURD = 1e5  # W/(m K); diamond has 2e3
N_OF_SUITE = 103
SOURCE = "github.com/MPA2suite/k_SRME 0269a94 (data CC-BY-4.0)"
STRUCTURES = DataFile(
    "kappa103/phononDB-PBE-structures.extxyz",
    SOURCE,
    "extxyz with mp_id, fc2_supercell, fc3_supercell, q_mesh, symm.no in the comments",
    "63e012fdafc61702ab22cdbda7e9c0603f57f54c2e464666585a9159e0ce5b38",
)
REFERENCE = DataFile(
    "kappa103/kappas_phononDB_PBE_noNAC.json.gz",
    SOURCE,
    "columns of mp_id, kappa_TOT_ave, mode_kappa_TOT_ave, weights, frequencies, symm.no",
    "442f651d3272e8a104baab3e53241220bf66afc90559f593fb3d7697874506ea",
)


@dataclass(frozen=True)
class Crystal:
    """A structure with the supercells [3, 3] and the mesh [3] of the reference.

    Attributes:
        reference: file of the labels, and the id in it: they are read when a score is asked for.
    """

    atoms: Atoms
    fc2_supercell: np.ndarray
    fc3_supercell: np.ndarray
    mesh: tuple[int, int, int]
    reference: tuple[Path, str]


def transport() -> str:
    """Return the Wigner formulation that the installed phono3py has, the suite's own if it can."""
    import phono3py

    major, minor = (int(n) for n in phono3py.__version__.split(".")[:2])
    return "MS-SMM19" if (major, minor) < (3, 31) else "SMM19"


def space_group(atoms: Atoms) -> int:
    """Return the number that moyopy finds at 1e-5."""
    import moyopy
    from moyopy.interface import MoyoAdapter

    return int(moyopy.MoyoDataset(MoyoAdapter.from_atoms(atoms), symprec=SYMPREC).number)


def compute(crystal: Crystal, calculator: BaseCalculator, displacement: float) -> dict[str, Any]:
    """Return the suite's record of a crystal: space groups, frequencies (THz) and, where stable, conductivities.

    Args:
        displacement: Å.
    """
    start = crystal.atoms
    before = space_group(start)
    relaxed = relax(start, calculator, FMAX, STEPS, symprec=RELAX_SYMPREC, strains=NO_TILTS)
    atoms = Atoms(relaxed.atoms.symbols, relaxed.atoms.positions, cell=relaxed.atoms.cell, pbc=True)
    after = space_group(atoms)
    record: dict[str, Any] = {
        "formula": start.get_chemical_formula(),
        "init_spg_num": before,
        "final_spg_num": after,
        "broken_symmetry": before != after,
        "max_steps": not relaxed.converged,
        "n_steps": relaxed.n_steps,
        "transport_type": transport(),
        "errors": [],
    }
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # phono3py writes a line a supercell
        warnings.simplefilter("ignore")  # "auto" is what the protocol asks for
        phonons = _prepared(crystal, atoms, displacement)
        phonons.phonon_forces = _forces(phonons.phonon_supercells_with_displacements, calculator)
        phonons.produce_fc2(symmetrize_fc2=True)
        phonons.init_phph_interaction(symmetrize_fc3q=False)
        phonons.run_phonon_solver()
        frequencies = phonons.get_phonon_data()[0]
        imaginary = kappa.has_imaginary_modes(frequencies)
        record |= {"has_imag_ph_modes": imaginary, "ph_freqs": frequencies.tolist()}
        record["conductivity_skipped"] = imaginary or before != after
        if not record["conductivity_skipped"]:
            phonons.forces = _forces(phonons.supercells_with_displacements, calculator)
            phonons.produce_fc3(symmetrize_fc3r=True)
            record |= _conductivity(phonons)
    return record


def _prepared(crystal: Crystal, atoms: Atoms, displacement: float) -> Any:
    from phono3py import Phono3py
    from phonopy.structure.atoms import PhonopyAtoms

    found = Phono3py(
        PhonopyAtoms(list(atoms.symbols), cell=atoms.cell.array, positions=atoms.positions),
        supercell_matrix=crystal.fc3_supercell,
        phonon_supercell_matrix=crystal.fc2_supercell,
        primitive_matrix="auto",
        symprec=SYMPREC,
    )
    found.mesh_numbers = crystal.mesh
    found.generate_displacements(distance=displacement, is_plusminus="auto")
    return found


def _forces(supercells: list[Any], calculator: BaseCalculator) -> np.ndarray:
    """Return the forces of displaced supercells, [n, n_atoms, 3] eV/Å; zeros where phono3py leaves one out."""
    found = []
    n_atoms = next(len(s) for s in supercells if s is not None)
    for cell in supercells:
        if cell is None:
            found.append(np.zeros((n_atoms, 3)))
            continue
        atoms = Atoms(cell.symbols, cell=cell.cell, positions=cell.positions, pbc=True)
        atoms.calc = calculator
        forces = np.asarray(atoms.get_forces(), dtype=float)
        if not np.isfinite(forces).all():
            raise FloatingPointError("forces of a displaced supercell are not finite")
        found.append(forces)
    return np.array(found)


def _conductivity(phonons: Any) -> dict[str, Any]:
    phonons.init_phph_interaction(symmetrize_fc3q=False)
    phonons.run_thermal_conductivity(
        temperatures=[TEMPERATURE], is_isotope=True, transport_type=transport(), boundary_mfp=BOUNDARY
    )
    found = phonons.thermal_conductivity
    if transport() == "MS-SMM19":
        extra = found.get_extra_kappa_output()
        particle, coherence = extra["mode_kappa_P_RTA"][0], extra["mode_kappa_C"][0]
        total, of_particles, of_waves = (extra[f"kappa_{k}"][0] for k in ("TOT_RTA", "P_RTA", "C"))
    else:
        pairs = found.mode_kappa_matrix[0]  # [T, n_q, n_modes, n_modes, 6]; the diagonal is the particles' part
        own = np.arange(pairs.shape[2])
        particle, coherence = pairs[:, :, own, own], pairs.copy()
        coherence[:, :, own, own] = 0
        extra = found.get_extra_kappa_output()
        total, of_particles, of_waves = found.kappa[0], extra["kappa_intra"][0], extra["kappa_inter"][0]
    mode = kappa.mode_total(particle, coherence, found.mode_heat_capacities)
    return {
        "kappa_tot_rta": total.tolist(),
        "kappa_p_rta": of_particles.tolist(),
        "kappa_c": of_waves.tolist(),
        "mode_kappa_tot_rta": mode.tolist(),
        "mode_weights": np.asarray(found.grid_weights).tolist(),
        "q_points": np.asarray(found.qpoints).tolist(),
        "ph_freqs": np.asarray(found.frequencies).tolist(),
    }


class Kappa103:
    """κ_SRME over 103 crystals; what fails scores 2."""

    name, suite = "kappa103", MATBENCH_DISCOVERY
    title = "thermal conductivity, 103 crystals"
    files = (STRUCTURES, REFERENCE)

    def load(self, data: Path) -> Mapping[str, Crystal]:
        found = {}
        for atoms in iread(data / STRUCTURES.path, index=":", format="extxyz"):
            name = str(atoms.info["mp_id"])
            cells = [np.array(atoms.info[f"{k}_supercell"]) for k in ("fc2", "fc3")]
            mesh = tuple(int(n) for n in atoms.info["q_mesh"])
            plain = Atoms(atoms.symbols, atoms.positions, cell=atoms.cell, pbc=True)
            found[name] = Crystal(plain, cells[0], cells[1], mesh, (data / REFERENCE.path, name))  # type: ignore[arg-type]
        return found

    def run(self, item: Crystal, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
        return compute(item, calculator, options.kappa_displacement)

    def doubt(self, item: Crystal, result: Mapping[str, Any]) -> str | None:
        value = kappa.from_record(result).kappa
        return f"κ {value:.3g} W/(m K); counts, as in the suite" if value is not None and value > ABSURD else None

    def score(self, items: Mapping[str, Crystal], results: Mapping[str, Mapping[str, Any]]) -> Score:
        labels = {i: read_references(c.reference[0])[c.reference[1]] for i, c in items.items()}
        predicted = {i: kappa.from_record(r) for i, r in results.items()}
        metrics = kappa.metrics(predicted, labels)
        is_whole = len(items) == N_OF_SUITE
        done = [i for i in items if i in predicted and predicted[i].kappa is not None]
        values = [[float(c[i].kappa or 0) for i in done] for c in (labels, predicted)]
        formulations = sorted({str(r["transport_type"]) for r in results.values()})
        remark = f"Wigner formulation {', '.join(formulations) or 'none'}"
        if not is_whole:
            remark = f"{remark}; {len(items)} of {N_OF_SUITE}. κ_SRME published for these: {_published(list(items))}"
        return Score(
            metrics,
            "SRME, SRE, SRD have no unit; spectrum_w1 in THz",
            len(items),
            len(items) - len(results),
            {k: k for k in metrics} if is_whole else {},
            remark,
            [("κ at 300 K", "W/(m K)", np.array(values[0]), np.array(values[1]))] if done else (),
            {"phonons": {"kappa_103": artefacts.rounded(metrics, 4)}} if is_whole else {},
        )

    def write(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        if len(items) != N_OF_SUITE:
            return  # a part is no submission
        records = [{"material_id": i, **results.get(i, {"errors": ["no result"]})} for i in items]
        artefacts.write_kappa(folder / "phonons-kappa-103.json.gz", records)


def _published(ids: list[str]) -> str:
    """Return the mean SRME of published models over some of the materials."""
    models = published.kappa_103()
    rows = {i: n for n, i in enumerate(models["_reference"]["material_ids"])}
    texts = []
    for key in ("chgnet-0.3.0", "mace-mp-0", "sevennet-l3i5", "nequix-mp-1", "esen-30m-oam"):
        values = [models[key]["srme"][rows[i]] for i in ids]
        texts.append(f"{models[key]['label']} {np.mean(values):.3f}")
    return ", ".join(texts)


@lru_cache(maxsize=1)
def read_references(path: Path) -> dict[str, kappa.Conductivity]:
    """Return id → conductivity of DFT, without the non-analytical correction, as the leaderboard scores."""
    with gzip.open(path, "rt") as file:
        columns = json.load(file)
    keys = ("kappa_TOT_ave", "mode_kappa_TOT_ave", "weights", "frequencies", "symm.no")
    return {i: kappa.from_record({k: columns[k][n] for k in keys}) for n, i in columns["mp_id"].items()}
