"""Properties of a structure by a potential: relax, md, phonons, elastic, eos."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mffm.cli.deployed import (
    D3Option,
    DeviceOption,
    DtypeOption,
    FidelityOption,
    FolderArgument,
    IndexOption,
    PotentialArgument,
    StructureArgument,
    WeightsOption,
    dispersion,
    read_structure,
    read_structures,
)
from mffm.cli.output import complain, say
from mffm.cli.progress import Stages
from mffm.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms

    from mffm.deploy.ase import Calculator

FmaxOption = Annotated[float, typer.Option(help="eV/Å; relaxed where no force is longer")]
StepsOption = Annotated[int, typer.Option(min=1, help="at most, of a relaxation")]
RelaxOption = Annotated[bool, typer.Option("--relax/--as-given", help="relax atoms and cell first")]


def relax(
    potential: PotentialArgument,
    structure: StructureArgument,
    folder: FolderArgument,
    fidelity: FidelityOption,
    index: IndexOption = None,
    optimizer: Annotated[str | None, typer.Option(help="lbfgs or fire", show_default="lbfgs")] = None,
    cell: Annotated[
        str, typer.Option(help="fixed, full, volume (keeps its shape) or shape (keeps its volume)")
    ] = "fixed",
    fmax: FmaxOption = 0.01,
    steps: StepsOption = 500,
    pressure: Annotated[float, typer.Option(help="GPa, on a cell that is relaxed")] = 0.0,
    batched: Annotated[
        bool, typer.Option("--batched", help="all structures of the file together, with torch-sim's FIRE")
    ] = False,
    dtype: DtypeOption = "float64",
    device: DeviceOption = "cpu",
    weights: WeightsOption = "best",
    d3: D3Option = None,
) -> None:
    """Relax a structure, or all of a file with --batched; write relaxed.extxyz and a report."""
    if batched:
        if pressure or optimizer is not None:
            raise InputError(
                "--batched is torch-sim's FIRE at no pressure: leave --pressure and --optimizer out, or --batched"
            )
        _relax_batched(potential, read_structures(structure, index), folder, fidelity, cell, fmax, steps,
                       dtype=dtype, device=device, weights=weights, d3=dispersion(d3))  # fmt: skip
        return
    optimizer = optimizer or "lbfgs"
    settings = {"optimizer": optimizer, "cell": cell, "fmax_ev_per_ang": fmax, "pressure_gpa": pressure}
    atoms, calculator = _prepare(potential, structure, index, fidelity, dtype, device, weights, d3)
    from ase.io import write

    from mffm.properties import relax as module
    from mffm.properties import report

    with Stages() as shown:
        found = module.relax(atoms, optimizer, cell, fmax, steps, pressure, each_step=lambda n: shown("steps", n, None))
    rows = [
        ("converged", "yes" if found.converged else f"no, after {found.n_steps} steps"),
        ("steps", str(found.n_steps)),
        ("energy", f"{found.energies[-1]:.6f} eV"),
        ("change of the energy", f"{1e3 * (found.energies[-1] - found.energies[0]) / len(atoms):.3f} meV/atom"),
        ("largest force", f"{found.max_forces[-1]:.2g} eV/Å"),
        ("change of the volume", f"{100 * found.volume_change:.3f} %"),
    ]
    _finish(report.write(
        folder, "relax", f"Relaxation of {atoms.get_chemical_formula()}", found.found(), rows,
        lambda path: module.draw(found, path), {**calculator.at.describe(), **settings},
    ), rows)  # fmt: skip
    write(folder / "relaxed.extxyz", found.atoms)
    if not found.converged:
        complain(f"not converged in {found.n_steps} steps; what was reached is in {folder}: give more --steps", code=1)


def _relax_batched(
    potential: Path, structures: "list[Atoms]", folder: Path, fidelity: str, cell: str, fmax: float, steps: int,
    **options: Any,
) -> None:  # fmt: skip
    """Relax structures together with torch-sim and write one report."""
    import numpy as np
    from ase.io import write

    from mffm import plots
    from mffm.deploy.torchsim import TorchSimModel
    from mffm.properties import report
    from mffm.properties.batched import relax_many

    model = TorchSimModel(potential, fidelity, **options)
    for i, atoms in enumerate(structures):
        try:
            model.at.check(atoms)
        except ValueError as error:
            complain(f"structure {i} ({atoms.get_chemical_formula()}): {error}")
    before = [r["energy"] if isinstance(r, dict) else np.nan for a in structures for r in model.at.predict([a])]
    found = relax_many(structures, model, cell, fmax, steps)
    gains = [1e3 * (a.get_potential_energy() - e) / len(a) for (a, _), e in zip(found, before, strict=True)]
    forces = [float(np.linalg.norm(a.get_forces(), axis=1).max()) for a, _ in found]
    n_converged = sum(converged for _, converged in found)
    folder.mkdir(parents=True, exist_ok=True)
    for atoms, converged in found:
        atoms.info["converged"] = converged
    write(folder / "relaxed.extxyz", [atoms for atoms, _ in found])
    rows = [
        ("structures", str(len(found))),
        ("converged", str(n_converged)),
        ("mean change of the energy", f"{np.mean(gains):.3f} meV/atom"),
        ("largest force", f"{max(forces):.2g} eV/Å"),
    ]
    content = {
        "formulas": [a.get_chemical_formula() for a, _ in found],
        "converged": [converged for _, converged in found],
        "energies_ev": [a.get_potential_energy() for a, _ in found],
        "energy_changes_mev_per_atom": gains,
        "max_forces_ev_per_ang": forces,
    }
    order = np.arange(len(found))
    panels: list[Any] = [
        ("structure", "change of the energy, meV/atom", {"energy": (order, gains, "o")}),
        ("structure", "largest force, eV/Å", {"force": (order, forces, "o")}),
    ]
    made_by = {**model.at.describe(), "optimizer": "fire of torch-sim", "cell": cell, "fmax_ev_per_ang": fmax}
    _finish(report.write(
        folder, "relax", f"Relaxation of {len(found)} structures", content, rows,
        lambda path: plots.curves(path, panels), made_by,
    ), rows)  # fmt: skip
    if n_converged < len(found):
        complain(f"{len(found) - n_converged} of {len(found)} not converged; give more --steps", code=1)


def md(
    potential: PotentialArgument,
    structure: StructureArgument,
    folder: FolderArgument,
    fidelity: FidelityOption,
    steps: Annotated[int, typer.Option(min=1, help="in all; a trajectory in the folder goes on up to it")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value of the rest: thermostat_time, log_every, save_every, seed, ..."),
    ] = None,
    ensemble: Annotated[str, typer.Option(help="nve, nvt (Langevin) or npt")] = "nvt",
    timestep: Annotated[float, typer.Option(help="fs")] = 1.0,
    temperature: Annotated[float, typer.Option(help="K; of nve the start's")] = 300.0,
    pressure: Annotated[float, typer.Option(help="GPa, of npt")] = 0.0,
    index: IndexOption = None,
    dtype: DtypeOption = "float32",
    device: DeviceOption = "cpu",
    weights: WeightsOption = "best",
    d3: D3Option = None,
) -> None:
    """Run molecular dynamics; write trajectory, log and a report with the drift; the same command goes on."""
    from mffm.config.base import apply_overrides, validate
    from mffm.config.properties import MdConfig

    content: dict[str, Any] = {
        "ensemble": ensemble, "timestep": timestep, "temperature": temperature, "pressure": pressure
    }  # fmt: skip
    config = validate(MdConfig, apply_overrides(content, overrides or []), "md")
    atoms, calculator = _prepare(potential, structure, index, fidelity, dtype, device, weights, d3)
    from mffm.properties import md as module
    from mffm.properties import report

    made_by = calculator.at.describe()
    decides = {key: made_by[key] for key in ("weights_sha256", "fidelity", "dtype", "d3")}
    with Stages() as shown:
        found = module.md(atoms, config, steps, folder, decides, lambda n: shown("steps", n, steps))
    if found.n_resumed:
        say(f"went on from step {found.n_resumed}")
    numbers = found.found()
    rows = [
        ("ensemble", config.ensemble),
        ("time", f"{numbers['time_ps']:g} ps, {found.n_steps} steps of {config.timestep:g} fs"),
        ("mean temperature, second half", f"{numbers['mean_temperature_second_half_k']:.1f} K"),
    ]
    if config.ensemble == "nve":
        rows += [
            ("drift of the energy", f"{found.drift:.2g} eV/atom/ps"),
            ("fluctuation of the energy", f"{found.fluctuation:.2g} eV/atom"),
        ]
    if config.ensemble == "npt":
        rows.append(("mean volume, second half", f"{numbers['mean_volume_second_half_ang3'] / len(atoms):.3f} Å³/atom"))
    _finish(report.write(
        folder, "md", f"Molecular dynamics of {atoms.get_chemical_formula()}", numbers, rows,
        lambda path: module.draw(found, path), {**made_by, **config.model_dump(mode="json")},
    ), rows)  # fmt: skip


def phonons(
    potential: PotentialArgument,
    structure: StructureArgument,
    folder: FolderArgument,
    fidelity: FidelityOption,
    index: IndexOption = None,
    relaxed: RelaxOption = True,
    supercell: Annotated[
        tuple[int, int, int] | None, typer.Option(help="repeats; lengths of 10 Å where not given")
    ] = None,
    displacement: Annotated[float, typer.Option(help="Å")] = 0.01,
    fmax: FmaxOption = 1e-4,
    dtype: DtypeOption = "float64",
    device: DeviceOption = "cpu",
    weights: WeightsOption = "best",
    d3: D3Option = None,
) -> None:
    """Calculate the phonons of a crystal: bands, density of states, heat capacity, stability."""
    atoms, calculator = _prepare(potential, structure, index, fidelity, dtype, device, weights, d3)
    from mffm.properties import phonons as module
    from mffm.properties import report

    atoms = _relaxed(atoms, fmax) if relaxed else atoms
    with Stages() as shown:
        found = module.phonons(
            atoms, supercell, displacement=displacement, each=partial(shown, "supercells")
        )  # fmt: skip
    content = found.found()
    n = content["n_atoms_primitive"]
    at_300 = int((content["temperatures_k"] == 300).argmax())
    rows = [
        ("stable", "yes" if content["is_stable"] else f"no: {found.lowest:.2f} THz"),
        ("highest frequency", f"{found.highest:.3f} THz"),
        ("zero-point energy", f"{1e3 * content['free_energy_ev'][0] / n:.2f} meV/atom"),
        ("heat capacity at 300 K", f"{1e3 * content['heat_capacity_ev_per_k'][at_300] / n:.4f} meV/K/atom"),
        ("entropy at 300 K", f"{1e3 * content['entropy_ev_per_k'][at_300] / n:.4f} meV/K/atom"),
        ("supercell", " × ".join(map(str, found.supercell))),
    ]
    settings = {"relaxed": relaxed, "displacement_ang": displacement}
    paths = report.write(
        folder, "phonons", f"Phonons of {found.formula}", content, rows, lambda path: module.draw(found, path),
        {**calculator.at.describe(), **settings},
    )  # fmt: skip
    found.phonopy.save(folder / "phonopy.yaml")
    _finish(paths, rows)


def elastic(
    potential: PotentialArgument,
    structure: StructureArgument,
    folder: FolderArgument,
    fidelity: FidelityOption,
    index: IndexOption = None,
    relaxed: RelaxOption = True,
    clamped: Annotated[bool, typer.Option("--clamped", help="atoms only move with the strained cell")] = False,
    fmax: FmaxOption = 1e-3,
    steps: StepsOption = 500,
    dtype: DtypeOption = "float64",
    device: DeviceOption = "cpu",
    weights: WeightsOption = "best",
    d3: D3Option = None,
) -> None:
    """Calculate the elastic constants of a crystal and its moduli."""
    atoms, calculator = _prepare(potential, structure, index, fidelity, dtype, device, weights, d3)
    from mffm.properties import elastic as module
    from mffm.properties import report

    atoms = _relaxed(atoms, fmax) if relaxed else atoms
    with Stages() as shown:
        found = module.elastic(atoms, not clamped, fmax, steps, each=partial(shown, "strains"))
    rows = [
        ("bulk modulus (Voigt, Reuss, Hill)", ", ".join(f"{v:.2f}" for v in found.bulk) + " GPa"),
        ("shear modulus (Voigt, Reuss, Hill)", ", ".join(f"{v:.2f}" for v in found.shear) + " GPa"),
        ("Poisson's ratio", f"{found.poisson:.3f}"),
        ("stable", "yes" if found.found()["is_stable"] else "no: the tensor has a negative eigenvalue"),
        *((f"C{i + 1}j", ", ".join(f"{v:.1f}" for v in found.tensor[i]) + " GPa") for i in range(6)),
    ]
    if not clamped:
        rows.append(_cells_relaxed(found.n_not_relaxed, len(found.strains)))
    settings = {"relaxed": relaxed, "clamped": clamped, "fmax_ev_per_ang": fmax}
    _finish(report.write(
        folder, "elastic", f"Elastic constants of {found.formula}", found.found(), rows,
        lambda path: module.draw(found, path), {**calculator.at.describe(), **settings},
    ), rows)  # fmt: skip
    _require_relaxed(found.n_not_relaxed)


def eos(
    potential: PotentialArgument,
    structure: StructureArgument,
    folder: FolderArgument,
    fidelity: FidelityOption,
    index: IndexOption = None,
    strain: Annotated[float, typer.Option(help="of the lengths, both ways")] = 0.06,
    points: Annotated[int, typer.Option(min=5, help="volumes")] = 9,
    relaxed: Annotated[bool, typer.Option("--relax", help="relax the atoms in each cell")] = False,
    fmax: FmaxOption = 0.01,
    steps: StepsOption = 500,
    dtype: DtypeOption = "float64",
    device: DeviceOption = "cpu",
    weights: WeightsOption = "best",
    d3: D3Option = None,
) -> None:
    """Fit the equation of state of a crystal: volume, bulk modulus and its derivative."""
    atoms, calculator = _prepare(potential, structure, index, fidelity, dtype, device, weights, d3)
    from mffm.properties import eos as module
    from mffm.properties import report

    found = module.eos(atoms, strain, points, relaxed, fmax, steps)
    rows = [("minimum", f"none within {found.volumes.min():.2f} to {found.volumes.max():.2f} Å³")]
    if found.fit is not None:
        lengths = ", ".join(f"{length:.4f}" for length in found.found()["cell_lengths_ang"])
        rows = [
            ("volume", f"{found.fit.volume:.4f} Å³, {found.fit.volume / found.n_atoms:.4f} Å³/atom"),
            ("lengths of the cell", f"{lengths} Å"),
            ("bulk modulus", f"{found.fit.bulk_modulus:.2f} GPa"),
            ("its pressure derivative", f"{found.fit.derivative:.2f}"),
        ]
    if relaxed:
        rows.append(_cells_relaxed(found.n_not_relaxed, points))
    settings = {"strain": strain, "points": points, "relaxed": relaxed}
    _finish(report.write(
        folder, "eos", f"Equation of state of {found.formula}", found.found(), rows,
        lambda path: module.draw(found, path), {**calculator.at.describe(), **settings},
    ), rows)  # fmt: skip
    _require_relaxed(found.n_not_relaxed)
    if found.fit is None:
        complain("the energies have no minimum within these volumes; relax the cell first, or give more --strain", 1)


def _prepare(
    potential: Path, structure: Path, index: int | None, fidelity: str, dtype: str, device: str, weights: str,
    d3: str | None,
) -> "tuple[Atoms, Calculator]":  # fmt: skip
    """Return the one structure of a file with its calculator, and the calculator."""
    atoms = read_structure(structure, index)
    from mffm.deploy.ase import Calculator

    atoms.calc = calculator = Calculator(potential, fidelity, dtype, device, weights, dispersion(d3))
    calculator.at.check(atoms)
    return atoms, calculator


def _relaxed(atoms: "Atoms", fmax: float) -> "Atoms":
    """Return a crystal at its minimum, atoms and cell, with its calculator."""
    from mffm.properties.relax import relax as relax_structure

    found = relax_structure(atoms, cell="full", fmax=fmax, steps=1000)
    if not found.converged:
        complain(
            f"the cell is not relaxed after {found.n_steps} steps (largest force {found.max_forces[-1]:.2g} eV/Å); "
            "give --as-given, or a larger --fmax", code=1,
        )  # fmt: skip
    say(f"relaxed in {found.n_steps} steps, volume {100 * found.volume_change:+.2f} %")
    relaxed = found.atoms.copy()
    relaxed.calc = atoms.calc
    return relaxed


def _cells_relaxed(n_not_relaxed: int, n: int) -> tuple[str, str]:
    return "strained cells relaxed", f"{n - n_not_relaxed} of {n}"


def _require_relaxed(n_not_relaxed: int) -> None:
    if n_not_relaxed:
        complain(f"{n_not_relaxed} strained cells not relaxed; give a larger --fmax or more --steps", code=1)


def _finish(paths: list[Path], rows: list[tuple[str, str]]) -> None:
    for name, value in rows:
        say(f"{name}: {value}")
    say(f"report: {paths[1]}, {paths[0].name}, {paths[2].name}")
