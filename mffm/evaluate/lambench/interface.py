"""Interface energies of two crystals, unrelaxed: (E − n1 E1 − n2 E2) / 2A."""

import csv
from collections.abc import Mapping
from pathlib import Path

from mffm.evaluate.benchmark.task import DataFile
from mffm.evaluate.lambench.differences import PUBLISHED, Difference, DifferenceTask, plain, read_frames

FOLDER = "lambench/Interfaces/"
FILES = (
    DataFile(FOLDER + "structures.traj", PUBLISHED, "ASE trajectory"),
    DataFile(
        FOLDER + "metadata.csv",
        PUBLISHED,
        "columns task_name, system_type (pure, interface), traj_index, energy_total (eV), area (Å²), sub1_name, "
        "sub1_mult, sub2_name, sub2_mult",
    ),
)
MJ_PER_M2 = 16021.76634  # of eV/Å²


def load(data: Path) -> Mapping[str, Difference]:
    """Return interface → its energy, mJ/m²."""
    frames = read_frames(data / FILES[0].path)
    with (data / FILES[1].path).open(newline="") as file:
        rows = list(csv.DictReader(file))
    pure = {r["task_name"]: r for r in rows if r["system_type"] == "pure"}
    found = {}
    for row in rows:
        parts = [(row[f"sub{k}_name"], row[f"sub{k}_mult"]) for k in (1, 2)]
        if row["system_type"] != "interface" or any(name not in pure for name, _ in parts):
            continue
        sides = [(-float(times), pure[name]) for name, times in parts]
        members = [(1.0, row), *sides]
        factor = MJ_PER_M2 / (2 * float(row["area"]))
        label = factor * sum(c * float(r["energy_total"]) for c, r in members)
        terms = [(c, plain(frames[int(r["traj_index"])])) for c, r in members]
        found[f"{row['task_name']}-{row['traj_index']}"] = Difference(terms, factor, label)
    return found


TASK = DifferenceTask("interface", "interface energies", FILES, load, "mJ/m²", 592)
