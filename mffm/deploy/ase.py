"""The ASE calculator of a release."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import all_changes
from ase.data import chemical_symbols
from ase.stress import full_3x3_to_voigt_6_stress

from mffm.batch import reference_energy
from mffm.config.base import validate
from mffm.config.model import D3Config
from mffm.data.checks import closest_pair
from mffm.data.loader import pack
from mffm.data.readers.convert import FARTHEST
from mffm.distributed import tune_allocator
from mffm.errors import InputError, known
from mffm.release import NOT_CONSERVATIVE, load
from mffm.release import uncertainty as last_layer

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Calculator(AseCalculator):
    """Energy, free energy and per-atom energies (eV), forces (eV/Å), with a cell stress (Voigt, eV/Å³).

    Args:
        release: folder of a release, or of a run.
        fidelity: level of theory to predict; there is no default.
        dtype: "float32", or "float64" for phonons and tight relaxations.
        device: torch device.
        weights: of a run: best, best-<fidelity>, last or raw.
        d3: DFT-D3 to add to a fidelity whose labels have none, with the keys of ``model.d3``: {"functional": "pbe"}.
        uncertainty: with each result ``energy_std``, the last-layer standard deviation of the energy, eV, of a release
            that has one (``mffm release --uncertainty``); costs a second forward without derivatives.

    Attributes:
        is_conservative: forces are minus the gradient of the energy; not so with direct heads, which a warning says.

    Raises:
        InputError: unknown fidelity, dtype or device; on calculation: an element that the fidelity has no references
            for, no atoms, a cell of no volume, coincident atoms.
    """

    implemented_properties = [  # noqa: RUF012 - as ASE has it
        "energy",
        "free_energy",
        "forces",
        "stress",
        "energies",
        "energy_std",
    ]

    def __init__(
        self,
        release: str | Path,
        fidelity: str,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        weights: str = "best",
        d3: Mapping[str, Any] | None = None,
        uncertainty: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}: known are {known(DTYPES)}")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
            reason = str(error).splitlines()[0]
            raise InputError(f"device {str(device)!r} cannot be used: {reason}; 'cpu' always can") from error
        tune_allocator()
        self._loaded = load(release, weights, device, DTYPES[dtype])
        self.is_conservative = self._loaded.potential.is_conservative
        if not self.is_conservative:
            warnings.warn(f"{release}: {NOT_CONSERVATIVE}", stacklevel=2)
        index = self._loaded.fidelities.index(fidelity)
        self._last_layer = last_layer.of(self._loaded, fidelity) if uncertainty else None
        self.fidelity, self.device, self.dtype = fidelity, device, DTYPES[dtype]
        self._potential = (
            self._loaded.potential.folded(fidelity).to(device=device, dtype=self.dtype).eval().requires_grad_(False)
        )
        if d3 is not None:
            if "d3" in self._potential.terms:
                raise InputError(f"{release}: has DFT-D3 at {fidelity!r} already; leave d3 out")
            from mffm.models.d3 import D3

            config = validate(D3Config, d3, "d3")
            self._potential.terms["d3"] = D3({fidelity: config}, [fidelity])
        self._references = self._loaded.spec.reference_table(device)[index : index + 1]

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        if atoms is None or len(atoms) == 0:
            raise InputError("the structure has no atoms")
        self._check_elements(atoms.numbers)
        _check_positions(atoms.get_positions())
        periodic = bool(atoms.pbc.any())
        if periodic and abs(np.linalg.det(atoms.cell.array)) < 1e-6 and atoms.pbc.all():
            raise InputError(f"the cell has no volume but pbc is {atoms.pbc.tolist()}; set a cell or pbc=False")
        cell = atoms.cell.array if periodic else np.zeros((3, 3))
        batch = pack(
            [(atoms.numbers, atoms.get_positions(), cell, atoms.pbc)],
            [0],
            self._loaded.spec.model.backbone.cutoff,
            self.dtype,
            charge=[int(atoms.info.get("charge", 0))],
            spin_multiplicity=[int(atoms.info.get("spin_multiplicity", atoms.info.get("spin", 0)))],
        ).to(self.device)
        has_stress = bool(batch.volume[0] > 0) and self._potential.has_stress
        prediction = self._potential(batch, forces=True, stress=has_stress)
        energy = float(prediction.energy[0].double() + reference_energy(batch, self._references)[0])
        per_atom = prediction.atom_energies.double() + self._references[0, batch.atomic_numbers]
        assert prediction.forces is not None
        if not (np.isfinite(energy) and bool(prediction.forces.isfinite().all())):
            pair = closest_pair(atoms.get_positions(), cell, atoms.pbc, 1e-3)
            where = f"atoms {pair[1]} and {pair[2]} are {pair[0]:.2g} Å apart" if pair else "no two atoms coincide"
            raise InputError(f"energy or forces are not finite: {where}; separate the atoms, or use float64")
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "energies": per_atom.cpu().numpy(),
            "forces": prediction.forces.double().cpu().numpy(),
        }
        if self._last_layer is not None:
            self.results["energy_std"] = float(self._last_layer.std(self._potential, batch)[0])
        if has_stress:
            assert prediction.stress is not None
            self.results["stress"] = full_3x3_to_voigt_6_stress(prediction.stress[0].double().cpu().numpy())

    def _check_elements(self, numbers: np.ndarray) -> None:
        elements = self._references.shape[1]
        missing = [
            z for z in np.unique(numbers).tolist() if not 0 < z < elements or bool(torch.isnan(self._references[0, z]))
        ]
        if missing:
            have = self._loaded.spec.references.elements(self.fidelity)
            names = [chemical_symbols[z] if 0 <= z < elements else f"with atomic number {z}" for z in missing]
            raise InputError(
                f"element {', '.join(names)} is unknown to {self._loaded.path} at "
                f"fidelity {self.fidelity!r}; "
                f"known elements: {' '.join(have) or 'none: this fidelity was trained without energies'}"
            )


def _check_positions(positions: np.ndarray) -> None:
    bad = np.argwhere(~(np.abs(positions) <= FARTHEST))
    if len(bad):
        atom, axis = bad[0].tolist()
        raise InputError(
            f"position {positions[atom, axis]:g} Å of atom {atom} along {'xyz'[axis]}: "
            f"expected a number within {FARTHEST:g} Å of the origin; wrap the atoms into the cell"
        )
