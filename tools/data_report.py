"""Say what an extxyz file of several levels holds and how far apart the levels are (the tables of data/README.md).

    python tools/data_report.py data/molecules.extxyz --pairs gfn1:pbe,gfn2:pbe,gfn2:ccsdt,pbe:ccsdt

Energies are compared after a least-squares fit of every level by composition, so that the levels' different zeros do
not count. A frame whose difference between two levels is far from that of its own compound is listed: a wrong unit, an
unconverged label and a swapped frame all look like that; so does a frame far from equilibrium, where levels disagree.
"""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import labelling
import numpy as np
import typer
from ase import Atoms
from ase.io import iread

from mffm.errors import InputError

OUTLIER = 50.0  # times the median absolute deviation; stretched H2O2 reaches 29 between GFN1 and GFN2
GROUP_KEYS = ("molecule", "compound", "pseudo_binary")


def residual_energies(frames: list[Atoms], level: str) -> np.ndarray:
    """Return energies per atom [n_frames] in eV after a fit by composition, NaN where the level has no label."""
    energies = np.array([frame.info.get(f"energy_{level}", np.nan) for frame in frames], dtype=float)
    elements = np.unique(np.concatenate([frame.numbers for frame in frames]))
    counts = np.array([[np.sum(frame.numbers == z) for z in elements] for frame in frames], dtype=float)
    n_atoms = counts.sum(1)
    has = np.isfinite(energies)
    references, *_ = np.linalg.lstsq(counts[has] / n_atoms[has, None], energies[has] / n_atoms[has], rcond=None)
    return (energies - counts @ references) / n_atoms


def compare(frames: list[Atoms], low: str, high: str) -> dict[str, float]:
    """Return how well ``low`` follows ``high``: energies after the composition fits, forces, stress."""
    a, b = residual_energies(frames, low), residual_energies(frames, high)
    has = np.isfinite(a) & np.isfinite(b)
    found = {
        "frames": float(has.sum()),
        "energy R²": float(np.corrcoef(a[has], b[has])[0, 1] ** 2),
        "energy MAE, meV/atom": 1e3 * float(np.abs(a - b)[has].mean()),
    }
    both = [f for f in frames if f"forces_{low}" in f.arrays and f"forces_{high}" in f.arrays]
    if both:
        f_low = np.concatenate([f.arrays[f"forces_{low}"] for f in both]).ravel()
        f_high = np.concatenate([f.arrays[f"forces_{high}"] for f in both]).ravel()
        found["forces cosine"] = float(f_low @ f_high / np.sqrt((f_low @ f_low) * (f_high @ f_high)))
        found["forces MAE, eV/Å"] = float(np.abs(f_low - f_high).mean())
        found["mean |force|, eV/Å"] = float(np.abs(f_high).mean())
    both = [f for f in frames if f"stress_{low}" in f.info and f"stress_{high}" in f.info]
    if both:
        s_low = np.concatenate([f.info[f"stress_{low}"] for f in both])
        s_high = np.concatenate([f.info[f"stress_{high}"] for f in both])
        found["stress correlation"] = float(np.corrcoef(s_low, s_high)[0, 1])
    return found


def group(frame: Atoms) -> str:
    """Return what a frame is a distortion of: its molecule, compound or pseudo-binary, else its formula."""
    return next((str(frame.info[key]) for key in GROUP_KEYS if key in frame.info), str(frame.symbols))


def outliers(frames: list[Atoms], levels: list[str]) -> list[str]:
    """Return lines on frames whose difference between two levels stands far from all others' of their group."""
    groups = np.array([group(frame) for frame in frames])
    lines = []
    for low, high in pairwise(levels):
        difference = residual_energies(frames, high) - residual_energies(frames, low)
        for name in np.unique(groups):
            difference[groups == name] -= np.nanmedian(difference[groups == name])
        scale = np.nanmedian(np.abs(difference))
        for index in np.flatnonzero(np.abs(difference) > OUTLIER * scale):
            value = difference[index]
            lines.append(
                f"{frames[index].info.get('frame_id', index)} ({groups[index]}): {high} - {low} differs from its "
                f"group's median by {1e3 * value:.0f} meV/atom, {abs(value) / scale:.0f} times the usual"
            )
    return lines


def main(
    file: Annotated[Path, typer.Argument(help="extxyz with energy_<level>, forces_<level>, stress_<level>")],
    pairs: Annotated[str, typer.Option(help="low:high, comma-separated; empty: neighbours in the file")] = "",
) -> None:
    """Print counts, costs, distances between levels and outliers."""
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    frames = list(iread(file))
    labels = Counter(key.removeprefix("energy_") for f in frames for key in f.info if key.startswith("energy_"))
    levels = list(labels)
    if not levels:
        raise InputError(f"{file}: no frame has a key energy_<level>")
    print(f"{file}: {len(frames)} frames, {len({str(f.symbols) for f in frames})} formulas")
    for level in levels:
        cpu = [f.info[f"cpu_s_{level}"] for f in frames if f.info.get(f"cpu_s_{level}")]
        residual = residual_energies(frames, level)
        n_forces = sum(f"forces_{level}" in f.arrays for f in frames)
        n_stress = sum(f"stress_{level}" in f.info for f in frames)
        cost = f"{np.mean(cpu):.3g} CPU s" if cpu else "no cost"
        spread = 1e3 * np.nanstd(residual)
        print(f"  {level}: {labels[level]} E, {n_forces} F, {n_stress} S; {cost}; spread {spread:.0f} meV/atom")
    t1 = [f.info["t1_diagnostic"] for f in frames if "t1_diagnostic" in f.info]
    if t1:
        high = sum(value > 0.02 for value in t1)
        print(f"  T1 diagnostic: median {np.median(t1):.3f}, largest {max(t1):.3f}, {high} above 0.02")
    wanted = [tuple(p.split(":")) for p in pairs.split(",") if p] or list(pairwise(levels))
    for pair in wanted:
        if len(pair) != 2 or not set(pair) <= set(levels):
            raise InputError(f"--pairs: {':'.join(pair)} is not low:high out of {', '.join(levels)}")
        values = compare(frames, *pair)
        print(f"{pair[0]} -> {pair[1]}: " + ", ".join(f"{name} {value:.3g}" for name, value in values.items()))
    for line in outliers(frames, levels):
        print(f"outlier: {line}")


if __name__ == "__main__":
    labelling.main(lambda: typer.run(main))
