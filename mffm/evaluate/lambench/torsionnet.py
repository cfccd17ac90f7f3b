"""Torsion profiles: TorsionNet500 (Rai et al., JCIM 62, 785 (2022)) at CCSD(T)/CBS, 24 conformers a fragment."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from mffm.evaluate.benchmark.task import LAMBENCH, DataFile, Options, Score
from mffm.evaluate.lambench.differences import PUBLISHED

KCAL_PER_EV = 23.0609  # as the suite's task has it
HIGH_BARRIER_ERROR = 1.0  # kcal/mol
N_OF_SUITE = 500
ABSURD = 500.0  # kcal/mol of a barrier
FULL = DataFile(
    "lambench/torsionnet500_ccsdt/",
    f"labels of arXiv:2505.06462; {PUBLISHED}",
    "a folder a fragment with DeePMD's raw files: type.raw, type_map.raw, coord.raw (Å), energy.raw (kcal/mol)",
)
MINI = DataFile(
    "torsionnet500_meta/TorsionNet500_mini_with_coords.json",
    "github.com/instadeepai/mlipaudit tests/data (Apache-2.0)",
    "fragment → {atom_symbols, conformer_coordinates, dft_energy_profile [(angle, kcal/mol)]}",
    "cb1004b7ebff6faae7e61bd8061fd8490b1acba1469863aaf3405b75b50a4ea4",
)


@dataclass(frozen=True)
class Profile:
    """Conformers of a fragment and their energies, kcal/mol over the lowest."""

    conformers: Sequence[Atoms]
    energies: Sequence[float]


def load(data: Path) -> Mapping[str, Profile]:
    """Return fragment → profile, of the suite's folder."""
    found = {}
    for folder in sorted(p for p in (data / FULL.path).iterdir() if p.is_dir()):
        names = (folder / "type_map.raw").read_text().split()
        symbols = [names[int(t)] for t in (folder / "type.raw").read_text().split()]
        positions = np.loadtxt(folder / "coord.raw", ndmin=2).reshape(-1, len(symbols), 3)
        energies = np.loadtxt(folder / "energy.raw", ndmin=1)
        found[folder.name] = Profile([Atoms(symbols, p) for p in positions], (energies - energies.min()).tolist())
    return found


def load_mini(data: Path) -> Mapping[str, Profile]:
    """Return the two fragments with 5 conformers that are public in a repository, labels of DFT."""
    found = {}
    for name, entry in json.loads((data / MINI.path).read_text()).items():
        energies = np.array([e for _, e in entry["dft_energy_profile"]])
        conformers = [Atoms(entry["atom_symbols"], xyz) for xyz in entry["conformer_coordinates"]]
        found[name] = Profile(conformers, (energies - energies.min()).tolist())
    return found


@dataclass(frozen=True)
class TorsionTask:
    """MAE of profiles, MAE of barriers (highest minus lowest) and the number of barriers more than 1 kcal/mol off."""

    name: str
    title: str
    file: DataFile
    is_suite: bool
    remark: str = ""
    suite: str = LAMBENCH

    @property
    def files(self) -> Sequence[DataFile]:
        return (self.file,)

    def load(self, data: Path) -> Mapping[str, Profile]:
        return load(data) if self.is_suite else load_mini(data)

    def run(self, item: Profile, calculator: BaseCalculator, options: Options) -> dict[str, Any]:
        energies = []
        for conformer in item.conformers:
            atoms = conformer.copy()
            atoms.calc = calculator
            energies.append(float(atoms.get_potential_energy()) * KCAL_PER_EV)
        lowest = min(energies)
        return {"energies": [e - lowest for e in energies]}

    def doubt(self, item: Profile, result: Mapping[str, Any]) -> str | None:
        barrier = max(result["energies"])
        return f"barrier of {barrier:.3g} kcal/mol; counts, as in the suite" if barrier > ABSURD else None

    def score(self, items: Mapping[str, Profile], results: Mapping[str, Mapping[str, Any]]) -> Score:
        done = [i for i in items if i in results]
        profiles = [np.array(results[i]["energies"]) for i in done]
        labels = [np.array(items[i].energies) for i in done]
        value = np.concatenate(profiles) if done else np.array([])
        label = np.concatenate(labels) if done else np.array([])
        barriers = np.abs([p.max() - q.max() for p, q in zip(profiles, labels, strict=True)])
        metrics: dict[str, float | None] = {
            "MAE": float(np.abs(value - label).mean()) if done else None,
            "MAEB": float(barriers.mean()) if done else None,
            # A fragment that failed has no barrier within 1 kcal/mol.
            "NABH_h": int((barriers > HIGH_BARRIER_ERROR).sum()) + len(items) - len(done),
            "RMSE": float(np.sqrt(np.square(value - label).mean())) if done else None,
        }
        is_whole = self.is_suite and len(items) == N_OF_SUITE
        part = f"{len(items)} of {N_OF_SUITE}: not to be compared with the leaderboard"
        return Score(
            metrics,
            "kcal/mol; NABH_h is a count",
            len(items),
            len(items) - len(done),
            {k: k for k in metrics} if is_whole else {},
            ". ".join(t for t in ("" if is_whole else part, self.remark) if t),
            [("torsion profiles", "kcal/mol", label, value)] if done else (),
        )

    def write(self, items: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Write nothing: the suite takes no submissions of this task."""


TASK = TorsionTask("torsionnet", "TorsionNet500 profiles", FULL, is_suite=True)
TASK_MINI = TorsionTask(
    "torsionnet-mini",
    "2 fragments of TorsionNet500, 5 conformers",
    MINI,
    is_suite=False,
    remark="labels are DFT's and profiles incomplete: shows that the task runs, says nothing of quality",
)
