"""The torch-sim model: the conformance checks of the version that is installed, and runs of many systems."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator as AseCalculator
from ase.constraints import FixAtoms

pytest.importorskip("torch_sim")

import torch_sim
from torch_sim.models.interface import validate_model_outputs

from mffm.config.base import validate
from mffm.config.model import ModelConfig
from mffm.data.references import ElementReferences
from mffm.deploy.ase import Calculator
from mffm.deploy.torchsim import TorchSimModel
from mffm.errors import InputError
from mffm.fidelity import Fidelity, FidelityTable
from mffm.properties.batched import relax_many
from mffm.properties.relax import relax
from mffm.release import Loaded, PotentialSpec

IS_NEW = hasattr(torch_sim, "Optimizer")


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """A potential without training that knows every element of torch-sim's checks and repels at short range."""
    return make()


def make(**changes: bool) -> Loaded:
    torch.manual_seed(3)
    backbone = {
        "cutoff": 4.0, "lmax": 1, "l_message": 1, "layers": 1, "channels": 8, "edge_channels": 8, "n_radial": 4,
        "radial_hidden": 8, "ff_expansion": 1, "body_order": 3, **changes,
    }  # fmt: skip
    config = validate(ModelConfig, {"backbone": backbone, "heads": {"hidden": [8]}, "zbl": True}, "test")
    table = FidelityTable([Fidelity("pbe", "PBE", "")])
    energies = dict.fromkeys(("H", "C", "O", "Si", "Fe", "Mg", "Cu"), -1.0)
    references = ElementReferences.from_dict({"references": {"pbe": energies}})
    spec = PotentialSpec(config, table, references, avg_neighbors=12.0, scale=0.5)
    return Loaded(spec, spec.build().double().eval(), Path("test"), "best", "0")


def systems() -> list[Atoms]:
    found = [bulk("Cu", cubic=True), bulk("Si"), bulk("Fe", a=2.9).repeat(2), bulk("MgO", "rocksalt", a=4.3)]
    for i, atoms in enumerate(found):
        atoms.rattle(0.05, seed=i)
    return found


def test_conformance_checks_of_the_installed_version(loaded: Loaded):
    validate_model_outputs(TorchSimModel(loaded, "pbe"), torch.device("cpu"), torch.float64)


def results(calculator: AseCalculator, atoms: Atoms) -> tuple[float, np.ndarray, np.ndarray]:
    atoms = atoms.copy()
    atoms.calc = calculator
    return atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress(voigt=False)


def test_equals_the_calculator(loaded: Loaded):
    """Batched, with atoms outside of their cells; a state and a mapping."""
    model, calculator = TorchSimModel(loaded, "pbe"), Calculator(loaded, "pbe", "float64")
    frames = systems()
    frames[0].positions[1] += 3 * frames[0].cell[0]
    state = torch_sim.io.atoms_to_state(frames, torch.device("cpu"), torch.float64)
    fields = {k: getattr(state, k) for k in ("positions", "atomic_numbers", "cell", "pbc", "system_idx")}
    for given in (state, fields):
        found = model(given)
        assert not any(value.requires_grad for value in found.values())
        start = 0
        for i, atoms in enumerate(frames):
            energy, forces, stress = results(calculator, atoms)
            assert float(found["energy"][i]) == pytest.approx(energy, abs=1e-10)
            np.testing.assert_allclose(found["forces"][start : start + len(atoms)], forces, atol=1e-10)
            np.testing.assert_allclose(found["stress"][i], stress, atol=1e-12)
            start += len(atoms)


def test_a_molecule_has_no_stress(loaded: Loaded):
    state = torch_sim.io.atoms_to_state([molecule("C6H6"), molecule("H2O")], torch.device("cpu"), torch.float64)
    assert (TorchSimModel(loaded, "pbe")(state)["stress"] == 0).all()
    assert "stress" not in TorchSimModel(loaded, "pbe", compute_stress=False)(state)
    with pytest.raises(InputError, match="element N is unknown"):
        TorchSimModel(loaded, "pbe")(torch_sim.io.atoms_to_state([molecule("N2")], "cpu", torch.float64))


def test_many_relaxations_end_where_ase_does(loaded: Loaded):
    frames = [a for a in systems() if len(a) > 1]
    together = relax_many(frames, TorchSimModel(loaded, "pbe"), fmax=0.01, steps=600)
    calculator = Calculator(loaded, "pbe", "float64")
    for (relaxed, converged), atoms in zip(together, frames, strict=True):
        assert converged
        assert np.linalg.norm(relaxed.get_forces(), axis=1).max() < 0.01
        assert results_energy(calculator, relaxed) == pytest.approx(relaxed.get_potential_energy(), abs=1e-8)
        atoms.calc = calculator
        assert relaxed.get_potential_energy() < atoms.get_potential_energy()
        alone = relax(atoms, "fire", fmax=0.01, steps=600)
        assert relaxed.get_potential_energy() == pytest.approx(alone.energies[-1], abs=1e-3)


