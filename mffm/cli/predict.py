"""Labels for structures: predict."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from mffm.cli.deployed import (
    D3Option,
    DeviceOption,
    DtypeOption,
    FidelityOption,
    PotentialArgument,
    WeightsOption,
    dispersion,
)
from mffm.cli.output import EXIT_KEYBOARD, say
from mffm.cli.progress import Stages


def predict(
    potential: PotentialArgument,
    source: Annotated[Path, typer.Argument(help="file with structures; any that ASE reads")],
    output: Annotated[Path, typer.Argument(help="extxyz to write")],
    fidelity: FidelityOption,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    weights: WeightsOption = "best",
    d3: D3Option = None,
    edges: Annotated[int, typer.Option(min=1, help="edges of a batch, about")] = 20_000,
    skip_failures: Annotated[
        bool, typer.Option("--skip-failures", help="write structures that cannot be calculated with the reason")
    ] = False,
) -> None:
    """Write the structures of a file with predicted labels; the same command goes on after a kill."""
    from mffm.deploy.at_fidelity import AtFidelity
    from mffm.deploy.predict import count_frames, predict_file

    at = AtFidelity(potential, fidelity, dtype, device, weights, dispersion(d3))
    total = count_frames(source)[0] if source.is_file() and source.suffix in (".xyz", ".extxyz") else None
    started = time.perf_counter()
    try:
        with Stages() as shown:
            summary = predict_file(
                at, source, output, edges, skip_failures, lambda n: shown("frames", n, total)
            )  # fmt: skip
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it stopped", file=sys.stderr)
        raise typer.Exit(EXIT_KEYBOARD) from None
    before = f", {summary.n_before} of them before" if summary.n_before else ""
    failed = f", {summary.n_failed} without labels (mffm_error)" if summary.n_failed else ""
    rate = (summary.n_frames - summary.n_before) / (time.perf_counter() - started)
    say(f"{summary.path}: {summary.n_frames} frames at {fidelity}{before}{failed}; {rate:.3g} a second")
