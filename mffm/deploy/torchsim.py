"""The torch-sim model of a release: relaxations and molecular dynamics of many systems at a time.

torch-sim 0.3 (Python 3.11) and 0.6 and later (Python 3.12 on) differ in ``SimState.pbc`` (a bool; three of them) and
0.3 may hand over a mapping instead of a state; both are taken. Cells of torch-sim are columns, ours are rows.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mffm.config.model import DensityConfig, EscnConfig
from mffm.data.records import Geometry
from mffm.deploy.at_fidelity import AtFidelity
from mffm.errors import InputError
from mffm.release import Loaded

try:
    from torch_sim.models.interface import ModelInterface
except ImportError as error:
    raise InputError(f"torch-sim is needed ({error}); install it: pip install 'mffm[properties]'") from error


class TorchSimModel(ModelInterface):
    """A potential at one fidelity, as torch-sim takes it.

    ``forward`` returns ``energy`` [n_systems], eV, element references included; ``forces`` [n_atoms, 3], eV/Å;
    ``stress`` [n_systems, 3, 3], eV/Å³, ASE's sign, 0 for systems that are not periodic in three directions.
    A model that takes charge and spin multiplicity has them from the state's ``charge`` and ``spin`` [n_systems];
    states of torch-sim 0.3 have neither, and all systems are then taken as without.

    Args:
        release, fidelity, dtype, device, weights, d3: as for ``mffm.deploy.ase.Calculator``; float64 where not given,
            since float32 does not resolve all-electron total energies.
        compute_stress: whether ``forward`` returns it; cell relaxations and NPT need it.

    Raises:
        InputError: as ``AtFidelity``; a stress is asked of direct forces that have none; on ``forward`` an element
            that the fidelity has no references for, or a charge or spin that is no whole number.
    """

    def __init__(
        self,
        release: str | Path | Loaded,
        fidelity: str,
        dtype: str = "float64",
        device: str | torch.device = "cpu",
        weights: str = "best",
        d3: Mapping[str, Any] | None = None,
        compute_stress: bool = True,
    ):
        super().__init__()
        self.at = AtFidelity(release, fidelity, dtype, device, weights, d3)
        self._device, self._dtype = self.at.device, self.at.dtype
        self._compute_forces = True
        self._memory_scales_with = "n_atoms_x_density"
        self._compute_stress = False
        self.compute_stress = compute_stress

    @property
    def compute_stress(self) -> bool:
        return self._compute_stress

    @compute_stress.setter
    def compute_stress(self, compute_stress: bool) -> None:
        if compute_stress and not self.at.has_stress:
            raise InputError(f"{self.at.path}: direct forces without a stress head; give compute_stress=False")
        self._compute_stress = compute_stress

    @property
    def compute_forces(self) -> bool:
        return self._compute_forces

    @compute_forces.setter
    def compute_forces(self, compute_forces: bool) -> None:
        self._compute_forces = compute_forces

    @property
    def takes_charge_and_spin(self) -> bool:
        """Whether predictions depend on them."""
        backbone = self.at.spec.model.backbone
        if isinstance(backbone, DensityConfig):
            return backbone.charge_and_spin
        return isinstance(backbone, EscnConfig)

    def forward(self, state: Any, **_: Any) -> dict[str, Tensor]:
        """Return the predictions of a state (or of a mapping with its fields); nothing in it is changed."""
        geometries = _geometries(state)
        self.at.check_elements(np.concatenate([numbers for numbers, *_ in geometries]))
        batch = self.at.pack(geometries, _charges_and_spins(state, len(geometries)))
        prediction = self.at.potential(batch, forces=self.compute_forces, stress=self.compute_stress)
        found = {"energy": self.at.totals(batch, prediction)[0]}
        if self.compute_forces:
            assert prediction.forces is not None
            found["forces"] = prediction.forces
        if self.compute_stress:
            assert prediction.stress is not None
            found["stress"] = prediction.stress
        return {key: value.to(self._dtype) for key, value in found.items()}


def _geometries(state: Any) -> list[Geometry]:
    """Return the structures of a state on the host, in float64."""
    numbers, positions, columns, system_idx, periodic = (
        _field(state, name) for name in ("atomic_numbers", "positions", "cell", "system_idx", "pbc")
    )
    of_atom = np.zeros(len(numbers), np.int64) if system_idx is None else system_idx
    pbc = np.broadcast_to(np.asarray(periodic, bool), (3,)).copy()
    found: list[Geometry] = []
    for system, cell in enumerate(columns.astype(np.float64).reshape(-1, 3, 3)):
        own = of_atom == system
        rows = cell.T if pbc.any() else np.zeros((3, 3))
        found.append((numbers[own], positions[own].astype(np.float64), rows, pbc))
    return found


def _charges_and_spins(state: Any, n_systems: int) -> list[tuple[int, int]]:
    """Return charge and spin multiplicity of each system, 0 where the state has none."""
    found = []
    for name in ("charge", "spin"):
        value = _field(state, name)
        given = np.zeros(n_systems) if value is None else np.broadcast_to(np.asarray(value, np.float64), (n_systems,))
        whole = np.rint(given)
        if not (whole == given).all():
            raise InputError(f"{name} {given.tolist()}: expected whole numbers")
        found.append(whole.astype(int).tolist())
    return list(zip(*found, strict=True))


def _field(state: Any, name: str) -> Any:
    value = state.get(name) if isinstance(state, Mapping) else getattr(state, name, None)
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value
