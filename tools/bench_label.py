"""What a label costs: structures a second and core, and the core-hours of a large set.

    OMP_NUM_THREADS=1 python tools/bench_label.py [FILES ...] --level gfn2 --structures 2000
    python tools/bench_label.py [FILES ...] --structures 100000 --write many.extxyz    # for a long run of `mffm label`

Each file's structures, displaced anew by 0.01 Å as often as needed, are labelled by ``mffm.label`` with one worker,
once all and once a tenth of them: the difference has no start-up in it. CPU seconds are those of all processes, so that
other work on the machine hardly counts; what the calculation alone took is in the records. Prints a table in Markdown.
"""

import json
import os
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from ase import Atoms
from ase.io import read, write

from mffm.executor import machine
from mffm.label.journal import Limits
from mffm.label.run import label
from mffm.label.structures import Source
from mffm.label.work import Request

DATA = Path(__file__).parents[1] / "data"
LARGE = 11_000_000  # structures


@dataclass(frozen=True)
class Cost:
    """CPU and wall seconds of a run, and CPU seconds of its calculations alone."""

    n: int
    cpu: float
    wall: float
    calculation: float


def frames_of(path: Path) -> list[Atoms]:
    return [frame for frame in read(path, ":") if isinstance(frame, Atoms)]


def displaced(frames: list[Atoms], n: int, rng: np.random.Generator) -> list[Atoms]:
    """Return ``n`` structures, without labels, that no two are the same of."""
    made = []
    for i in range(n):
        frame = frames[i % len(frames)]
        kept = {key: frame.info[key] for key in ("charge", "multiplicity", "spin_multiplicity") if key in frame.info}
        atoms = Atoms(frame.numbers, frame.positions, cell=frame.cell, pbc=frame.pbc, info=kept)
        atoms.positions += rng.normal(0, 0.01, atoms.positions.shape)
        made.append(atoms)
    return made


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measured(frames: list[Atoms], level: str, folder: Path) -> Cost:
    """Label structures and return what it cost."""
    source, out = folder / f"in-{len(frames)}.extxyz", folder / f"out-{len(frames)}.extxyz"
    write(source, frames)
    cpu, wall = cpu_seconds(), time.monotonic()
    label(Request(Source.of([source]), level), "", out, 1, Limits(), lambda *_: None)
    cpu, wall = cpu_seconds() - cpu, time.monotonic() - wall
    records = [json.loads(line) for line in out.with_name(f"{out.stem}.records.jsonl").read_text().splitlines()]
    return Cost(len(frames), cpu, wall, sum(record["cpu_ns"] or 0 for record in records) * 1e-9)


def row(path: Path, level: str, n: int) -> str:
    """Return one row of the table."""
    made = displaced(frames_of(path), n, np.random.default_rng(0))
    with tempfile.TemporaryDirectory() as folder:
        few = measured(made[: max(1, n // 10)], level, Path(folder))
        all_of_them = measured(made, level, Path(folder))
    each = (all_of_them.cpu - few.cpu) / (all_of_them.n - few.n)
    start = few.cpu - few.n * each
    calculation = all_of_them.calculation / all_of_them.n
    atoms = [len(frame) for frame in made]
    return (
        f"| {level} | {path.name} | {n:,} | {min(atoms)} to {max(atoms)}, mean {np.mean(atoms):.1f} | "
        f"{1e3 * calculation:.2f} | {1e3 * each:.2f} | {1 / each:.0f} | {start:.1f} | {LARGE * each / 3600:,.0f} |"
    )


def main(
    files: Annotated[list[Path] | None, typer.Argument(help="structures; the shipped molecules if not given")] = None,
    level: Annotated[str, typer.Option(help="of mffm label")] = "gfn2",
    structures: Annotated[int, typer.Option(min=20, help="to label, of each file")] = 2000,
    write_to: Annotated[
        Path | None,
        typer.Option("--write", help="file for so many structures of all files in turn; nothing is measured"),
    ] = None,
) -> None:
    """Measure a level on structures; a table in Markdown."""
    files = files or [DATA / "molecules.extxyz"]
    if write_to is not None:
        frames = [frame for path in files for frame in frames_of(path)]
        write(write_to, displaced(frames, structures, np.random.default_rng(0)))
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"{machine()}; load {os.getloadavg()[0]:.1f}\n")
    print(
        "| level | structures of | labelled | atoms | calculation, CPU ms | all, CPU ms | a second and core | "
        f"start-up, CPU s | {LARGE:,} structures, core-hours |\n|---|---|---|---|---|---|---|---|---|"
    )
    for path in files:
        print(row(path, level, structures), flush=True)


if __name__ == "__main__":
    typer.run(main)
