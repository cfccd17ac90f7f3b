"""Force-field tasks: energies, forces and virials of frames in DeePMD's layout, with D3 where the suite adds it.

The energy error is taken after the least-squares bias per element of this very test set is removed; forces and virials
directly. A virial is −stress × volume.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from mffm.errors import InputError
from mffm.evaluate.benchmark.task import LAMBENCH, DataFile, Options, Score
from mffm.evaluate.lambench.differences import PUBLISHED
from mffm.evaluate.lambench.scores import FORCE_FIELD

RCOND = 1e-10
MEV = 1000.0
ABSURD = 100.0  # eV/Å of force error
# Folders of the suite's test data below lambench/; molecules have a second set of labels for models of OMol25.
FOLDERS = {
    "AQM": "AQM_PBE",
    "H_nature_2022": "H2combustion_PBE",
    "AIMD_Chig": "AIMDChig_PBE",
    "HEA25_S": "HEA25S",
    "HEA25_bulk": "HEA25",
    "MoS2": "MoS2",
    "CompressBi": "CompressBi",
    "NequIP_NC_2022": "NequIP_NC_2022",
    "Ca_batteries_CM2021": "Ca_batteries",
    "Si_ZEO22": "Si_ZEO22",
    "Carbon_growth": "carbon_film_growth",
    "In2O3_CO2": "In2O3_CO2",
    "REANN_CO2_Ni100": "REANN_CO2_Ni100",
    "Cu_MgO_catalysts": "Cu_MgO_CO2",
    "HPt_NC_2022": "HPt_NC2022",
}
# Frames of the suite's sets where they are known; of the others nobody can say whether a set is the suite's.
N_OF_SUITE = {"REANN_CO2_Ni100": 991}
LAYOUT = (
    "folders of DeePMD's npy: type_map.raw, type.raw (or set.*/real_atom_types.npy), set.*/ with coord, box, energy, "
    "force and, where there is one, virial"
)


@dataclass(frozen=True)
class Frame:
    """A structure with labels: energy (eV), forces [n_atoms, 3] (eV/Å), virial [3, 3] (eV) or None."""

    atoms: Atoms
    energy: float
    forces: np.ndarray
    virial: np.ndarray | None


def read_systems(root: Path) -> Iterator[tuple[str, Frame]]:
    """Yield (name, frame) of all systems below a folder.

    Raises:
        InputError: no system, or arrays that do not fit together.
    """
    maps = sorted(root.rglob("type_map.raw"))
    if not maps:
        raise InputError(f"{root}: no type_map.raw below it; expected {LAYOUT}")
    for type_map in maps:
        folder = type_map.parent
        symbols = np.array(type_map.read_text().split())
        for part in sorted(folder.glob("set.*")):
            yield from _read_set(root, folder, part, symbols)


def _read_set(root: Path, folder: Path, part: Path, symbols: np.ndarray) -> Iterator[tuple[str, Frame]]:
    energies = np.load(part / "energy.npy", allow_pickle=False).reshape(-1)
    n = len(energies)
    positions = np.load(part / "coord.npy", allow_pickle=False).reshape(n, -1, 3)
    forces = np.load(part / "force.npy", allow_pickle=False).reshape(n, -1, 3)
    if forces.shape != positions.shape:
        raise InputError(f"{part}: forces {forces.shape}, coordinates {positions.shape}")
    mixed = part / "real_atom_types.npy"
    if mixed.is_file():
        types = np.load(mixed, allow_pickle=False).astype(int)
    else:
        own = np.array((folder / "type.raw").read_text().split(), dtype=int)
        types = np.broadcast_to(own, (n, len(own)))
    is_periodic = not (folder / "nopbc").exists()
    boxes = np.load(part / "box.npy", allow_pickle=False).reshape(n, 3, 3) if is_periodic else np.zeros((n, 3, 3))
    file = part / "virial.npy"
    virials = np.load(file, allow_pickle=False).reshape(n, 3, 3) if file.is_file() else None
    for k in range(n):
        there = types[k] >= 0  # mixed systems are padded with −1
        atoms = Atoms(
            symbols[types[k][there]].tolist(),
            positions[k][there],
            cell=boxes[k] if is_periodic else None,
            pbc=is_periodic,
        )
        virial = None if virials is None else virials[k]
        name = f"{part.relative_to(root)}/{k}"
        yield name, Frame(atoms, float(energies[k]), forces[k][there], virial)


@dataclass(frozen=True)
class ForceField:
    """RMSE of energies per atom without element bias, of forces and of virials per atom."""

    name: str
    suite: str = LAMBENCH

    @property
    def title(self) -> str:
        return f"force field: {self.name}"

    @property
    def files(self) -> tuple[DataFile, ...]:
        return (DataFile(f"lambench/{FOLDERS[self.name]}/", PUBLISHED, LAYOUT),)

    def load(self, data: Path) -> Mapping[str, Frame]:
        return dict(read_systems(data / self.files[0].path))

    def run(self, item: Frame, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
        atoms = item.atoms.copy()
        atoms.calc = calculator
        energy, forces = float(atoms.get_potential_energy()), np.array(atoms.get_forces())
        stress = None if item.virial is None else np.array(atoms.get_stress(voigt=False))
        damping = FORCE_FIELD[self.name].d3
        if damping is not None:
            from dftd3.ase import DFTD3

            atoms.calc = DFTD3(method="PBE", damping=f"d3{damping}")
            energy += float(atoms.get_potential_energy())
            forces = forces + atoms.get_forces()
            stress = None if stress is None else stress + atoms.get_stress(voigt=False)
        error = forces - item.forces
        result = {
            "energy": energy,
            "force_squares": float(np.square(error).sum()),
            "force_sum": float(np.abs(error).sum()),
            "largest": float(np.abs(error).max()),
        }
        if stress is not None:
            off = (item.virial + stress * atoms.get_volume()) / len(atoms)
            result["virial_squares"] = float(np.square(off).sum())
        return result

    def doubt(self, item: Frame, result: Mapping[str, Any]) -> str | None:
        largest = result["largest"]
        return f"force {largest:.3g} eV/Å off; counts, as in the suite" if largest > ABSURD else None

    def score(self, items: Mapping[str, Frame], results: Mapping[str, Mapping[str, Any]]) -> Score:
        done = [i for i in items if i in results]
        metrics: dict[str, float | None] = dict.fromkeys(("energy_rmse_natoms", "force_rmse", "force_mae"))
        label = value = np.array([])
        if done:
            counts = np.array([np.bincount(items[i].atoms.numbers, minlength=120) for i in done], dtype=float)
            n_atoms = counts.sum(axis=1)
            label = np.array([items[i].energy for i in done])
            value = np.array([results[i]["energy"] for i in done])
            value = value - counts @ np.linalg.lstsq(counts, value - label, rcond=RCOND)[0]
            per_atom = (value - label) / n_atoms
            entries = 3 * float(n_atoms.sum())
            metrics = {
                "energy_rmse_natoms": MEV * float(np.sqrt(np.square(per_atom).mean())),
                "force_rmse": MEV * float(np.sqrt(sum(results[i]["force_squares"] for i in done) / entries)),
                "force_mae": MEV * sum(results[i]["force_sum"] for i in done) / entries,
            }
            virials = [results[i]["virial_squares"] for i in done if "virial_squares" in results[i]]
            if virials:
                metrics["virial_rmse_natoms"] = MEV * float(np.sqrt(sum(virials) / (9 * len(virials))))
            label, value = label / n_atoms, value / n_atoms
        whole = N_OF_SUITE.get(self.name)
        part = "the suite's number of frames is not known" if whole is None else f"{len(items)} of {whole} frames"
        is_whole = len(items) == whole
        biases = "element biases of this set are removed from the energies"
        return Score(
            metrics,
            "meV/atom, meV/Å",
            len(items),
            len(items) - len(done),
            {k: k for k in ("energy_rmse_natoms", "force_rmse", "virial_rmse_natoms")} if is_whole else {},
            biases if is_whole else f"{part}: not to be compared with the leaderboard, and no part of M_FF; {biases}",
            [("energy", "eV/atom", label, value)] if done else (),
        )

    def write(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Write nothing: the suite takes no submissions of this task."""


TASKS = tuple(ForceField(name) for name in FOLDERS)
