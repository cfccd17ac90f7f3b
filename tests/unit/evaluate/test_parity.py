"""The evaluation measures what it says: by hand, across fidelities, and with refitted references."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

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
