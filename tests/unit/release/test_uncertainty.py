"""Last-layer uncertainty: calibrated where the theory is exact, larger where there were no data, kept by every form."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from mffm.cli import app
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.evaluate import calibration
from mffm.release import container, inspection, load, save, uncertainty
from mffm.release.uncertainty import Systems, fit_factor


@pytest.fixture(scope="module")
def release(tiny_run: Path, molecule_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_run, tmp_path_factory.mktemp("uncertain") / "release", fit_uncertainty_on=Store(molecule_store))


def linear_problem(n: int, seed: int, spread: np.ndarray, error: np.ndarray) -> Systems:
    """Systems whose residual is linear in their inputs, as that of a last layer is whose weights are off."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(n, len(spread))) * spread
    return Systems(np.arange(n), np.ones(n), inputs @ error, inputs)


def test_calibrated_where_weights_are_off_as_bayes_says():
    """Weights of ridge regression are off by C^(-1/2) times noise: coverage over many draws is the nominal one."""
    rng = np.random.default_rng(0)
    spread = np.geomspace(1, 0.05, 12)
    found = []
    for draw in range(30):
        train = linear_problem(400, draw, spread, np.zeros(12))
        covariance = train.inputs.T @ train.inputs
        error = np.linalg.cholesky(np.linalg.inv(covariance)) @ rng.normal(size=12)
        validation, test = (linear_problem(n, 100 + draw + n, spread, error) for n in (200, 300))
        factor, numbers = fit_factor(train, validation)
        std = np.linalg.norm(test.inputs @ factor.T, axis=1)
        found.append(calibration.Calibration(test.residuals, std, test.n_atoms).coverage([0.5, 0.9]))
        assert numbers["n_validation"] == 200
    assert np.mean(found, axis=0) == pytest.approx([0.5, 0.9], abs=0.06)


def test_a_direction_that_training_hardly_saw_is_uncertain():
    """Weights are off by 0.1 and, along what training hardly saw, by 3: σ of a unit step tells the two apart."""
    error = np.array([0.1, 0.1, 3.0])
    train = linear_problem(500, 0, np.array([1.0, 1.0, 0.001]), np.zeros(3))
    factor, _ = fit_factor(train, linear_problem(200, 1, np.ones(3), error))
    known, unknown = (float(np.linalg.norm(factor @ np.array(v))) for v in ([1.0, 0, 0], [0, 0, 1.0]))
    assert unknown > 10 * known


def test_fewer_labels_than_inputs_do_not_break_it():
    """12 inputs, 5 systems: C has no rank; ς² decides, and σ stays a number of the size of the residuals."""
    rng = np.random.default_rng(1)
    spread, error = np.ones(12), rng.normal(size=12)
    factor, numbers = fit_factor(linear_problem(5, 0, spread, error), linear_problem(100, 1, spread, error))
    test = linear_problem(300, 2, spread, error)
    z = test.residuals / np.linalg.norm(test.inputs @ factor.T, axis=1)
    assert 0.7 < np.sqrt(np.mean(z**2)) < 1.5
    assert numbers["regularisation"] > 0


def test_inputs_of_the_last_layer_give_the_energy(tiny_run: Path, molecule_store: Path):
    """F · w is the energy but for the bias: these are the inputs, of a delta head with base and correction."""
    loaded, store = load(tiny_run, dtype=torch.float64), Store(molecule_store)
    for fidelity in loaded.fidelities.names:
        plain = loaded.potential.folded(fidelity)
        head = plain.learned.heads
        from mffm.data.loader import pack

        geometries = [store.geometry(row) for row in (0, 40)]
        batch = pack(geometries, [0, 0], plain.cutoff, torch.float64)
        inputs = batch.system_sums(plain.last_inputs(batch))
        expected = (inputs @ head.mlp.weights[-1]).squeeze(1) + batch.n_atoms * head.mlp.biases[-1]
        torch.testing.assert_close(plain(batch, forces=False).energy, expected * head.scale, rtol=1e-10, atol=1e-10)


def test_fitted_stored_and_evaluated(release: Path, molecule_store: Path, tmp_path: Path):
    loaded, store = load(release), Store(molecule_store)
    report = json.loads((release / "uncertainty.json").read_text())["fidelities"]
    assert report["pbe"]["n_training"] == 20  # max_frames of the recipe, not all that the store has
    assert report["gfn2"]["n_training"] == len(store.rows(split="train", fidelity="gfn2"))
    found = calibration.calibrate(loaded, store, "val")
    paths = calibration.write(found, loaded, store, "val", tmp_path)
    rows = json.loads(paths[0].read_text())["fidelities"]
    assert set(rows) == {"gfn2", "pbe"}
    for row in rows.values():  # on the very split that it was calibrated on: right on average
        assert 0.7 < row["rms_of_residual_over_std"] < 1.6
        assert row["mean_std"] == pytest.approx(row["mae"], rel=1.0)
    assert paths[1].stat().st_size > 10_000
    one = uncertainty.systems(loaded, store, store.rows(split="val", fidelity="pbe")[:5], "pbe")
    assert (uncertainty.of(loaded, "pbe").of(one.inputs) > 0).all()


