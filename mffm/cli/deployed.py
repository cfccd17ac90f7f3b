"""What the commands that use a potential share: its options, and structures from files."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mffm.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms

PotentialArgument = Annotated[Path, typer.Argument(help="folder of a release or a run")]
StructureArgument = Annotated[Path, typer.Argument(help="file with a structure; any that ASE reads")]
FolderArgument = Annotated[Path, typer.Argument(help="folder for the report")]
FidelityOption = Annotated[str, typer.Option(help="level of theory to predict; there is no default")]
DtypeOption = Annotated[str, typer.Option(help="float32 or float64")]
DeviceOption = Annotated[str, typer.Option(help="torch device: cpu, cuda, cuda:1")]
WeightsOption = Annotated[str, typer.Option(help="of a run: best, best-<fidelity>, last, raw")]
D3Option = Annotated[str | None, typer.Option(help="functional of a DFT-D3(BJ) to add, e.g. pbe")]
IndexOption = Annotated[
    int | None, typer.Option(help="which structure of the file; needed where it has several")
]  # fmt: skip


def dispersion(functional: str | None) -> dict[str, Any] | None:
    """Return the ``d3`` of a calculator from the option."""
    return None if functional is None else {"functional": functional}


def read_structures(path: Path, index: int | None) -> "list[Atoms]":
    """Return the structures of a file, or the one of an index.

    Raises:
        InputError: no such file, not one that ASE reads, no such structure.
    """
    from ase.io import read

    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        found = read(str(path), index=":")
    except Exception as error:  # ASE's formats raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: ASE cannot read it ({type(error).__name__}: {reason})") from error
    structures = found if isinstance(found, list) else [found]
    if not structures:
        raise InputError(f"{path}: no structures in it")
    if index is None:
        return structures
    if not -len(structures) <= index < len(structures):
        raise InputError(f"--index {index}: {path} has structures 0 to {len(structures) - 1}")
    return [structures[index]]


def read_structure(path: Path, index: int | None) -> "Atoms":
    """Return the one structure of a file, or the one of an index; errors as ``read_structures``.

    Raises:
        InputError: there are several and no index says which.
    """
    structures = read_structures(path, index)
    if len(structures) > 1:
        raise InputError(f"{path}: {len(structures)} structures; say which with --index 0 to {len(structures) - 1}")
    return structures[0]
