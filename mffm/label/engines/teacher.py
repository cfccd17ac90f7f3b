"""A release as a teacher: its predictions as labels, under a name that says so."""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ase.stress import voigt_6_to_full_3x3_stress

from mffm.errors import InputError
from mffm.fidelity import Fidelity
from mffm.frame import Frame
from mffm.label.level import Label, atoms_of

if TYPE_CHECKING:
    from mffm.deploy.at_fidelity import AtFidelity


@cache  # loaded once a process; a prediction does not depend on those before
def _teacher(path: str, fidelity: str) -> "AtFidelity":
    from mffm.deploy.at_fidelity import AtFidelity

    return AtFidelity(path, fidelity, dtype="float64")


def fidelity_of(path: str, fidelity: str, name: str | None) -> Fidelity:
    """Return the fidelity of a teacher's labels.

    Raises:
        InputError: no release there, no such fidelity, or a name that is one of the release's own.
    """
    import mffm

    teacher = _teacher(path, fidelity)
    name = name or f"teacher_{fidelity}"
    if name in teacher.spec.fidelities:
        raise InputError(
            f"--fidelity {name}: is a level of theory that {path} was trained on; predictions are not labels of it: "
            f"give another name, e.g. teacher_{fidelity}"
        )
    return Fidelity(
        name,
        level_of_theory=f"predictions of the release {Path(path).resolve().name} at {fidelity}",
        code=f"mffm {mffm.__version__}",
        settings=f"weights {teacher.weights_sha256[:16]}, float64",
    )


def label(frame: Frame, path: str, fidelity: str) -> Label:
    """Predict the labels of a structure."""
    from mffm.data.neighbors import neighbor_list
    from mffm.deploy.at_fidelity import geometry

    teacher, atoms = _teacher(path, fidelity), atoms_of(frame)
    teacher.check(atoms)
    _, positions, cell, pbc = geometry(atoms)
    (found,) = teacher.predict([atoms], [neighbor_list(positions, cell, pbc, teacher.cutoff)])
    if isinstance(found, InputError):
        raise found
    stress = voigt_6_to_full_3x3_stress(found["stress"]) if "stress" in found else None
    return Label(found["energy"], found["forces"], stress)


def refuse(frame: Frame, path: str, fidelity: str) -> str:
    """Return why the release cannot label a structure, or ""."""
    try:
        _teacher(path, fidelity).check(atoms_of(frame))
    except InputError as error:
        return str(error)
    return ""
