"""The evaluation measures what it says: by hand, across fidelities, and with refitted references."""

import json
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from mffm.config.data import DataConfig
from mffm.data.ingest import ingest
from mffm.data.store import Store
from mffm.deploy.ase import Calculator
from mffm.errors import InputError
from mffm.evaluate import parity
from mffm.release import load, refit_references


def test_errors_equal_the_calculator_by_hand(tiny_run: Path, molecule_store: Path):
    store = Store(molecule_store)
    result = parity.evaluate(load(tiny_run), store, "test", ["pbe"])
    calculator = Calculator(tiny_run, fidelity="pbe")
    energy_errors, force_errors = [], []
    for row in store.rows(split="test", fidelity="pbe").tolist():
        numbers, positions, _, _ = store.geometry(row)
        atoms = Atoms(numbers, positions, calculator=calculator)
        labels = store.labels(row, "pbe")
        energy_errors.append(abs(atoms.get_potential_energy() - float(labels["energy"])) / len(atoms))
        force_errors.append(np.abs(atoms.get_forces() - labels["forces"]).ravel())
    table = {r["property"]: r for r in result.rows()}
    assert table["energy"]["mae"] == pytest.approx(1e3 * np.mean(energy_errors), rel=1e-4)
    assert table["forces"]["mae"] == pytest.approx(1e3 * np.concatenate(force_errors).mean(), rel=1e-4)
    assert table["energy"]["unit"] == "meV/atom"
    assert table["energy"]["n_systems"] == len(energy_errors)
    frames, rows = result.frame_errors("pbe"), store.rows(split="test", fidelity="pbe")
    for prop, errors in (("energy", energy_errors), ("forces", [e.sum() for e in force_errors])):
        assert np.array_equal(frames[prop].rows, rows)
        assert frames[prop].sums == pytest.approx(1e3 * np.array(errors), rel=1e-3, abs=1e-3)
        assert frames[prop].sums.sum() / frames[prop].counts.sum() == pytest.approx(table[prop]["mae"])
    assert np.array_equal(frames["forces"].counts, 3 * store.n_atoms[rows])
    assert set(frames["energy"].counts) == {1}


def test_refitted_references_mend_a_composition_shift(tiny_run: Path, molecule_store: Path):
    """GFN2 predictions against PBE labels: without a refit off by keV; with it by what references cannot mend."""
    store, loaded = Store(molecule_store), load(tiny_run)
    rows = store.rows(split="train", fidelity="pbe")
    references = refit_references(loaded, store, rows, "pbe", "gfn2")
    plain = parity.evaluate(loaded, store, "train", ["pbe"], predict_as="gfn2").rows()[0]["mae"]
    refitted = parity.evaluate(loaded, store, "train", ["pbe"], predict_as="gfn2", references=references).rows()[0][
        "mae"
    ]
    assert plain > 1e5
    assert refitted < 1e3


def test_a_sum_predicts_the_sum_of_both(tiny_run: Path, tmp_path: Path):
    """Energies, forces and stress; the references of both are taken off the labels."""
    loaded, frames = load(tiny_run), []
    for name in ("CH4", "H2O", "CH3OH"):
        atoms = molecule(name, cell=[6.0, 6.5, 7.0], pbc=True)
        atoms.info |= {"total": -5000.0 - len(atoms), "pressure": 0.01 * np.eye(3)}
        atoms.arrays["pull"] = np.ones((len(atoms), 3))
        frames.append(atoms)
    ase.io.write(tmp_path / "frames.extxyz", frames)
    labels = {"energy": "total", "forces": "pull", "stress": "pressure"}
    content = {
        "store": str(tmp_path / "store"), "fidelities": {"scan": {"level_of_theory": "SCAN"}}, "cutoffs": [4.0],
        "splits": {"fractions": {"test": 1.0}},
        "sources": [{"name": "box", "path": "frames.extxyz", "licence": "MIT", "labels": {"scan": labels}}],
    }  # fmt: skip
    ingest(DataConfig.model_validate(content), tmp_path, progress=False)
    store = Store(tmp_path / "store")
    one, other = (parity.evaluate(loaded, store, "test", ["scan"], predict_as=f) for f in ("gfn2", "pbe"))
    both = parity.evaluate(loaded, store, "test", ["scan"], predict_as="gfn2", plus=parity.Addend(loaded, "pbe"))
    assert [prop for _, prop in both.labels] == ["energy", "forces", "stress"]
    for key, predictions in both.predictions.items():
        assert np.abs(one.predictions[key]).max() > 0
        np.testing.assert_allclose(predictions, one.predictions[key] + other.predictions[key], atol=1e-6)
    taken_off = sum(loaded.spec.references.energies(f, store.composition(store.rows())) for f in ("gfn2", "pbe"))
    per_atom = (store.energies("scan", store.rows()) - taken_off) / store.n_atoms
    np.testing.assert_allclose(np.sort(both.labels["scan", "energy"]), np.sort(per_atom), atol=1e-9)


def test_files_and_unknown_names(tiny_run: Path, molecule_store: Path, tmp_path: Path):
    store, loaded = Store(molecule_store), load(tiny_run)
    result = parity.evaluate(loaded, store, "val")
    report, figure = parity.write(result, loaded, store, tmp_path)
    assert json.loads(report.read_text())["store_fingerprint"] == store.fingerprint
    assert figure.stat().st_size > 10_000
    with pytest.raises(InputError, match="'scan'"):
        parity.evaluate(loaded, store, "val", ["scan"])
    with pytest.raises(InputError, match=r"split"):
        parity.evaluate(loaded, store, "nowhere")
    with pytest.raises(InputError, match="unknown fidelity 'ccsdt'"):
        parity.evaluate(loaded, store, "val", ["ccsdt"])
