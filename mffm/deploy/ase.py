"""The ASE calculator of a release."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import all_changes

from mffm.deploy.at_fidelity import AtFidelity, charge_and_spin, geometry
from mffm.deploy.ensemble import Ensemble
from mffm.deploy.skin import SkinList
from mffm.errors import InputError
from mffm.release import Loaded

SKIN = 0.5  # Å


class Calculator(AseCalculator):
    """Energy, free energy and per-atom energies (eV), forces (eV/Å), with a cell stress (Voigt, eV/Å³).

    Charge and spin multiplicity are those of ``atoms.info`` ("charge", "spin_multiplicity"), where the model takes
    them (``model.backbone.charge_and_spin``).

    Args:
        release: folder of a release, or of a run. Several are an ensemble: results are the means, with ``energy_std``
            (eV, of the total energy) and ``forces_std`` [n, 3] (eV/Å), the standard deviations of the members.
        fidelity: level of theory to predict; there is no default.
        dtype: "float32", or "float64" for phonons and tight relaxations.
        device: torch device.
        weights: of a run: best, best-<fidelity>, last or raw.
        d3: DFT-D3 to add to a fidelity whose labels have none, with the keys of ``model.d3``: {"functional": "pbe"}.
        skin: Å; the neighbor list is kept until atoms have moved by about half of it. Results do not depend on it.
        uncertainty: with each result ``energy_std``, the last-layer standard deviation of the energy, eV, of a release
            that has one (``mffm release --uncertainty``); costs a second forward without derivatives. Not of
            an ensemble.

    Attributes:
        is_conservative: forces are minus the gradient of the energy; not so with direct heads, which a warning says.

    Raises:
        InputError: unknown fidelity, dtype or device; several releases that are no ensemble; on calculation: an element
            that the fidelity has no references for, no atoms, a cell of no volume, coincident atoms.
    """

    implemented_properties = [  # noqa: RUF012 - as ASE has it
        "energy",
        "free_energy",
        "forces",
        "stress",
        "energies",
        "energy_std",
        "forces_std",
    ]

    def __init__(
        self,
        release: str | Path | Loaded | Sequence[str | Path | Loaded],
        fidelity: str,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        weights: str = "best",
        d3: Mapping[str, Any] | None = None,
        skin: float = SKIN,
        uncertainty: bool = False,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        if not skin >= 0:
            raise InputError(f"skin {skin:g} Å: expected 0 or more")
        self.at: AtFidelity | Ensemble
        if isinstance(release, str | Path | Loaded):
            self.at = AtFidelity(release, fidelity, dtype, device, weights, d3, uncertainty)
        elif uncertainty:
            raise InputError("uncertainty: an ensemble has the spread of its members; leave uncertainty out")
        else:
            self.at = Ensemble(release, fidelity, dtype, device, weights, d3)
        self.is_conservative, self.fidelity = self.at.is_conservative, fidelity
        self.neighbors = SkinList(self.at.cutoff, skin)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Return what has changed since the last calculation; ASE itself does not look at ``atoms.info``."""
        changes = super().check_state(atoms, tol=tol)
        if self.atoms is not None and charge_and_spin(atoms) != charge_and_spin(self.atoms):
            changes.append("initial_charges")
        return changes

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        super().calculate(atoms, properties, system_changes)
        atoms = self.atoms
        if atoms is None:
            raise InputError("the calculator has no structure")
        self.at.check(atoms)
        _, positions, cell, pbc = geometry(atoms)
        (found,) = self.at.predict([atoms], [self.neighbors.of(positions, cell, pbc)])
        if isinstance(found, InputError):
            raise found
        self.results = found
