"""Relaxations of WBM crystals end to end, with EMT on those that it knows."""

import gzip
import json
import zipfile
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.io import write

from mffm.errors import InputError
from mffm.evaluate.benchmark.task import Options
from mffm.evaluate.matbench_discovery import artefacts, wbm

pytest.importorskip("pymatgen.core", reason="needs pymatgen: pip install 'mffm[properties]'")
N = 2  # of the 972 have no elements but these
METALS = {"Al", "Cu", "Ag", "Au", "Ni", "Pd", "Pt"}


@pytest.fixture(scope="module")
def metals(public_data: Path) -> dict[str, wbm.Material]:
    """Crystals of WBM-972 that EMT can compute."""
    return {
        i: m
        for i, m in wbm.Wbm972().load(public_data).items()
        if set(m.structures()[0].get_chemical_symbols()) <= METALS
    }


def test_the_set_has_972_crystals_and_the_energies_that_were_published(public_data: Path):
    found = wbm.Wbm972().load(public_data)
    assert len(found) == 972
    assert found["wbm-3-38149"].e_form == pytest.approx(-0.2915, abs=2e-3)
    assert 0.7 < np.abs([m.e_form for m in found.values()]).mean() / 0.8 < 1.4
    perfect = {"rmsd": 0.0, "symmetry 1e-05": [[1, 1], [1, 1]]}
    score = wbm.Wbm972().score(found, {i: {"e_form": m.e_form, **perfect} for i, m in found.items()})
    assert (score.n, score.metrics["MAE"]) == (972, 0)
    assert not score.compare  # an easier task than the one of the published rows


def test_emt_end_to_end_with_artefacts(metals: dict[str, wbm.Material], tmp_path: Path):
    task = wbm.Wbm972()
    items = dict(list(metals.items())[:N])
    assert len(items) == N
    results: dict[str, Any] = {i: task.run(m, EMT(), Options()) for i, m in items.items()}
    items["wbm-failed"] = wbm.Material(lambda: (Atoms("Fe"), {}), -1.0, {})  # not run
    for i, result in results.items():
        start = items[i].structures()[0].copy()
        start.calc = EMT()
        assert result["energy"] <= start.get_potential_energy() + 1e-6
        # Metals have no corrections: the formation energy is E − Σ n µ, with or without the scheme.
        mu = sum(items[i].references[s] for s in start.get_chemical_symbols())
        assert result["e_form"] == pytest.approx((result["energy"] - mu) / len(start))
        assert (result["rmsd"] is None) or result["rmsd"] < 0.3
        assert len(result["symmetry 1e-05"]) == 2
        assert "counts as missing" in str(task.doubt(items[i], {"e_form": items[i].e_form + 6}))
    score = task.score(items, results)
    assert (score.n, score.n_failed, score.metrics["missing_preds"]) == (3, 1, 1 + _far(items, results))
    assert score.metrics["rmsd"] >= 1 / 3  # the one without a structure counts 1
    task.write(items, results, tmp_path)
    predictions = artefacts.read_predictions(tmp_path / "discovery.csv.gz")
    assert [np.isnan(v) for v in predictions.values()] == [False, False, True]
    lines = gzip.decompress((tmp_path / "geo-opt.jsonl.gz").read_bytes()).decode().splitlines()
    assert {json.loads(line)["material_id"] for line in lines} == set(results)


def _far(items: dict[str, wbm.Material], results: dict[str, Any]) -> int:
    """EMT's zero is another: how many of its formation energies are more than 5 eV/atom off."""
    return sum(abs(r["e_form"] - items[i].e_form) > 5 for i, r in results.items())


def test_corrections_are_left_out_for_potentials_that_have_learned_them(metals: dict[str, wbm.Material]):
    name = next(iter(metals))
    oxide = Atoms("CuO", cell=[3.0, 3.0, 4.4], scaled_positions=[[0, 0, 0], [0.5, 0.5, 0.5]], pbc=True)
    material = wbm.Material(lambda: (oxide, metals[name].structures()[1]), -1.0, metals[name].references)
    plain, learned = (wbm.compute(material, EMT(), Options(corrected_energies=c)) for c in (False, True))
    # MP2020: −0.687 eV for each oxide ion.
    assert plain["e_form"] - learned["e_form"] == pytest.approx(-0.687 / 2, abs=1e-3)