def test_diff_of_two_uncertainties(release: Path, tiny_release: Path, tmp_path: Path):
    contents = load(release).contents
    documents = json.loads(json.dumps(contents.documents))
    documents["uncertainty.json"]["fidelities"]["pbe"]["alpha"] *= 2
    factors = {**contents.uncertainty, "pbe.factor": 2 * contents.uncertainty["pbe.factor"]}
    other = container.write(tmp_path / "other", documents, contents.tensors, contents.card, factors)
    found = inspection.changes(load(release), load(other))
    assert {(c.part, c.where) for c in found} == {
        ("uncertainty", "fidelities.pbe.alpha"),
        ("uncertainty", "pbe.factor"),
    }
    without = inspection.changes(load(release), load(tiny_release))
    assert {c.where for c in without if c.part == "uncertainty"} >= {"gfn2.factor", "pbe.factor", "fidelities"}


def test_an_evaluation_without_energies_of_its_fidelities_ends_well(
    release: Path, molecule_store: Path, tmp_path: Path
):
    contents = load(release).contents
    documents = json.loads(json.dumps(contents.documents))
    del documents["uncertainty.json"]["fidelities"]["gfn2"]
    factors = {"pbe.factor": contents.uncertainty["pbe.factor"]}
    one = container.write(tmp_path / "pbe", documents, contents.tensors, contents.card, factors)
    arguments = ["evaluate", str(one), "--store", str(molecule_store), "--output", str(tmp_path / "errors")]
    done = CliRunner().invoke(app, [*arguments, "--fidelity", "gfn2"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "uncertainty not compared: it is of pbe, and no energy" in done.stdout
    assert {p.name for p in (tmp_path / "errors").iterdir()} == {"evaluation-test.json", "parity-test.png"}
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert set(json.loads((tmp_path / "errors" / "calibration-test.json").read_text())["fidelities"]) == {"pbe"}


def test_every_form_keeps_it(release: Path, tmp_path: Path):
    single, one = load(save(release, tmp_path / "x.safetensors")), load(save(release, tmp_path / "pbe", fidelity="pbe"))
    whole = load(release)
    assert container.tensor_digest(single.contents.uncertainty) == container.tensor_digest(whole.contents.uncertainty)
    assert set(one.contents.uncertainty) == {"pbe.factor"}
    assert set(one.contents.documents["uncertainty.json"]["fidelities"]) == {"pbe"}
    torch.testing.assert_close(one.contents.uncertainty["pbe.factor"], whole.contents.uncertainty["pbe.factor"])


def test_the_calculator_tells_it(release: Path, molecule_store: Path):
    from ase import Atoms
    from ase.calculators.calculator import PropertyNotImplementedError

    from mffm.deploy.ase import Calculator

    store = Store(molecule_store)
    rows = store.rows(split="test", fidelity="pbe")[:2]
    systems = uncertainty.systems(load(release), store, rows, "pbe")
    for row, n_atoms, expected in zip(
        systems.rows, systems.n_atoms, uncertainty.of(load(release), "pbe").of(systems.inputs), strict=True
    ):
        numbers, positions, *_ = store.geometry(int(row))
        atoms = Atoms(numbers, positions, calculator=Calculator(release, fidelity="pbe", uncertainty=True))
        assert len(atoms) == n_atoms
        assert atoms.calc.get_property("energy_std", atoms) == pytest.approx(expected, rel=1e-4)
        stretched = atoms.copy()
        stretched.calc = atoms.calc
        stretched.positions *= 1.5
        assert (
            stretched.calc.get_property("energy_std", stretched) > 1.05 * expected
        )  # six steps of training know little
    atoms.calc = Calculator(release, fidelity="pbe")
    with pytest.raises(PropertyNotImplementedError):
        atoms.calc.get_property("energy_std", atoms)
    with pytest.raises(InputError, match="no uncertainty at 'pbe'"):
        Calculator(Path(__file__).parents[2] / "golden" / "release-v1", fidelity="pbe", uncertainty=True)


def test_none_is_told(tiny_release: Path, molecule_store: Path):
    loaded = load(tiny_release)
    with pytest.raises(InputError, match=r"no uncertainty at 'pbe'; it has one at: none; .* --uncertainty"):
        uncertainty.of(loaded, "pbe")
    with pytest.raises(InputError, match="no uncertainty and energy labels"):
        calibration.calibrate(loaded, Store(molecule_store), "val")


def test_another_store_is_refused(tiny_run: Path, molecule_store: Path):
    loaded = load(tiny_run)
    loaded.spec.provenance["store_fingerprint"] = "0" * 64
    with pytest.raises(InputError, match="was trained on 000000000000"):
        uncertainty.fit(loaded, Store(molecule_store))
