"""Labels of another store, for the structures that a file names."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write

from mffm.data.named import rows_in
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.keys import FORCES
from mffm.label.journal import Limits
from mffm.label.publish import Summary
from mffm.label.run import label
from mffm.label.structures import Source
from mffm.label.work import Request


def test_labels_of_another_store_for_the_structures_of_a_file(molecule_store: Path, tmp_path: Path):
    path = tmp_path / "store"
    shutil.copytree(molecule_store, path)
    store = Store(path)
    wanted = [7, 3, 40]
    chosen = [Atoms("H", info={"frame_id": store.frame_id(row)}) for row in wanted]
    write(tmp_path / "selected.extxyz", chosen)
    rows = tuple(rows_in(store, tmp_path / "selected.extxyz").tolist())
    assert rows == (3, 7, 40)
    request = Request(Source.of([path]), f"store:{molecule_store}@pbe", "copied", rows=rows)
    done = label(request, "copied", None, 1, Limits(), lambda *_: None)
    assert isinstance(done, Summary)
    assert (done.n_labels, done.failures) == (3, {})
    store = Store(path)
    assert store.fidelities["copied"].level_of_theory == "PBE/def2-SVP"
    assert store.rows(fidelity="copied").tolist() == [3, 7, 40]
    np.testing.assert_array_equal(store.energies("copied", np.array(rows)), store.energies("pbe", np.array(rows)))
    for row in rows:
        np.testing.assert_array_equal(store.labels(row, "copied")[FORCES], store.labels(row, "pbe")[FORCES])
    assert isinstance(label(request, "copied", None, 1, Limits(), lambda *_: None), str)


def test_a_structure_that_moved_gets_no_label(
    molecule_store: Path, build_store: Callable[..., Path], labelled: Callable[..., Any], tmp_path: Path
):
    frames = read(molecule_store.parent / "molecules.extxyz", ":4")
    frames[1].positions[0, 0] += 0.1
    frames[2].info["frame_id"] = "unheard-of"
    write(tmp_path / "in.extxyz", frames)
    done = labelled(tmp_path / "in.extxyz", f"store:{molecule_store}@ccsdt", tmp_path / "out.extxyz")
    assert (done.n_labels, done.failures) == (2, {"input": 2})
    written = read(tmp_path / "out.extxyz", ":")
    assert written[0].info["energy_ccsdt"] == pytest.approx(frames[0].info["energy_ccsdt"])
    assert "is another structure in" in written[1].info["label_error_ccsdt"]
    assert "has no frame_id 'unheard-of'" in written[2].info["label_error_ccsdt"]


@pytest.mark.parametrize("place", ["{store}", "{store}@r2scan", "nowhere@pbe"])
def test_levels_that_no_store_has(molecule_store: Path, place: str):
    from mffm.label import levels

    with pytest.raises(InputError):
        levels.find(f"store:{place.format(store=molecule_store)}")
