"""Ensembles: means and spread of the members, in the calculator and against labels; what is no ensemble is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk, molecule

from mffm.data.store import Store
from mffm.deploy.ase import Calculator
from mffm.errors import InputError
from mffm.evaluate import ensemble, parity
from mffm.fidelity import Fidelity, FidelityTable
from mffm.release import Loaded, load


@pytest.fixture(scope="module")
def members(tiny_run: Path) -> list[Loaded]:
    return [load(tiny_run, weights) for weights in ("best", "raw")]


def test_results_are_means_with_the_spread_of_the_members(members: list[Loaded]) -> None:
    crystal = bulk("C", "diamond", 3.6, cubic=True)
    crystal.rattle(0.05, seed=1)
    for atoms in (molecule("CH3OH"), crystal):
        own = []
        for member in members:
            atoms.calc = Calculator(member, "gfn2")
            atoms.get_forces()
            own.append(atoms.calc.results)
        atoms.calc = Calculator(members, "gfn2")
        atoms.get_forces()
        found = atoms.calc.results
        for name in ("energy", "forces", "energies", "stress"):
            if name in own[0]:
                np.testing.assert_allclose(found[name], (own[0][name] + own[1][name]) / 2, rtol=1e-12, atol=1e-12)
        assert ("stress" in found) == (atoms is crystal)
        assert found["energy_std"] == pytest.approx(abs(own[0]["energy"] - own[1]["energy"]) / np.sqrt(2))
        expected = np.abs(own[0]["forces"] - own[1]["forces"]) / np.sqrt(2)
        np.testing.assert_allclose(found["forces_std"], expected, atol=1e-12)
        assert found["energy_std"] > 0


def test_energy_is_the_integral_of_the_mean_forces(members: list[Loaded]) -> None:
    atoms = molecule("CH3OH")
    atoms.calc = Calculator(members, "gfn2", dtype="float64")
    numeric = atoms.calc.calculate_numerical_forces(atoms, d=1e-4)
    np.testing.assert_allclose(atoms.get_forces(), numeric, atol=1e-6)


def test_errors_of_the_mean_on_labels(members: list[Loaded], molecule_store: Path) -> None:
    store = Store(molecule_store)
    mean, calibrations = ensemble.evaluate(members, store, "test", ["pbe"])
    single = [parity.evaluate(member, store, "test", ["pbe"]) for member in members]
    for key, label in mean.labels.items():
        residuals = np.stack([one.predictions[key] - one.labels[key] for one in single])
        np.testing.assert_allclose(mean.predictions[key] - label, residuals.mean(0), atol=1e-12)
    n_atoms = store.n_atoms[mean.frames["pbe", "energy"][0]]
    found = calibrations["pbe"]
    errors = mean.predictions["pbe", "energy"] - mean.labels["pbe", "energy"]
    np.testing.assert_allclose(found.residuals, errors * n_atoms, atol=1e-10)
    spread = np.std([(s.predictions["pbe", "energy"] - s.labels["pbe", "energy"]) for s in single], axis=0, ddof=1)
    np.testing.assert_allclose(found.stds, spread * n_atoms, atol=1e-10)
    assert calibrations["pbe forces"].row()["unit"] == "meV/Å"
    assert len(calibrations["pbe forces"].stds) == len(mean.labels["pbe", "forces"])


def test_what_is_no_ensemble_is_refused(members: list[Loaded]) -> None:
    with pytest.raises(InputError, match="an ensemble of 1: give two releases or more"):
        Calculator([members[0]], "gfn2")
    with pytest.raises(InputError, match="has the weights of"):
        Calculator([members[0], members[0]], "gfn2")
    with pytest.raises(InputError, match="leave uncertainty out"):
        Calculator(members, "gfn2", uncertainty=True)
    with pytest.raises(InputError, match="unknown fidelity 'hse'"):
        Calculator(members, "hse")
    table = FidelityTable([Fidelity("gfn2", "GFN2-xTB", "xtb 6.5"), *list(members[1].fidelities)[1:]])
    other = replace(members[1], spec=replace(members[1].spec, fidelities=table))
    with pytest.raises(InputError, match=r"fidelity 'gfn2' is GFN2-xTB \(xtb 6.5\), in .* one level of theory"):
        Calculator([members[0], other], "gfn2")


def test_command_line(
    run_mffm: Callable, tiny_run: Path, tiny_release: Path, make_recipe: Callable, tmp_path: Path
) -> None:
    run = tmp_path / "other"
    done = run_mffm("train", str(make_recipe()), f"run={run}", "seed=1")
    assert done.returncode == 0, done.stderr
    refused = run_mffm("evaluate", str(tiny_release), "--ensemble", str(run))
    assert refused.returncode == 2
    assert "--ensemble: give --output too" in refused.stderr
    done = run_mffm("evaluate", str(tiny_release), "--ensemble", str(run), "--output", str(tmp_path / "both"))
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "both" / "calibration-test.json").read_text())
    assert {"gfn2", "gfn2 forces", "pbe", "pbe forces"} <= set(found["fidelities"])
    errors = json.loads((tmp_path / "both" / "evaluation-test.json").read_text())
    assert errors["ensemble"] == [str(tiny_release), str(run)]
