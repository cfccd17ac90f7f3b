"""The ASE calculator of a release."""

from collections.abc import Sequence
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
from mffm.data.loader import pack
from mffm.distributed import tune_allocator
from mffm.errors import InputError, known
from mffm.release import load

DTYPES = {"float32": torch.float32, "float64": torch.float64}


class Calculator(AseCalculator):
    """Energy, free energy and per-atom energies (eV), forces (eV/Å), with a cell stress (Voigt, eV/Å³).

    Args:
        release: folder of a release, or of a run.
        fidelity: level of theory to predict; there is no default.
        dtype: "float32", or "float64" for phonons and tight relaxations.
        device: torch device.
        weights: of a run: best, best-<fidelity>, last or raw.

    Raises:
        InputError: unknown fidelity, dtype, or (on calculation) an element that the fidelity has no references for.
    """

    implemented_properties = [  # noqa: RUF012 - as ASE has it
        "energy",
        "free_energy",
        "forces",
        "stress",
        "energies",
    ]

    def __init__(
        self,
        release: str | Path,
        fidelity: str,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        weights: str = "best",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}: known are {known(DTYPES)}")
        tune_allocator()
        self._loaded = load(release, weights, device, DTYPES[dtype])
        index = self._loaded.fidelities.index(fidelity)
        self.fidelity, self.device, self.dtype = fidelity, device, DTYPES[dtype]
        self._potential = (
            self._loaded.potential.folded(fidelity).to(device=device, dtype=self.dtype).eval().requires_grad_(False)
        )
        self._references = self._loaded.spec.reference_table(device)[index : index + 1]

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        assert atoms is not None
        self._check_elements(atoms.numbers)
        periodic = bool(atoms.pbc.any())
        if periodic and abs(np.linalg.det(atoms.cell.array)) < 1e-6 and atoms.pbc.all():
            raise InputError(f"the cell has no volume but pbc is {atoms.pbc.tolist()}; set a cell or pbc=False")
        cell = atoms.cell.array if periodic else np.zeros((3, 3))
        batch = pack(
            [(atoms.numbers, atoms.get_positions(), cell, atoms.pbc)],
            [0],
            self._loaded.spec.model.backbone.cutoff,
            self.dtype,
        ).to(self.device)
        has_volume = bool(batch.volume[0] > 0)
        prediction = self._potential(batch, forces=True, stress=has_volume)
        energy = float(prediction.energy[0].double() + reference_energy(batch, self._references)[0])
        per_atom = prediction.atom_energies.double() + self._references[0, batch.atomic_numbers]
        assert prediction.forces is not None
        self.results = {
            "energy": energy,
            "free_energy": energy,
            "energies": per_atom.cpu().numpy(),
            "forces": prediction.forces.double().cpu().numpy(),
        }
        if has_volume:
            assert prediction.stress is not None
            self.results["stress"] = full_3x3_to_voigt_6_stress(prediction.stress[0].double().cpu().numpy())

    def _check_elements(self, numbers: np.ndarray) -> None:
        missing = [z for z in np.unique(numbers) if bool(torch.isnan(self._references[0, int(z)]))]
        if missing:
            have = self._loaded.spec.references.elements(self.fidelity)
            raise InputError(
                f"element {', '.join(chemical_symbols[z] for z in missing)} is unknown to {self._loaded.path} at "
                f"fidelity {self.fidelity!r}; "
                f"known elements: {' '.join(have) or 'none: this fidelity was trained without energies'}"
            )
