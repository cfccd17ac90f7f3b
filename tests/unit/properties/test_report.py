"""Reports: what JSON can hold, and remedies where an extra is not installed."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk

from mffm import plots
from mffm.errors import InputError
from mffm.properties.batched import relax_many
from mffm.properties.elastic import elastic
from mffm.properties.phonons import phonons
from mffm.properties.report import plain, write


def test_numbers_of_numpy_and_what_is_not_finite(tmp_path: Path):
    found = {"a": np.arange(3.0), "b": np.float64(np.nan), "c": [np.int64(2), (np.bool_(True), np.inf)], "d": None}
    assert plain(found) == {"a": [0.0, 1.0, 2.0], "b": None, "c": [2, [True, None]], "d": None}
    paths = write(
        tmp_path / "new" / "folder", "x", "Title", found, [("size", "3 Å")], lambda p: p.write_text("plot"),
        {"fidelity": "pbe", "d3": None},
    )  # fmt: skip
    assert [p.name for p in paths] == ["x.json", "x.md", "x.png"]
    assert json.loads(paths[0].read_text())["property"] == "x"
    text = paths[1].read_text()
    assert "| size | 3 Å |" in text
    assert text.endswith("Made by: fidelity pbe.\n")


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("phonopy", lambda atoms: phonons(atoms)),
        ("pymatgen.analysis.elasticity.elastic", lambda atoms: elastic(atoms)),
        ("torch_sim", lambda atoms: relax_many([atoms], None)),
        ("matplotlib", lambda atoms: plots.curves(Path("x.png"), [])),
    ],
)
def test_an_extra_that_is_not_installed(package: str, call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=r"pip install 'mffm\[properties\]'"):
        call(bulk("Cu"))
