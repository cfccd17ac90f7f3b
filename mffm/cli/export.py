"""Files for other codes: export."""

from pathlib import Path
from typing import Annotated

import typer

from mffm.cli.deployed import DeviceOption, DtypeOption
from mffm.cli.output import say
from mffm.errors import InputError


def export(
    source: Annotated[Path, typer.Argument(help="folder of a release or a run; with --compile also an export")],
    output: Annotated[Path, typer.Argument(help="NAME.pt2 to write")],
    fidelity: Annotated[str | None, typer.Option(help="level of theory of a release; there is no default")] = None,
    dtype: DtypeOption = "float64",
    device: DeviceOption = "cpu",
    compiled: Annotated[bool, typer.Option("--compile", help="compile it too, for this machine: minutes")] = False,
    charge: Annotated[int, typer.Option(help="of every system, e; where the model takes it")] = 0,
    spin: Annotated[int, typer.Option(help="multiplicity of every system; where the model takes it")] = 0,
) -> None:
    """Write a potential in edge form, for LAMMPS and other codes, without its model code."""
    from mffm.deploy.edges import compile_export
    from mffm.deploy.edges import export as write

    if source.suffix == ".pt2":
        if not compiled or fidelity is not None or (dtype, device, charge, spin) != ("float64", "cpu", 0, 0):
            raise InputError(
                f"{source}: an export already; --compile, and no other option, compiles it for this machine"
            )
        model = compile_export(source, output)
    else:
        if fidelity is None:
            raise InputError(f"mffm export {source}: say which level of theory with --fidelity; there is no default")
        model = write(source, output, fidelity, dtype, device, compiled, charge, spin)
    d = model.description
    say(
        f"{output}: {d.source} at {d.fidelity}, {model.form}, {d.dtype} on {model.device}; "
        f"cutoff {d.cutoff:g} Å, {d.n_layers} layer{'s' * (d.n_layers > 1)}; {' '.join(d.elements)}"
    )