def results_energy(calculator: AseCalculator, atoms: Atoms) -> float:
    again = atoms.copy()
    again.calc = calculator
    return again.get_potential_energy()


def test_cells_are_relaxed(loaded: Loaded):
    frames = [a for a in systems() if len(a) > 1]
    for relaxed, converged in relax_many(frames, TorchSimModel(loaded, "pbe"), "full", fmax=0.05, steps=1500):
        assert converged
        stress = relaxed.get_stress(voigt=False) * relaxed.get_volume() / len(relaxed)
        assert np.linalg.norm(stress, axis=1).max() < 0.06
    with pytest.raises(InputError, match="torch-sim's are fixed, full, volume"):
        relax_many(frames, TorchSimModel(loaded, "pbe"), "shape")
    with pytest.raises(InputError, match="H2O is not periodic"):
        relax_many([molecule("H2O")], TorchSimModel(loaded, "pbe"), "full")


def test_charge_and_spin_of_a_state_are_taken_and_refused_in_a_batch():
    loaded = make(charge_and_spin=True)
    with torch.no_grad():  # the embeddings start at zero
        for name, parameter in loaded.potential.named_parameters():
            if "charges" in name or "spins" in name:
                parameter.normal_()
    model, calculator = TorchSimModel(loaded, "pbe"), Calculator(loaded, "pbe", "float64")
    frames = [molecule("H2O") for _ in range(3)]
    state = torch_sim.io.atoms_to_state(frames, torch.device("cpu"), torch.float64)
    fields = {k: getattr(state, k) for k in ("positions", "atomic_numbers", "cell", "pbc", "system_idx")}
    charge, spin = [0, 1, -1], [1, 2, 0]
    found = model({**fields, "charge": torch.tensor(charge).double(), "spin": torch.tensor(spin).double()})["energy"]
    for i, atoms in enumerate(frames):
        atoms.info.update(charge=charge[i], spin_multiplicity=spin[i])
        atoms.calc = calculator
        assert float(found[i]) == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
    assert len({round(float(e), 6) for e in found}) == 3
    with pytest.raises(InputError, match=r"charge \[0.5, 0.5, 0.5\]: expected whole numbers"):
        model({**fields, "charge": torch.full((3,), 0.5)})
    with pytest.raises(InputError, match=r"structure 1 \(H2O\) has charge 1, spin_multiplicity 2.*without --batched"):
        relax_many([molecule("H2O"), frames[1]], model)


def test_what_a_batch_would_drop_is_refused(loaded: Loaded):
    model = TorchSimModel(loaded, "pbe")
    charged = molecule("H2O")
    charged.info["charge"] = 1
    relax_many([charged], model, fmax=1e3, steps=1)  # this potential takes none
    held = molecule("H2O")
    held.set_constraint(FixAtoms([0]))
    with pytest.raises(InputError, match=r"structure 0 \(H2O\) has constraints \(FixAtoms\).*without --batched"):
        relax_many([held], model)
    slab = bulk("Cu", cubic=True)
    slab.pbc = (True, True, False)
    if IS_NEW:
        relax_many([slab], model, fmax=1e3, steps=1)
    else:
        with pytest.raises(InputError, match=r"takes pbc \[True, True, False\] as no periodicity"):
            relax_many([slab], model)


def test_dynamics_of_many_systems_keep_their_energies(loaded: Loaded):
    frames = systems()
    model = TorchSimModel(loaded, "pbe")
    integrator = torch_sim.Integrator.nve if IS_NEW else torch_sim.nve
    before = model(torch_sim.io.atoms_to_state(frames, torch.device("cpu"), torch.float64))["energy"]
    drift = []
    for timestep, steps in ((0.002, 8), (0.0005, 32)):
        torch.manual_seed(0)
        state = torch_sim.integrate(frames, model, integrator=integrator, n_steps=steps, temperature=300.0,
                                    timestep=timestep)  # fmt: skip
        kinetic = 0.5 * (state.momenta**2 / state.masses[:, None]).sum(1)
        total = state.energy + torch.zeros(len(frames)).double().index_add(0, state.system_idx, kinetic)
        drift.append(total)
    assert (drift[0] - before > 0).all()  # kinetic energy
    torch.testing.assert_close(drift[0], drift[1], atol=5e-3, rtol=0)
