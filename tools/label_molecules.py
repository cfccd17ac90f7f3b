"""Label molecules at several levels of theory on the same geometries.

    python tools/label_molecules.py GEOMETRIES.extxyz OUT.extxyz --levels gfn1,gfn2,pbe,ccsdt

Needs ``pip install -e ".[label]"`` (PySCF 2.14.0, tblite 0.8.0: wheels, no compiler). Gas phase, closed shell;
``info["charge"]`` (default 0). A level is its settings: do not change one, add another.

    gfn1, gfn2   GFN1-xTB, GFN2-xTB (tblite)                                          energy, forces
    pbe          PBE/def2-SVP, density fitting, grid 2                                energy, forces
    r2scan       r2SCAN/def2-SVP, density fitting, grid 3                             energy, forces
    wb97x        wB97X/6-31G*, Cartesian d, density fitting, grid 2 (the ANI level)   energy, forces
    ccsdt        CCSD(T)/cc-pVDZ, frozen core                                         energy
    ccsdt_ae     CCSD(T)/cc-pVDZ, all electrons: not the fidelity ccsdt               energy, forces

CPU seconds for 3, 6, 9 and 12 atoms: pbe 0.7, 1.9, 4.1, 7.3; ccsdt 0.4, 2.0, 6.8, 27; ccsdt_ae 25 for methanol; xTB
milliseconds. OUT has eV and eV/Å under ``energy_<level>`` and ``forces_<level>``, and the info of GEOMETRIES.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import labelling
import numpy as np
import typer
from ase import Atoms
from labelling import Job, Level

from mffm.errors import InputError
from mffm.frame import Frame
from mffm.label.engines import quantum, xtb
from mffm.label.level import Label


def charge(frame: Atoms) -> int:
    return round(float(frame.info.get("charge", 0)))


def multiplicity(frame: Atoms) -> int:
    for key in ("multiplicity", "spin_multiplicity"):
        if key in frame.info:
            return int(frame.info[key])
    return 1


def level(module: str, compute: Callable[[Frame], Label], refuse: Callable[[Frame], str]) -> Level:
    """Return a level of mffm.label for frames of these files."""

    def computed(atoms: Atoms) -> Label:
        frame = Frame(atoms.numbers.astype(np.uint8), atoms.positions, np.zeros((3, 3)), np.zeros(3, bool))
        frame.charge, frame.spin_multiplicity = charge(atoms), multiplicity(atoms)
        reason = refuse(frame)
        if reason:
            raise InputError(reason)
        return compute(frame)

    return Level((module,), computed)


def ccsdt_all_electron(frame: Frame) -> Label:
    """Leave out the T1 diagnostic: these files have that of ccsdt."""
    return replace(quantum.ccsdt_all_electron(frame), info={})


LEVELS = {
    "gfn1": level("tblite.ase", partial(xtb.label, method="GFN1-xTB"), xtb.refuse),
    "gfn2": level("tblite.ase", partial(xtb.label, method="GFN2-xTB"), xtb.refuse),
    "pbe": level("pyscf.dft", partial(quantum.density_functional, name="pbe"), quantum.refuse_dft),
    "r2scan": level("pyscf.dft", partial(quantum.density_functional, name="r2scan"), quantum.refuse_dft),
    "wb97x": level("pyscf.dft", partial(quantum.density_functional, name="wb97x"), quantum.refuse_dft),
    "ccsdt": level("pyscf.cc", quantum.ccsdt, partial(quantum.refuse_ccsdt, all_electron=False)),
    "ccsdt_ae": level("pyscf.cc", ccsdt_all_electron, partial(quantum.refuse_ccsdt, all_electron=True)),
}


def label(job: Job) -> Atoms:
    """Return the frame with its labels (runs in a worker)."""
    return labelling.compute(job, LEVELS)


def reason_to_leave_out(frame: Atoms, max_atoms: int) -> str | None:
    """Return why these levels cannot label a frame, or None."""
    if not 1 < len(frame) <= max_atoms:
        return f"not 2 to {max_atoms} atoms"
    if (frame.numbers.sum() - charge(frame)) % 2:
        return "odd number of electrons"
    if multiplicity(frame) != 1:
        return "not a singlet"
    return None


def main(
    geometries: Annotated[Path, typer.Argument(help="anything ASE reads; info: frame_id, charge")],
    out: Annotated[Path, typer.Argument(help="extxyz file to write or to go on with")],
    levels: Annotated[str, typer.Option(help="comma-separated")] = "gfn1,gfn2,pbe,ccsdt",
    n: Annotated[int, typer.Option(help="label a random subset of this size; 0: all")] = 0,
    seed: Annotated[int, typer.Option(help="of the order and the subset")] = 0,
    max_atoms: Annotated[int, typer.Option(help="leave larger molecules out")] = 12,
    workers: Annotated[int, typer.Option(min=1, help="processes, one thread each")] = 1,
    minutes: Annotated[float, typer.Option(help="nothing is started after this time")] = 50,
) -> None:
    """Label closed-shell molecules with gfn1, gfn2, pbe, r2scan, wb97x, ccsdt or ccsdt_ae. Resumes."""
    names = labelling.choose_levels(levels, LEVELS)
    frames = labelling.read_frames([geometries])
    chosen = labelling.report_left_out(frames, lambda frame: reason_to_leave_out(frame, max_atoms))
    if not chosen:
        raise InputError(f"{geometries}: no frame is left to label")
    labelling.versions(module for name in names for module in LEVELS[name].modules)
    jobs = labelling.plan(chosen, names, n, seed)
    labelling.run(jobs, out, label, minutes, workers)


if __name__ == "__main__":
    labelling.main(lambda: typer.run(main))
