"""A labelling from its source to a layer or a file: whatever a code does costs one structure, and is on record."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.io import read, write
from fates import DIES, HUNGRY, NAN, RAISES, SLOW, UNCONVERGED

from mffm.config.base import load
from mffm.config.data import DataConfig
from mffm.data.ingest import ingest
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.keys import ENERGY, FORCES
from mffm.label.journal import Journal, Limits, Record
from mffm.label.level import Label
from mffm.label.publish import Summary
from mffm.label.run import label
from mffm.label.structures import Source, read_files
from mffm.label.work import Request, Work, begin

ROOT = Path(__file__).parents[3]
FATES = "ase:fates:Fates"
Labelled = Callable[..., Summary]


def dimer(first: int, distance: float = 1.2, **info: Any) -> Atoms:
    return Atoms([first, 2], [[0, 0, 0], [0, 0, distance]], info=info)


def records_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_whatever_a_code_does_costs_one_structure(labelled: Labelled, tmp_path: Path) -> None:
    fates = [2, DIES, SLOW, UNCONVERGED, NAN, RAISES, 2]
    frames = [dimer(z, 1.1 + 0.1 * i, molecule="x", energy=-5.0) for i, z in enumerate(fates)]
    frames[0].positions[1, 2] = 0.1  # overlapping atoms
    write(tmp_path / "in.extxyz", frames)
    out = tmp_path / "out.extxyz"
    done = labelled(tmp_path / "in.extxyz", FATES, out, "lj", workers=2, limits=Limits(5.0))
    assert done.failures == {"input": 1, "lost": 1, "resource": 1, "convergence": 2, "unknown": 1}
    found = read(out, ":")
    assert [frame.info["frame_id"] for frame in found] == [f"in-{i:05d}" for i in range(7)]
    assert ["energy_lj" in frame.info for frame in found] == [False] * 6 + [True]
    assert ["forces_lj" in frame.arrays for frame in found] == [False] * 6 + [True]
    assert all(frame.info["molecule"] == "x" and frame.get_potential_energy() == -5.0 for frame in found)
    reasons = [frame.info.get("label_error_lj", "") for frame in found]
    for reason, expected in zip(
        reasons,
        ("input: atoms 0 and 1", "lost: the worker process ended: exit code 9", "resource: not done after 5 s",
         "convergence: NotConverged: Fates says", "convergence: NotConverged: the energy",
         "unknown: RuntimeError: a fault of the code", ""),
        strict=True,
    ):  # fmt: skip
        assert reason.startswith(expected) or expected in reason, reason
    records = records_of(tmp_path / "out.records.jsonl")
    attempts = {i: sorted(r["attempt"] for r in records if r["index"] == i) for i in range(7)}
    assert attempts == {0: [1], 1: [1, 2], 2: [1], 3: [1], 4: [1], 5: [1, 2], 6: [1]}
    good = next(r for r in records if r["index"] == 6)
    assert good["cpu_ns"] > 0
    assert good["wall_ns"] > 0
    assert good["converged"]
    assert (good["fidelity"], good["code"][:4]) == ("lj", "fate")
    assert not list(tmp_path.glob(".out*")), "the working folder is gone"
    data = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert data["sources"][0]["labels"] == {"lj": {"energy": "energy_lj", "forces": "forces_lj"}}
    assert "epsilon" in data["fidelities"]["lj"]["settings"]


def test_a_structure_that_takes_too_much_memory_is_ended(labelled: Labelled, tmp_path: Path) -> None:
    write(tmp_path / "in.extxyz", [dimer(HUNGRY), dimer(2)])
    out = tmp_path / "out.extxyz"
    done = labelled(tmp_path / "in.extxyz", FATES, out, "lj", limits=Limits(None, 0.4))
    assert (done.n_labels, done.failures) == (1, {"resource": 1})
    assert "label_error_lj" in read(out, 0).info
    assert "(--memory-limit)" in done.examples[0][1]
    (record,) = (r for r in records_of(tmp_path / "out.records.jsonl") if r["index"] == 0)
    assert record["limit"] == {"gigabytes": 0.4}


def test_what_comes_out_goes_into_a_store(labelled: Labelled, tmp_path: Path) -> None:
    write(tmp_path / "in.extxyz", [dimer(2, 1.1 + 0.02 * i, charge=0, multiplicity=1) for i in range(6)])
    labelled(tmp_path / "in.extxyz", FATES, tmp_path / "out.extxyz", "lj")
    store = ingest(load(DataConfig, tmp_path / "out.yaml"), tmp_path, tmp_path / "store", progress=False).store
    assert Store(store).label_counts() == {"lj": {"energy": 6, "forces": 6}}
    assert Store(store).spin_multiplicity.tolist() == [1] * 6
    with pytest.raises(InputError, match=r"out\.extxyz: exists; give another name with --out"):
        labelled(tmp_path / "in.extxyz", FATES, tmp_path / "out.extxyz", "lj")
    (tmp_path / "mine.yaml").write_text("a user's own")
    with pytest.raises(InputError, match=r"mine\.yaml: exists, and would be written too"):
        labelled(tmp_path / "in.extxyz", FATES, tmp_path / "mine.extxyz", "lj")


@pytest.mark.usefixtures("label_codes")
def test_a_store_gets_a_layer(labelled: Labelled, molecule_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.copytree(molecule_store, path)
    before = Store(path)
    done = labelled(path, "gfn2", name="again", n=20)
    store = Store(path)
    assert (done.n_labels, done.failures) == (20, {})
    assert store.label_counts() == {**before.label_counts(), "again": {"energy": 20, "forces": 20}}
    rows = store.rows(fidelity="again")
    # The shipped GFN2 labels are those of another program's run.
    np.testing.assert_allclose(store.energies("again", rows), store.energies("gfn2", rows), atol=1e-6)
    for row in rows[:5]:
        np.testing.assert_allclose(store.labels(row, "again")[FORCES], store.labels(row, "gfn2")[FORCES], atol=1e-5)
    assert store.geometry_fingerprint == before.geometry_fingerprint
    assert [layer.fingerprint for layer in store.layers[:-1]] == [layer.fingerprint for layer in before.layers]
    settings = store.fidelities["again"]
    assert (settings.level_of_theory, settings.code) == ("GFN2-xTB", "tblite 0.8.0")
    assert "no spin polarisation" in settings.settings
    assert store.sources[-1] == {"name": "new", "licence": "MIT", "citation": ""}
    records = records_of(path / "layers" / "new" / "records.jsonl")
    assert sorted(record["index"] for record in records) == rows.tolist()
    assert all(record["cpu_ns"] > 0 for record in records), "milliseconds are not rounded to nothing"
    store.verify()
    request = Request(Source.of([path]), "gfn2", "again", 20)
    there = label(request, "new", None, 1, Limits(), lambda *_: None)
    assert isinstance(there, str)
    assert "complete already: layer new has 20 labels, 0 structures failed" in there
    labelled(path, "gfn2", name="again", layer="more", n=25)  # nested: the same 20 and five more
    assert len(Store(path).rows(fidelity="again")) == 25
    with pytest.raises(InputError, match=r"fidelity 'pbe' is 'PBE/def2-SVP' .* and 'GFN2-xTB' here"):
        labelled(path, "gfn2", name="pbe", layer="other")


def test_a_teacher_is_named_so(labelled: Labelled, tiny_release: Path, molecule_store: Path, tmp_path: Path) -> None:
    from mffm.deploy.ase import Calculator

    path = tmp_path / "store"
    shutil.copytree(molecule_store, path)
    labelled(path, f"release:{tiny_release}@pbe", n=4)
    store = Store(path)
    fidelity = store.fidelities["teacher_pbe"]
    assert fidelity.level_of_theory == f"predictions of the release {tiny_release.name} at pbe"
    row = store.rows(fidelity="teacher_pbe")[0]
    atoms = Atoms(store.geometry(row)[0], store.geometry(row)[1])
    atoms.calc = Calculator(tiny_release, fidelity="pbe", dtype="float64")
    assert store.labels(row, "teacher_pbe")[ENERGY] == pytest.approx(atoms.get_potential_energy(), abs=1e-9)
    with pytest.raises(InputError, match="predictions are not labels of it"):
        labelled(path, f"release:{tiny_release}@pbe", name="pbe", layer="other")


@pytest.mark.usefixtures("label_codes")
def test_structures_whose_electrons_are_not_known_get_no_label(labelled: Labelled, tmp_path: Path) -> None:
    write(tmp_path / "in.extxyz", [Atoms("OH", [[0, 0, 0], [0, 0, 1]]), Atoms("OH", [[0, 0, 0], [0, 0, 1.1]])])
    with pytest.raises(InputError, match=r"no structure could be labelled, 2 failed: in-00000: 9 electrons, an odd"):
        labelled(tmp_path / "in.extxyz", "gfn2", tmp_path / "out.extxyz")
    assert not (tmp_path / "out.extxyz").exists()


def test_limits_that_are_raised_are_tried_again(labelled: Labelled, tmp_path: Path) -> None:
    """A run that all structures failed in keeps its records; only what the old limit ended is computed again."""
    write(tmp_path / "in.extxyz", [dimer(UNCONVERGED), dimer(SLOW)])
    for seconds in (1.0, 2.0):
        with pytest.raises(InputError, match="2 failed"):
            labelled(tmp_path / "in.extxyz", FATES, tmp_path / "out.extxyz", "lj", limits=Limits(seconds))
    ledger = Work(tmp_path / ".out.extxyz.labelling").ledger()
    assert {index: one.attempt for index, one in ledger.failures.items()} == {0: 1, 1: 2}
    assert ledger.failures[1].limit == {"seconds": 2.0}


def test_another_labelling_does_not_go_on_in_a_folder_with_labels(tmp_path: Path) -> None:
    write(tmp_path / "in.extxyz", [dimer(2), dimer(2, 1.3)])
    source = Source.of([tmp_path / "in.extxyz"])
    work = begin(tmp_path / "work", Request(source, FATES, "lj"))
    assert work.left(Limits(), work.ledger(), work.chosen()) == [(0, 1), (1, 1)]
    begin(tmp_path / "work", Request(source, "ase:fates:Moves", "lj"))  # nothing has a label yet
    work = begin(tmp_path / "work", Request(source, FATES, "lj"))
    journal = Journal(work.journals, "local-1")
    journal.append(Record(1, "in-00001", 1, "ok"), Label(1.0))
    journal.close()
    with pytest.raises(InputError, match=r"work: begun with level 'ase:fates:Fates', now 'ase:fates:Moves'"):
        begin(tmp_path / "work", Request(source, "ase:fates:Moves", "lj"))
    work = begin(tmp_path / "work", Request(source, FATES, "lj"))
    assert work.left(Limits(), work.ledger(), work.chosen()) == [(0, 1)]


def test_a_calculator_that_moves_atoms_labels_nothing(labelled: Labelled, tmp_path: Path) -> None:
    write(tmp_path / "in.extxyz", dimer(2))
    with pytest.raises(InputError, match="Moves moved the atoms"):
        labelled(tmp_path / "in.extxyz", "ase:fates:Moves", tmp_path / "out.extxyz", "moved")


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([dimer(2, frame_id="a"), dimer(2, 1.3, frame_id="a")], r"frame 1: frame_id 'a' occurs twice \(first: in.*:0"),
        ([dimer(2), dimer(2, np.nan)], "frame 1: positions: nan"),
        ([dimer(2, charge=0.5)], "frame 0: charge charge='0.5' is not a whole number"),
    ],
)
def test_bad_structures_are_named_before_anything_is_computed(
    tmp_path: Path, frames: list[Atoms], message: str
) -> None:
    write(tmp_path / "in.extxyz", frames)
    with pytest.raises(InputError, match=message):
        list(read_files([tmp_path / "in.extxyz"]))


def test_sources_are_a_store_or_files(tmp_path: Path, molecule_store: Path) -> None:
    for paths, message in (
        ([tmp_path / "none.xyz"], "no such file or store"),
        ([tmp_path], "no store there"),
        ([molecule_store, molecule_store], "a store is labelled alone"),
    ):
        with pytest.raises(InputError, match=message):
            Source.of(paths)
