"""What a level refuses, and that a number from a calculation that did not converge is no label."""

import re
from collections.abc import Callable

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from mffm.errors import InputError
from mffm.frame import Frame
from mffm.label import level as module
from mffm.label.engines import plane_waves, quantum, xtb
from mffm.label.level import Label, NotConverged, classify, spin_fault
from mffm.label.levels import find
from mffm.label.worker import attempted

FrameOf = Callable[..., Frame]


@pytest.mark.parametrize(
    ("name", "charge", "multiplicity", "fault"),
    [
        ("H2O", None, None, ""),
        ("H2O", 0, 1, ""),
        ("H2O", 0, 3, ""),
        ("H2O", 0, 2, "spin multiplicity 2 is impossible with 10 electrons"),
        ("H2O", 1, None, r"charge \+1 without a spin multiplicity"),
        ("H2O", 1, 2, ""),
        ("CH3", None, None, "9 electrons, an odd number, are charged or open-shell"),
        ("CH3", None, 1, "spin multiplicity 1 is impossible with 9 electrons"),
        ("CH3", None, 2, ""),
        ("CH3", -1, 1, ""),
        ("H", 2, 1, "leaves -1 electrons"),
        ("H2", 0, 5, "spin multiplicity 5 is impossible with 2 electrons"),
    ],
)
def test_electrons_are_counted(frame_of: FrameOf, name: str, charge: int, multiplicity: int, fault: str) -> None:
    atoms = Atoms("H") if name == "H" else molecule(name)
    found = spin_fault(frame_of(atoms, charge=charge, spin_multiplicity=multiplicity))
    assert re.search(fault, found) if fault else found == "", found


@pytest.mark.usefixtures("label_codes")
@pytest.mark.parametrize(
    ("level", "atoms", "fault"),
    [
        ("gfn2", Atoms("U2", [[0, 0, 0], [0, 0, 3]]), "element 92: xTB has parameters up to 86"),
        ("gfn2", bulk("W", "bcc").repeat((1, 1, 13)), r"short cell \(2\.23 Å between faces\)"),
        ("gfn2", Atoms("He2", [[0, 0, 0], [0, 0, 3]], cell=[9, 9, 9], pbc=[1, 0, 0]), "periodic along 1 of 3"),
        ("pbe", bulk("NaCl", "rocksalt", 5.64), "periodic: this level takes molecules"),
        ("pbe", Atoms("I2", [[0, 0, 0], [0, 0, 2.7]]), "element I: this level is set up for elements up to Kr"),
        ("ccsdt", Atoms("Ar2", [[0, 0, 0], [0, 0, 3.8]]), "element Ar: this level is set up for elements up to Ne"),
        ("ccsdt", Atoms("He500", np.arange(1500.0).reshape(-1, 3)), "500 atoms: .* at most 24, its cost grows"),
        ("ccsdt_ae", Atoms("He20", np.arange(60.0).reshape(-1, 3)), "20 atoms: .* at most 12"),
    ],
)  # fmt: skip
def test_what_an_engine_cannot_do_is_refused_with_the_reason(
    frame_of: FrameOf, level: str, atoms: Atoms, fault: str
) -> None:
    record, label = attempted(find(level), frame_of(atoms), 0, 1)
    assert label is None
    assert (record.status, record.error_class) == ("failed", "input")
    assert re.search(fault, record.error), record.error


def test_short_cells_are_repeated_or_refused(frame_of: FrameOf) -> None:
    diamond = frame_of(bulk("C", cubic=True))
    assert xtb.refuse(diamond) == ""
    assert xtb.repeats(xtb.extents(diamond.cell), 8, xtb.MOST_REPEATED).tolist() == [3, 3, 3]
    primitive = frame_of(bulk("C"))  # faces 2.06 Å apart, vectors of 2.52 Å: the faces count
    assert xtb.extents(primitive.cell) == pytest.approx([3.57 / 3**0.5] * 3, abs=1e-6)
    flat = frame_of(Atoms("C8", np.random.default_rng(0).uniform(0, 3, (8, 3)), cell=[2, 3, 3.5], pbc=True))
    assert "5x3x3 cells or 360 atoms; at most 300" in xtb.refuse(flat)


@pytest.mark.usefixtures("label_codes")
def test_a_repeated_cell_has_the_labels_of_one(frame_of: FrameOf) -> None:
    """Two cells along x, given as one structure, have twice the energy and the same forces and stress."""
    cell = bulk("LiH", "rocksalt", a=4.6)
    cell.rattle(0.05, seed=1)
    one = xtb.repeated(frame_of(cell), "GFN1-xTB", np.array([2, 2, 1]))
    two = xtb.repeated(frame_of(cell.repeat((2, 1, 1))), "GFN1-xTB", np.array([1, 2, 1]))
    assert two.energy == pytest.approx(2 * one.energy, abs=1e-5)
    assert one.forces is not None
    assert two.forces is not None
    np.testing.assert_allclose(two.forces[:2], one.forces, atol=1e-4)
    np.testing.assert_allclose(two.stress, one.stress, atol=1e-6)
    assert one.info == {"repeated": [2, 2, 1]}


@pytest.mark.usefixtures("label_codes")
def test_open_shells_at_xtb(frame_of: FrameOf) -> None:
    """O2 is a triplet only with spin polarisation, which is therefore a level of its own; closed shells do not care."""
    singlet, triplet = (frame_of(molecule("O2"), spin_multiplicity=m) for m in (1, 3))
    plain, polarised = find("gfn2"), find("spgfn2")
    assert plain.compute(triplet).energy > plain.compute(singlet).energy
    assert polarised.compute(triplet).energy < polarised.compute(singlet).energy - 0.5
    assert polarised.compute(singlet).energy == pytest.approx(plain.compute(singlet).energy, abs=1e-6)
    assert plain.fidelity.level_of_theory != polarised.fidelity.level_of_theory


