"""The levels by name. A level is its settings: do not change one, add another."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mffm.errors import InputError
from mffm.fidelity import Fidelity
from mffm.frame import Frame
from mffm.label.engines import calculator, plane_waves, quantum, stored, teacher, xtb
from mffm.label.level import Label, Level, versions

CODES = {"tblite": "tblite", "pyscf": "PySCF", "gpaw": "GPAW"}


@dataclass(frozen=True)
class _Known:
    theory: str
    settings: str
    modules: tuple[str, ...]
    compute: Callable[[Frame], Label]
    refuse: Callable[[Frame], str]
    is_molecular: bool = True


def _xtb(method: str, spin_polarization: float | None) -> _Known:
    spin = "spin polarisation 1" if spin_polarization else "no spin polarisation"
    return _Known(
        ("sp" if spin_polarization else "") + method,
        f"electronic temperature 300 K, {spin}; crystals: Gamma point of the cell repeated to 9 Å",
        ("tblite.ase",),
        partial(xtb.label, method=method, spin_polarization=spin_polarization),
        xtb.refuse,
    )


def _dft(name: str, theory: str, grid: int) -> _Known:
    return _Known(
        theory,
        f"all electrons, density fitting, grid level {grid}, restricted (open shells: unrestricted), "
        "no dispersion correction",
        ("pyscf.dft",),
        partial(quantum.density_functional, name=name),
        quantum.refuse_dft,
    )


def _gpaw(name: str, theory: str) -> _Known:
    return _Known(
        f"{theory}, plane waves 700 eV",
        "PAW setups PBE, half-shifted mesh of at most 0.4/Å, Fermi smearing 0.05 eV, spin-paired",
        ("gpaw",),
        partial(plane_waves.label, name=name),
        plane_waves.refuse,
        is_molecular=False,
    )


LEVELS: dict[str, _Known] = {
    "gfn1": _xtb("GFN1-xTB", None),
    "gfn2": _xtb("GFN2-xTB", None),
    "spgfn1": _xtb("GFN1-xTB", 1.0),
    "spgfn2": _xtb("GFN2-xTB", 1.0),
    "pbe": _dft("pbe", "PBE/def2-SVP", 2),
    "r2scan": _dft("r2scan", "r2SCAN/def2-SVP", 3),
    "wb97x": _dft("wb97x", "wB97X/6-31G*", 2),
    "ccsdt": _Known(
        "CCSD(T)/cc-pVDZ",
        "frozen core, restricted Hartree-Fock reference",
        ("pyscf.cc",),
        quantum.ccsdt,
        partial(quantum.refuse_ccsdt, all_electron=False),
    ),
    "ccsdt_ae": _Known(
        "CCSD(T)/cc-pVDZ, all electrons",
        "all electrons correlated, restricted Hartree-Fock reference",
        ("pyscf.cc", "pyscf.grad.ccsd_t"),
        quantum.ccsdt_all_electron,
        partial(quantum.refuse_ccsdt, all_electron=True),
    ),
    "gpaw_pbe": _gpaw("pbe", "PBE"),
    "gpaw_r2scan": _gpaw("r2scan", "r2SCAN"),
}


def find(text: str, name: str | None = None) -> Level:
    """Return the level of a command line.

    Args:
        text: a name of ``LEVELS``, ``ase:package.module:factory``, ``release:FOLDER@fidelity`` or
            ``store:FOLDER@fidelity``.
        name: of the fidelity; None: the level's own name, ``teacher_<fidelity>`` for a release.

    Raises:
        InputError: no such level, its code is not installed, or a name is needed or is another fidelity's.
    """
    kind, colon, place = text.partition(":")
    if colon and kind == "ase":
        return _of_calculator(place, name)
    if colon and kind == "release":
        return _of_release(place, name)
    if colon and kind == "store":
        return _of_store(place, name)
    if text not in LEVELS:
        raise InputError(
            f"--level {text}: no such level; known are {', '.join(LEVELS)}, ase:package.module:factory, "
            "release:FOLDER@fidelity, and store:FOLDER@fidelity"
        )
    found = LEVELS[text]
    code = ", ".join(f"{CODES[package]} {version}" for package, version in versions(found.modules).items())
    fidelity = Fidelity(name or text, found.theory, code, found.settings)
    return Level(fidelity, found.modules, found.compute, found.refuse, found.is_molecular)


def _of_calculator(place: str, name: str | None) -> Level:
    if name is None:
        raise InputError(f"--level ase:{place}: give the fidelity of its labels a name with --fidelity")
    factory = calculator.factory_of(place)
    example = calculator.made_by(factory, place)
    module = place.partition(":")[0]
    code = ", ".join(f"{package} {version}" for package, version in versions([module]).items())
    fidelity = Fidelity(name, f"{type(example).__name__} ({place})", code, calculator.settings(example))
    return Level(fidelity, (module,), partial(calculator.label, factory=factory), is_molecular=False)


def _split(kind: str, place: str) -> tuple[str, str]:
    """Return folder, absolute, and fidelity of FOLDER@fidelity."""
    path, at, of = place.rpartition("@")
    if not at or not path or not of:
        raise InputError(f"--level {kind}:{place}: expected {kind}:FOLDER@fidelity; there is no default fidelity")
    return str(Path(path).resolve()), of


def _of_release(place: str, name: str | None) -> Level:
    path, of = _split("release", place)
    fidelity = teacher.fidelity_of(path, of, name)
    return Level(
        fidelity,
        ("mffm.deploy.at_fidelity",),
        partial(teacher.label, path=path, fidelity=of),
        partial(teacher.refuse, path=path, fidelity=of),
        is_molecular=False,
    )


def _of_store(place: str, name: str | None) -> Level:
    path, of = _split("store", place)
    return Level(
        stored.fidelity_of(path, of, name),
        ("mffm.data.store",),
        partial(stored.label, path=path, fidelity=of),
        partial(stored.refuse, path=path, fidelity=of),
        is_molecular=False,
    )
