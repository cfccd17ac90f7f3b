"""κ and SRME of `mffm benchmark --task matbench-discovery/kappa103`, material by material, beside published ones.

    python tools/check_kappa.py runs/benchmarks/chgnet-kappa --model chgnet-0.3.0 --data $MFFM_DATA

Prints a table in Markdown: thermal conductivity at 300 K in W/(m K), published by Matbench Discovery for the model.
"""

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from mffm.errors import InputError, known
from mffm.evaluate import published
from mffm.evaluate.matbench_discovery import kappa, phonondb


def rows(folder: Path, model: str, references: Path) -> list[str]:
    """Return the lines of the table.

    Raises:
        InputError: no such model; nothing in the folder.
    """
    models = published.kappa_103()
    if model not in models:
        raise InputError(f"{model}: no published κ; known are {known(k for k in models if k != '_reference')}")
    places = {i: n for n, i in enumerate(models["_reference"]["material_ids"])}
    labels = phonondb.read_references(references)
    path = folder / "matbench-discovery" / "kappa103" / "structures.jsonl"
    if not path.is_file():
        raise InputError(f"{path}: is not there; run `mffm benchmark ... --output {folder}` first")
    found = []
    for record in map(json.loads, path.read_text().splitlines()):
        place, result = places[record["id"]], record.get("result")
        if result is None:
            found.append(f"| {record['id']} |{' |' * 6} {record.get('reason')} |")
            continue
        here = kappa.from_record(result)
        theirs = float(models[model]["kappa"][place]), float(models[model]["srme"][place])
        mine = [
            math.nan if here.kappa is None else float(here.kappa),
            kappa.mean_srme([kappa.srme(here, labels[record["id"]])])[0],
        ]
        off = " | ".join(f"{a:.4g} | {b:.4g} | {100 * (a / b - 1):+.2f} %" for a, b in zip(mine, theirs, strict=True))
        found.append(f"| {result['formula']} {record['id']} | {off} | {result['transport_type']} |")
    return found


def main(
    folder: Annotated[Path, typer.Argument(help="--output of the benchmark")],
    model: Annotated[str, typer.Option(help="as Matbench Discovery names it")],
    data: Annotated[Path, typer.Option(help="folder with kappa103/", envvar="MFFM_DATA")],
) -> None:
    """Compare conductivities with published ones."""
    lines = rows(folder, model, data / "kappa103" / "kappas_phononDB_PBE_noNAC.json.gz")
    print("| | κ here | published | off by | SRME here | published | off by | formulation |\n" + "|---" * 8 + "|")
    print("\n".join(lines))


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.exit(f"error: {error}")