@pytest.mark.usefixtures("label_codes")
def test_an_unconverged_field_is_no_label(frame_of: FrameOf, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyscf import dft, scf
    from tblite.ase import TBLite

    water = frame_of(molecule("H2O"))
    monkeypatch.setattr(dft.rks.RKS, "max_cycle", 2)  # PySCF returns a number all the same, 9 eV off
    record, label = attempted(find("pbe"), water, 7, 1)
    assert label is None
    assert (record.index, record.status, record.error_class, record.converged) == (7, "failed", "convergence", False)
    monkeypatch.setitem(TBLite.default_parameters, "max_iterations", 2)
    record, label = attempted(find("gfn2"), water, 7, 1)
    assert (record.error_class, label) == ("convergence", None)
    monkeypatch.setattr(scf.hf.RHF, "max_cycle", 2)
    record, label = attempted(find("ccsdt"), water, 7, 1)
    assert (record.error_class, label) == ("convergence", None)


@pytest.mark.slow
@pytest.mark.usefixtures("label_codes")
def test_open_shells_at_pbe_are_unrestricted(frame_of: FrameOf) -> None:
    radical = frame_of(molecule("OH"), charge=0, spin_multiplicity=2)
    label = find("pbe").compute(radical)
    assert label.forces is not None
    energies = []
    for step in (-1e-3, 1e-3):
        radical.positions = molecule("OH").positions + np.array([[0, 0, step], [0, 0, 0]])
        energies.append(find("pbe").compute(radical).energy)
    assert label.forces[0, 2] == pytest.approx(-(energies[1] - energies[0]) / 2e-3, abs=2e-2)


@pytest.mark.slow
@pytest.mark.usefixtures("label_codes")
def test_coupled_cluster_has_its_diagnostic_and_forces(frame_of: FrameOf) -> None:
    water = frame_of(molecule("H2O"))
    record, label = attempted(find("ccsdt"), water, 0, 1)
    assert label is not None
    assert label.forces is None
    assert 0.003 < record.info["t1_diagnostic"] < 0.02
    both = find("ccsdt_ae").compute(water)
    assert both.forces is not None
    assert both.energy < label.energy
    np.testing.assert_allclose(both.forces.sum(0), 0, atol=1e-4)


@pytest.mark.usefixtures("label_codes")
def test_a_label_does_not_depend_on_those_before(frame_of: FrameOf) -> None:
    level = find("gfn2")
    water, ammonia = frame_of(molecule("H2O")), frame_of(molecule("NH3"))
    first = level.compute(water)
    level.compute(ammonia)
    again = level.compute(water)
    assert again.energy == first.energy
    np.testing.assert_array_equal(again.forces, first.forces)


def test_what_is_no_label() -> None:
    Label(1.0, np.zeros((2, 3)), np.zeros((3, 3))).check(2)
    with pytest.raises(NotConverged, match="forces is not finite"):
        Label(1.0, np.full((2, 3), np.nan)).check(2)
    with pytest.raises(module.Inconsistent, match=r"forces of shape \(3, 3\), expected \(2, 3\)"):
        Label(1.0, np.zeros((3, 3))).check(2)


def test_errors_have_classes() -> None:
    assert classify(MemoryError()) == "resource"
    assert classify(NotConverged("x")) == "convergence"
    assert classify(RuntimeError("Did not converge!")) == "convergence"
    assert classify(InputError("the field did not converge because of the input")) == "input"
    assert classify(ZeroDivisionError()) == "unknown"


@pytest.mark.parametrize(
    ("level", "name", "message"),
    [
        ("b3lyp", None, "no such level; known are gfn1, gfn2"),
        ("ase:ase.calculators.emt:EMT", None, "give the fidelity of its labels a name"),
        ("ase:ase.calculators.emt", "x", "expected ase:package.module:factory"),
        ("ase:no_such_module:EMT", "x", "no_such_module cannot be imported"),
        ("ase:ase.calculators.emt:Nothing", "x", "has no function 'Nothing'"),
        ("ase:fates:no_calculator", "x", "made int, no ASE calculator"),
        ("release:nowhere", None, "expected release:FOLDER@fidelity"),
    ],
)
def test_levels_that_there_are_not(level: str, name: str | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find(level, name)


def test_a_missing_code_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = module.importlib.util.find_spec
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name, *rest: None if name == "tblite" else real(name, *rest)
    )
    with pytest.raises(InputError, match=r"tblite is not installed; pip install 'mffm\[label\]'"):
        find("gfn2")


def test_plane_waves_take_spin_paired_crystals(frame_of: FrameOf) -> None:
    """GPAW itself is no dependency, as it needs a compiler and libxc."""
    assert plane_waves.refuse(frame_of(bulk("MgO", "rocksalt", 4.21))) == ""
    assert plane_waves.refuse(frame_of(bulk("Al"))) == ""  # an odd number of electrons is nothing to a metal
    assert "d or f block" in plane_waves.refuse(frame_of(bulk("Fe")))
    assert "not periodic" in plane_waves.refuse(frame_of(molecule("H2O")))
    cell = bulk("MgO", "rocksalt", 4.21, cubic=True).cell.array
    assert plane_waves.mesh(cell) == [4, 4, 4]
    assert plane_waves.mesh(cell, 0.75) == [2, 2, 2]


def test_every_functional_has_a_level() -> None:
    from mffm.label.levels import LEVELS

    assert set(quantum.FUNCTIONALS) < set(LEVELS)
    assert {f"gpaw_{name}" for name in plane_waves.FUNCTIONALS} < set(LEVELS)