@pytest.fixture
def whole_layout(metals: dict[str, wbm.Material], public_data: Path, tmp_path: Path) -> list[Path]:
    """Files of the suite's own layout with two crystals; start and end structures differ."""
    chosen = dict(list(metals.items())[:N])
    labels = ("e_form_per_atom_mp2020_corrected", "e_above_hull_mp2020_corrected_ppd_mp", "unique_prototype")
    rows = [",".join(("material_id", "formula", *labels))]
    files = [tmp_path / n for n in ("summary.csv.gz", "initial.zip", "relaxed.zip")]
    for file, scale in zip(files[1:], (1.02, 1.0), strict=True):
        with zipfile.ZipFile(file, "w") as archive:
            for i, material in chosen.items():
                atoms = material.structures()[0].copy()
                atoms.set_cell(atoms.cell * scale, scale_atoms=True)
                atoms.info["material_id"] = i
                text = StringIO()
                write(text, atoms, format="extxyz")
                archive.writestr(f"{i}.extxyz", text.getvalue())
    for k, (i, material) in enumerate(chosen.items()):
        rows.append(f"{i},{material.structures()[0].symbols},{material.e_form},{-0.01 if k == 0 else 0.1},{k == 0}")
    artefacts.write_gzip(files[0], "\n".join(rows) + "\n")
    return [*files, public_data / wbm.REFERENCES.path]


def test_the_whole_set_is_read_from_the_suites_files(
    whole_layout: list[Path], metals: dict[str, wbm.Material], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    materials = wbm.read_whole(*whole_layout)
    assert list(materials) == list(metals)[:N]
    first = materials[next(iter(materials))]
    label = metals[next(iter(metals))]
    assert first.structures()[0].get_volume() == pytest.approx(1.02**3 * label.structures()[0].get_volume())
    assert (first.e_above_hull, first.is_unique) == (-0.01, True)
    assert [m.is_unique for m in materials.values()] == [True, False]
    task = wbm.Wbm()
    results = {i: {"e_form": m.e_form, "rmsd": 0.0, "symmetry 1e-05": [[1, 1], [1, 1]], "symmetry 0.01": [None, None]}
               for i, m in materials.items()}  # fmt: skip
    score = task.score(materials, results)
    assert (score.metrics["F1"], score.metrics["MAE"], score.metrics["rmsd"]) == (1, pytest.approx(0, abs=1e-12), 0)
    assert "2 of 256,963" in score.remark
    assert not score.compare
    assert not score.submission
    task.write(materials, results, tmp_path)
    assert not (tmp_path / "discovery.csv.gz").exists()

    monkeypatch.setattr(wbm, "N_WBM", N)  # as if the suite had no more than these
    score = task.score(materials, results)
    assert score.compare
    assert score.submission["discovery"]["unique_prototypes"]["TP"] == 1
    assert score.submission["discovery"]["full_test_set"]["TN"] == 1
    assert score.submission["geo_opt"]["symprec=1e-5"]["n_structures"] == N
    assert set(score.submission["geo_opt"]) == {"symprec=1e-5", "symprec=1e-2"}


def test_an_archive_without_a_structure_is_told(whole_layout: list[Path]):
    with zipfile.ZipFile(whole_layout[1], "w") as archive:
        archive.writestr("other.extxyz", "")
    with pytest.raises(InputError, match=r"no wbm-.*extxyz; its first file is \['other.extxyz'\]"):
        next(iter(wbm.read_whole(*whole_layout).values())).structures()


def test_bootstrap_covers_the_mean():
    values = np.random.default_rng(1).exponential(1, 400)
    low, high = wbm.bootstrap(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.15)
