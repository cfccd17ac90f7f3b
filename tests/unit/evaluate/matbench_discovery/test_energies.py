"""Formation energies, corrections and hulls on published WBM entries."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mffm.errors import InputError
from mffm.evaluate.matbench_discovery import artefacts, energies

pytest.importorskip("pymatgen.core", reason="needs pymatgen: pip install 'mffm[properties]'")


@pytest.fixture(scope="module")
def entries(public_data: Path) -> list[dict[str, Any]]:
    with gzip.open(public_data / "wbm972" / "wbm-random-pbe52-equilibrium-2025.1.json.gz", "rt") as file:
        return json.load(file)


def symbols(entry: dict[str, Any]) -> list[str]:
    return [site["species"][0]["element"] for site in entry["structure"]["sites"]]


@pytest.mark.parametrize(
    ("file", "mae", "rmse"),
    [
        pytest.param("2022-11-18-megnet-wbm-IS2RE.csv.gz", 0.1315, 0.2062, marks=pytest.mark.slow),
        pytest.param("2025-06-20-esnet-wbm-IS2RE.csv.gz", 0.1083, 0.1878, marks=pytest.mark.slow),
        pytest.param("voronoi-rf-wbm-IS2RE.csv.gz", 0.1413, 0.2117, marks=pytest.mark.slow),
        pytest.param("2024-12-25-alchembert-wbm-IS2RE.csv.gz", 0.1194, 0.1752, marks=pytest.mark.slow),
        ("eqV2-s-dens-mp-ori.csv.gz", 0.0358, 0.0884),
    ],
)
def test_errors_of_stored_predictions(
    public_data: Path, entries: list[dict[str, Any]], file: str, mae: float, rmse: float
):
    references = energies.read_references(public_data / "wbm972" / "2023-02-07-mp-elemental-reference-entries.json.gz")
    predictions = artefacts.read_predictions(public_data / "wbm972" / file)
    label = [energies.formation_energy(symbols(e), e["corrected_energy"], references) for e in entries]
    error = np.array([predictions.get(e["material_id"], np.nan) for e in entries]) - label  # eqV2 lacks three
    error = error[~np.isnan(error)]
    assert len(error) >= 969
    assert np.abs(error).mean() == pytest.approx(mae, abs=5.1e-5)
    assert np.sqrt(np.square(error).mean()) == pytest.approx(rmse, abs=5.1e-5)


def test_corrections_are_those_of_the_published_entries(entries: list[dict[str, Any]]):
    from pymatgen.core import Structure

    # Oxides and fluorides, some with U; every fortieth of all.
    chosen = [e for e in entries if {"O", "F"} & set(symbols(e))][:15] + entries[::40]
    off, corrected = [], 0
    for entry in chosen:
        structure = Structure.from_dict(entry["structure"])
        found = energies.corrected_energy(structure, entry["energy"])
        assert found is not None
        corrected += abs(found - entry["energy"]) > 0.01
        if abs(found - entry["corrected_energy"]) > 1e-3 * len(structure):
            off.append(entry["material_id"])
    assert corrected > 12
    assert off == []


@pytest.mark.slow
def test_corrections_of_all_972(entries: list[dict[str, Any]]):
    from pymatgen.core import Structure

    off = []
    for entry in entries:
        structure = Structure.from_dict(entry["structure"])
        found = energies.corrected_energy(structure, entry["energy"])
        if found is None or abs(found - entry["corrected_energy"]) > 1e-3 * len(structure):
            off.append(entry["formula"])
    assert len(off) == 2, off  # silicides whose anions newer pymatgen assigns otherwise


def test_u_is_for_oxides_and_fluorides_alone():
    assert energies.hubbards(["Fe", "O"]) == {"Fe": 5.3}
    assert energies.hubbards(["Fe", "Co", "F"]) == {"Co": 3.32, "Fe": 5.3}
    assert energies.hubbards(["Fe", "S"]) == {}
    assert energies.hubbards(["Na", "O"]) == {}


def test_an_element_without_reference_is_named():
    assert energies.formation_energy(["Na", "Cl", "Cl"], -10.0, {"Na": -1.0, "Cl": -3.0}) == pytest.approx(-1)
    with pytest.raises(InputError, match="energy of Og, Po"):
        energies.formation_energy(["Na", "Po", "Og"], -10.0, {"Na": -1.0})
