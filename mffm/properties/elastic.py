"""Elastic constants: stresses of strained cells by ASE, the fit of the tensor by pymatgen."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms, units

from mffm import plots
from mffm.errors import InputError
from mffm.properties.relax import relax
from mffm.properties.report import require_volume

# Green-Lagrange strains. Shears of 0.03 and 0.06, as pymatgen has by default, make C44 of EMT copper 10 % larger.
AMOUNTS = (-0.01, -0.005, 0.005, 0.01)


@dataclass(frozen=True)
class Elastic:
    """The elastic tensor of a crystal.

    Attributes:
        tensor: [6, 6] GPa, Voigt order xx yy zz yz xz xy, in the frame of the given cell.
        bulk, shear: GPa, of Voigt, Reuss and Hill.
        strains: [n, 6], Voigt, engineering shears. stresses: [n, 6], GPa.
        eigenvalues: [6] GPa; a negative one is an instability.
    """

    formula: str
    tensor: np.ndarray
    bulk: tuple[float, float, float]
    shear: tuple[float, float, float]
    poisson: float
    anisotropy: float
    strains: np.ndarray
    stresses: np.ndarray
    residual: np.ndarray
    n_not_relaxed: int

    @property
    def eigenvalues(self) -> np.ndarray:
        return np.linalg.eigvalsh(0.5 * (self.tensor + self.tensor.T))

    def found(self) -> dict[str, Any]:
        """Return what a report holds."""
        names = ("voigt", "reuss", "hill")
        return {
            "formula": self.formula,
            "elastic_tensor_gpa": self.tensor,
            **{f"bulk_modulus_{n}_gpa": v for n, v in zip(names, self.bulk, strict=True)},
            **{f"shear_modulus_{n}_gpa": v for n, v in zip(names, self.shear, strict=True)},
            "poisson_ratio": self.poisson,
            "universal_anisotropy": self.anisotropy,
            "is_stable": bool(self.eigenvalues[0] > 0),
            "residual_stress_gpa": self.residual,
            "n_not_relaxed": self.n_not_relaxed,
            "strains": self.strains,
            "stresses_gpa": self.stresses,
        }


def elastic(
    atoms: Atoms,
    relaxed: bool = True,
    fmax: float = 0.01,
    steps: int = 500,
    normal: Sequence[float] = AMOUNTS,
    shear: Sequence[float] = AMOUNTS,
    shape: Literal["symmetric", "upper"] = "symmetric",
    each: Callable[[int, int], None] = lambda done, of: None,
) -> Elastic:
    """Return the elastic tensor from strained cells: each of the six strains alone, by several amounts.

    Args:
        atoms: at its minimum, with a calculator that gives stresses.
        relaxed: relax the atoms in each cell to ``fmax`` eV/Å; otherwise they move with the cell.
        normal, shear: amounts of the strains.
        shape: of the deformation that makes a strain; one is the other rotated.
        each: called with the number of cells that are done, and of all.

    Raises:
        InputError: pymatgen is not installed; the structure has no volume; what the calculator raises.
    """
    require_volume(atoms, "elastic constants")
    try:
        from pymatgen.analysis.elasticity.elastic import ElasticTensor
        from pymatgen.analysis.elasticity.strain import Strain
        from pymatgen.analysis.elasticity.stress import Stress
    except ImportError as error:
        raise InputError(
            f"elastic constants need pymatgen ({error}); install it: pip install 'mffm[properties]'"
        ) from error
    strains = [Strain.from_index_amount((i, i), amount) for i in range(3) for amount in normal]
    strains += [Strain.from_index_amount(ij, amount) for ij in ((0, 1), (0, 2), (1, 2)) for amount in shear]
    stresses, n_not_relaxed = [], 0
    for done, strain in enumerate(strains):
        deformation = np.asarray(strain.get_deformation_matrix(shape=shape))
        cell = atoms.copy()
        cell.set_cell(atoms.cell.array @ deformation.T, scale_atoms=True)
        cell.calc = atoms.calc
        if relaxed:
            relaxation = relax(cell, fmax=fmax, steps=steps)
            n_not_relaxed += not relaxation.converged
            cell = relaxation.atoms
        stresses.append(Stress(cell.get_stress(voigt=False) / units.GPa))
        each(done + 1, len(strains))
    residual = atoms.get_stress(voigt=False) / units.GPa
    tensor = ElasticTensor.from_independent_strains(strains, stresses, eq_stress=Stress(residual))
    return Elastic(
        atoms.get_chemical_formula(),
        np.asarray(tensor.voigt),
        (float(tensor.k_voigt), float(tensor.k_reuss), float(tensor.k_vrh)),
        (float(tensor.g_voigt), float(tensor.g_reuss), float(tensor.g_vrh)),
        float(tensor.homogeneous_poisson),
        float(tensor.universal_anisotropy),
        np.array([s.voigt for s in strains]),
        np.array([s.voigt for s in stresses]),
        residual,
        n_not_relaxed,
    )


def draw(result: Elastic, path: Path) -> None:
    """Draw the stress of each strain along itself."""
    panels: list[Any] = []
    for rows, names in ((range(3), "xx yy zz"), (range(3, 6), "yz xz xy")):
        entries = {}
        for i, name in zip(rows, names.split(), strict=True):
            own = np.flatnonzero(np.abs(result.strains[:, i]) > 1e-9)
            x = result.strains[own, i]
            entries[name] = (100 * x, result.stresses[own, i], "o-")
        panels.append(("strain, %", "stress, GPa", entries))
    plots.curves(path, panels)
