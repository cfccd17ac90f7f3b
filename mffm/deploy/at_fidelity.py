"""A potential at one fidelity, for structures of ASE: what the calculator, ``mffm predict`` and torch-sim share."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from mffm.batch import Batch, reference_energy
from mffm.config.base import validate
from mffm.config.model import D3Config
from mffm.data.checks import closest_pair
from mffm.data.loader import pack
from mffm.data.neighbors import NeighborList
from mffm.data.readers.convert import FARTHEST
from mffm.data.records import Geometry
from mffm.distributed import tune_allocator
from mffm.errors import InputError, known
from mffm.models.potential import Prediction
from mffm.release import NOT_CONSERVATIVE, Loaded, load
from mffm.release import uncertainty as last_layer
from mffm.release.loading import require_device

DTYPES = {"float32": torch.float32, "float64": torch.float64}
Results = dict[str, Any]  # property of ASE → value


class AtFidelity:
    """A potential folded to one fidelity, with that fidelity's element references.

    Args:
        release: folder of a release or of a run, or what ``mffm.release.load`` returns for one.
        fidelity: level of theory; there is no default.
        dtype: "float32", or "float64" for phonons and tight relaxations.
        device: torch device.
        weights: of a run: best, best-<fidelity>, last or raw.
        d3: DFT-D3 to add to a fidelity whose labels have none, with the keys of ``model.d3``.
        uncertainty: predict ``energy_std`` too, eV, of a release that has a last-layer uncertainty.

    Raises:
        InputError: unknown fidelity, dtype or device; the fidelity has DFT-D3 already.
    """

    def __init__(
        self,
        release: str | Path | Loaded,
        fidelity: str,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        weights: str = "best",
        d3: Mapping[str, Any] | None = None,
        uncertainty: bool = False,
    ):
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}: known are {known(DTYPES)}")
        require_device(device)
        tune_allocator()
        self.dtype, self.device, self.fidelity = DTYPES[dtype], torch.device(device), fidelity
        loaded = release if isinstance(release, Loaded) else load(release, weights, device, self.dtype)
        self.spec, self.path, self.weights_sha256 = loaded.spec, loaded.path, loaded.weights_sha256
        self.contents = loaded.contents
        self.is_conservative = loaded.potential.is_conservative
        if not self.is_conservative:
            warnings.warn(f"{loaded.path}: {NOT_CONSERVATIVE}", stacklevel=3)
        index = loaded.fidelities.index(fidelity)
        self._last_layer = last_layer.of(loaded, fidelity) if uncertainty else None
        folded = loaded.potential.folded(fidelity).to(device=self.device, dtype=self.dtype)
        self.potential = folded.eval().requires_grad_(False)
        self.d3 = None if d3 is None else validate(D3Config, d3, "d3")
        if self.d3 is not None:
            if "d3" in self.potential.terms:
                raise InputError(f"{loaded.path}: has DFT-D3 at {fidelity!r} already; leave d3 out")
            from mffm.models.d3 import D3

            self.potential.terms["d3"] = D3({fidelity: self.d3}, [fidelity])
        self._references = loaded.spec.reference_table(self.device)[index : index + 1]
        self._missing = torch.isnan(self._references[0]).cpu().numpy()

    @property
    def cutoff(self) -> float:
        """Å"""
        return self.potential.cutoff

    @property
    def has_stress(self) -> bool:
        return self.potential.has_stress

    def describe(self) -> dict[str, Any]:
        """Return what predictions depend on besides the structure, as JSON."""
        return {
            "potential": str(self.path),
            "weights_sha256": self.weights_sha256,
            "fidelity": self.fidelity,
            "dtype": str(self.dtype).removeprefix("torch."),
            "d3": None if self.d3 is None else self.d3.model_dump(mode="json"),
        }

    def check(self, atoms: Atoms) -> None:
        """Refuse a structure that cannot be calculated; what is wrong with a cell beyond that, its neighbor list says.

        Raises:
            InputError: no atoms, an element that the fidelity has no references for, atoms that are nowhere, a cell of
                no volume, a charge that is no whole number.
        """
        if len(atoms) == 0:
            raise InputError("the structure has no atoms")
        self.check_elements(atoms.numbers)
        _check_positions(atoms.get_positions())
        if atoms.pbc.all() and abs(np.linalg.det(atoms.cell.array)) < 1e-6:
            raise InputError(f"the cell has no volume but pbc is {atoms.pbc.tolist()}; set a cell or pbc=False")
        charge_and_spin(atoms)

    def check_elements(self, numbers: np.ndarray) -> None:
        """Refuse atomic numbers that the fidelity has no references for.

        Raises:
            InputError: there are some.
        """
        elements = len(self._missing)
        missing = [z for z in np.unique(numbers).tolist() if not 0 < z < elements or self._missing[z]]
        if missing:
            have = self.spec.references.elements(self.fidelity)
            names = [chemical_symbols[z] if 0 <= z < elements else f"with atomic number {z}" for z in missing]
            raise InputError(
                f"element {', '.join(names)} is unknown to {self.path} at "
                f"fidelity {self.fidelity!r}; "
                f"known elements: {' '.join(have) or 'none: this fidelity was trained without energies'}"
            )

    def predict(
        self, structures: Sequence[Atoms], lists: Sequence[NeighborList] | None = None
    ) -> list[Results | InputError]:
        """Return ASE's results of structures that ``check`` accepts, in one batch.

        Args:
            lists: neighbor list of each structure within the cutoff, where it is known.

        Returns:
            for each structure energy, free_energy (eV), energies [n] (eV), forces [n, 3] (eV/Å), and stress (Voigt,
            eV/Å³) where it is periodic in three directions; an error where energy or forces are not finite.
        """
        batch = self.pack(
            [geometry(atoms) for atoms in structures], [charge_and_spin(atoms) for atoms in structures], lists
        )
        has_stress = self.has_stress and bool((batch.volume > 0).any())
        prediction = self.potential(batch, forces=True, stress=has_stress)
        energy, per_atom = (part.cpu().numpy() for part in self.totals(batch, prediction))
        assert prediction.forces is not None
        forces = prediction.forces.double().cpu().numpy()
        stress = None if prediction.stress is None else prediction.stress.double().cpu().numpy()
        volume = batch.volume.cpu().numpy()
        stds = None if self._last_layer is None else self._last_layer.std(self.potential, batch).tolist()
        found: list[Results | InputError] = []
        start = 0
        for system, atoms in enumerate(structures):
            place = slice(start, start + len(atoms))
            start += len(atoms)
            if not (np.isfinite(energy[system]) and np.isfinite(forces[place]).all()):
                found.append(_not_finite(atoms))
                continue
            total = float(energy[system])
            results: Results = {
                "energy": total,
                "free_energy": total,
                "energies": per_atom[place],
                "forces": forces[place],
            }
            if stds is not None:
                results["energy_std"] = stds[system]
            if stress is not None and volume[system] > 0:
                results["stress"] = full_3x3_to_voigt_6_stress(stress[system])
            found.append(results)
        return found

    def pack(
        self,
        geometries: Sequence[Geometry],
        charges_and_spins: Sequence[tuple[int, int]] | None = None,
        lists: Sequence[NeighborList] | None = None,
    ) -> Batch:
        """Return structures as a batch for ``potential``, on its device; see ``mffm.data.loader.pack``."""
        charges, spins = (None, None) if charges_and_spins is None else zip(*charges_and_spins, strict=True)
        none = [0] * len(geometries)
        batch = pack(
            geometries, none, self.cutoff, self.dtype, charge=charges, spin_multiplicity=spins, lists=lists
        )  # fmt: skip
        return batch.to(self.device)

    def totals(self, batch: Batch, prediction: Prediction) -> tuple[Tensor, Tensor]:
        """Return energies [n_systems] and atom energies [n_atoms] with element references, float64, eV."""
        energy = prediction.energy.double() + reference_energy(batch, self._references)
        return energy, prediction.atom_energies.double() + self._references[0, batch.atomic_numbers]


def geometry(atoms: Atoms) -> Geometry:
    """Return a structure as potentials take it; the cell counts only where there is a periodic direction."""
    cell = np.asarray(atoms.cell.array, np.float64) if atoms.pbc.any() else np.zeros((3, 3))
    return atoms.numbers, atoms.get_positions(), cell, np.asarray(atoms.pbc, bool)


def charge_and_spin(atoms: Atoms) -> tuple[int, int]:
    """Return the charge and the spin multiplicity of ``atoms.info`` (charge, and spin_multiplicity or spin), or 0.

    Raises:
        InputError: one is not a whole number.
    """
    given = {
        "charge": atoms.info.get("charge", 0),
        "spin_multiplicity": atoms.info.get("spin_multiplicity", atoms.info.get("spin", 0)),
    }
    for name, value in given.items():
        try:
            is_whole = float(value) == int(value)
        except (TypeError, ValueError):
            is_whole = False
        if not is_whole:
            raise InputError(f"atoms.info[{name!r}] = {value!r}: expected a whole number")
    return int(given["charge"]), int(given["spin_multiplicity"])


def _check_positions(positions: np.ndarray) -> None:
    bad = np.argwhere(~(np.abs(positions) <= FARTHEST))
    if len(bad):
        atom, axis = bad[0].tolist()
        raise InputError(
            f"position {positions[atom, axis]:g} Å of atom {atom} along {'xyz'[axis]}: "
            f"expected a number within {FARTHEST:g} Å of the origin; wrap the atoms into the cell"
        )


def _not_finite(atoms: Atoms) -> InputError:
    _, positions, cell, pbc = geometry(atoms)
    pair = closest_pair(positions, cell, pbc, 1e-3)
    where = f"atoms {pair[1]} and {pair[2]} are {pair[0]:.2g} Å apart" if pair else "no two atoms coincide"
    return InputError(f"energy or forces are not finite: {where}; separate the atoms, or use float64")
