"""Relaxations of many structures at a time, by torch-sim's FIRE and a torch-sim model.

torch-sim 0.3 (what Python 3.11 gets) and 0.6 (3.12 on) name optimizers differently; the tests run the installed one.
"""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.stress import full_3x3_to_voigt_6_stress

from mffm.errors import InputError, known
from mffm.properties.report import charge_and_spin, require_volume

CELLS: dict[str, dict[str, bool] | None] = {"fixed": None, "full": {}, "volume": {"hydrostatic_strain": True}}


def relax_many(
    structures: Sequence[Atoms], model: Any, cell: str = "fixed", fmax: float = 0.01, steps: int = 500
) -> list[tuple[Atoms, bool]]:
    """Relax structures together; those that have converged leave the batch.

    Args:
        model: of torch-sim, such as ``mffm.deploy.torchsim.TorchSimModel``.
        cell: a key of ``CELLS``: what of the cell is relaxed with the atoms.
        fmax: eV/Å, largest force; with a cell also of torch-sim's cell forces (virial over number of atoms).
        steps: at most, counted over all batches.

    Returns:
        for each structure, in order: the relaxed one with its results, and whether it has converged.

    Raises:
        InputError: torch-sim is not installed; an unknown name; a cell without volume; structures that are periodic in
            different directions, which torch-sim does not take together; constraints; a structure that is periodic in
            one or two directions, which torch-sim 0.3 takes as a cluster; charge or spin, where the model has
            ``takes_charge_and_spin``.
    """
    if cell not in CELLS:
        raise InputError(f"cell {cell!r}: torch-sim's are {known(CELLS)}")
    try:
        import torch_sim

        is_new = tuple(int(part) for part in version("torch-sim-atomistic").split(".")[:2]) >= (0, 6)
    except (ImportError, PackageNotFoundError) as error:
        raise InputError(f"torch-sim is needed ({error}); install it: pip install 'mffm[properties]'") from error
    if len({tuple(atoms.pbc.tolist()) for atoms in structures}) > 1:
        raise InputError("structures that are periodic in different directions; relax them in files of their own")
    takes_charge_and_spin = bool(getattr(model, "takes_charge_and_spin", False))
    for i, atoms in enumerate(structures):
        _check(f"structure {i} ({atoms.get_chemical_formula()})", atoms, is_new, takes_charge_and_spin)
    options = CELLS[cell]
    if options is not None:
        for atoms in structures:
            require_volume(atoms, f"relaxing the cell ({cell})")
    arguments: dict[str, Any]
    if is_new:
        filters = {} if options is None else {"cell_filter": torch_sim.CellFilter.frechet, **options}
        arguments = {"optimizer": torch_sim.Optimizer.fire, "init_kwargs": filters}
    elif options is None:
        arguments = {"optimizer": torch_sim.optimizers.fire}
    else:
        arguments = {"optimizer": torch_sim.optimizers.frechet_cell_fire, **options}
    has_converged = torch_sim.generate_force_convergence_fn(fmax, include_cell_forces=options is not None)
    state = torch_sim.optimize(
        [Atoms(a.numbers, a.positions, cell=a.cell, pbc=a.pbc) for a in structures], model,
        convergence_fn=has_converged, max_steps=steps, **arguments,
    )  # fmt: skip
    converged = has_converged(state, None).tolist()
    energies = state.energy.detach().cpu().double().numpy()
    forces = state.forces.detach().cpu().double().numpy()
    stress = getattr(state, "stress", None)
    found, start = [], 0
    for i, (relaxed, atoms) in enumerate(zip(torch_sim.io.state_to_atoms(state), structures, strict=True)):
        result = atoms.copy()
        result.set_cell(relaxed.cell)
        result.positions = relaxed.positions
        results = {"energy": float(energies[i]), "forces": forces[start : start + len(atoms)]}
        if stress is not None and atoms.pbc.all():
            results["stress"] = full_3x3_to_voigt_6_stress(np.asarray(stress[i].detach().cpu().double()))
        result.calc = SinglePointCalculator(result, **results)
        found.append((result, bool(converged[i])))
        start += len(atoms)
    return found


def _check(name: str, atoms: Atoms, is_new: bool, takes_charge_and_spin: bool) -> None:
    """Refuse what would not reach the model or the optimizer."""
    if atoms.constraints:
        kinds = ", ".join(sorted({type(c).__name__ for c in atoms.constraints}))
        raise InputError(f"{name} has constraints ({kinds}), which do not count in a batch; relax it without --batched")
    if not is_new and atoms.pbc.any() and not atoms.pbc.all():
        raise InputError(
            f"{name}: torch-sim 0.3 takes pbc {atoms.pbc.tolist()} as no periodicity; relax it without --batched"
        )
    given = {key: value for key, value in charge_and_spin(atoms).items() if value}
    if takes_charge_and_spin and given:
        said = ", ".join(f"{key} {value}" for key, value in given.items())
        raise InputError(f"{name} has {said}, which does not count in a batch; relax it without --batched")
