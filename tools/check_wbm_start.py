"""What the start of a relaxation does to WBM's formation energies: DFT's relaxed crystals, strained and displaced.

    mffm benchmark ase:package.module:factory --task matbench-discovery/wbm972 --data $MFFM_DATA --output FOLDER
    python tools/check_wbm_start.py FOLDER --limit 150 --workers 2

The suite starts from structures that DFT has not relaxed, the public 972 are relaxed ones. FOLDER has the results from
these; the first ``--limit`` of them are relaxed again from each start of ``STARTS``, by the same protocol. Prints a
table in Markdown: mean absolute error with the central 95 % of bootstrapped means, and what it is more than from DFT's
relaxed structure, paired. Goes on after a stop.
"""

import json
import sys
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from ase import Atoms

from mffm.errors import InputError
from mffm.evaluate.benchmark.pool import Record, Work, compute
from mffm.evaluate.benchmark.run import subset
from mffm.evaluate.benchmark.source import Source
from mffm.evaluate.benchmark.task import Options
from mffm.evaluate.matbench_discovery.wbm import Material, Wbm972, bootstrap
from mffm.release import read_json

# Name → factor of the volume, and standard deviation of the displacements in Å.
STARTS = {"volume +15 %": (1.15, 0.0), "volume -15 %": (0.85, 0.0), "volume +5 %, displaced by 0.1 Å": (1.05, 0.1)}
GIVEN = "DFT's relaxed"


class Started(Wbm972):
    """The task from another start."""

    def __init__(self, start: str):
        self.start = start

    def load(self, data: Path) -> Mapping[str, Material]:
        return {
            i: replace(m, structures=partial(_moved, m.structures, self.start, i))
            for i, m in super().load(data).items()
        }


def _moved(
    structures: Callable[[], tuple[Atoms, dict[str, Any]]], start: str, name: str
) -> tuple[Atoms, dict[str, Any]]:
    atoms, label = structures()
    volume, sigma = STARTS[start]
    moved = atoms.copy()
    moved.set_cell(atoms.cell * volume ** (1 / 3), scale_atoms=True)
    moved.positions += np.random.default_rng(zlib.crc32(name.encode())).normal(0, sigma, moved.positions.shape)
    return moved, label


def read(path: Path) -> dict[str, Record]:
    """Return the records of a file; a last line that a kill has cut off is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    found = [Record(**json.loads(line)) for line in lines if line.endswith("\n")]
    return {record.id: record for record in found}


def errors(records: Mapping[str, Record], materials: Mapping[str, Material], ids: list[str]) -> np.ndarray:
    """Return |e_form - label| in eV/atom, NaN where there is no result. [len(ids)]"""
    results = [records[i].result for i in ids]
    return np.array(
        [np.nan if r is None else abs(r["e_form"] - materials[i].e_form) for i, r in zip(ids, results, strict=True)]
    )


def row(name: str, of: Mapping[str, Record], mine: np.ndarray, given: np.ndarray, ids: list[str]) -> str:
    """Return the line of a start: errors of all that has a result, and paired with the first start's."""
    results = [r for i in ids if (r := of[i].result) is not None]
    there = ~np.isnan(mine)
    low, high = bootstrap(mine[there])
    more = (mine - given)[there & ~np.isnan(given)]
    least, most = bootstrap(more)
    return (
        f"| {name} | {there.sum()} of {len(ids)} | {mine[there].mean():.4f} ({low:.4f} to {high:.4f}) | "
        f"{more.mean():+.4f} ({least:+.4f} to {most:+.4f}) | {np.median(mine[there]):.4f} | "
        f"{np.mean([r['n_steps'] for r in results]):.0f} | {sum(not r['converged'] for r in results)} |"
    )


def main(
    folder: Annotated[Path, typer.Argument(help="--output of the benchmark")],
    data: Annotated[Path, typer.Option(help="folder with wbm972/", envvar="MFFM_DATA")],
    limit: Annotated[int, typer.Option(min=2, help="structures")] = 150,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    time_limit: Annotated[float, typer.Option(help="seconds a structure")] = 600.0,
) -> None:
    """Relax the same crystals from several starts."""
    place = folder / "matbench-discovery" / "wbm972"
    given = read(place / "structures.jsonl")
    materials = Wbm972().load(data)
    ids = subset(list(materials), limit)
    if any(i not in given for i in ids):
        raise InputError(f"{place}: not all of {len(ids)} structures are there; run `mffm benchmark` to its end first")
    base = errors(given, materials, ids)
    lines = [row(GIVEN, given, base, base, ids)]
    was = read_json(place / "identity.json")
    source, options = Source(was["potential"], was["fidelity"], was["arguments"]), Options(**was["options"])
    for number, start in enumerate(STARTS, 1):
        path = place / f"start-{number}.jsonl"
        records = read(path)
        path.write_text("".join(json.dumps(asdict(r)) + "\n" for r in records.values()))
        work = Work(source, (__name__, "Started", start), data, options, place / "workers.log")
        todo = [i for i in ids if i not in records]
        for record in compute(work, todo, workers, time_limit) if todo else ():
            with path.open("a") as file:
                file.write(json.dumps(asdict(record)) + "\n")
            records[record.id] = record
            print(f"{start}: {len(records)} of {len(ids)}", file=sys.stderr, flush=True)
        lines.append(row(start, records, errors(records, materials, ids), base, ids))
    print("| start | structures | MAE, eV/atom | more than from DFT's relaxed | median | steps | not converged |")
    print("|---" * 7 + "|\n" + "\n".join(lines))


if __name__ == "__main__":
    import check_wbm_start

    try:
        typer.run(check_wbm_start.main)  # by its name: workers look for the task in it
    except InputError as error:
        sys.exit(f"error: {error}")
