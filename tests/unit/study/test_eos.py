"""Equations of state: of an energy that is known, and what cannot be fitted."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import units
from ase.build import bulk, molecule
from ase.eos import birchmurnaghan
from ase.io import write

from mffm.config.base import validate
from mffm.config.study import EosConfig
from mffm.data.records import Geometry
from mffm.errors import InputError
from mffm.study.eos import Eos, section

CONFIG: dict[str, Any] = {"file": "cells.extxyz", "group": "binary", "uncovered": ["MgO"], "against": "hf_all"}
V0 = 75.0


def energy(volume: np.ndarray, v0: float = V0, bulk_modulus: float = 160.0) -> np.ndarray:
    return np.asarray(birchmurnaghan(volume, -40.0, bulk_modulus * units.GPa, 4.2, v0))


def eos_of(folder: Path, frames: Sequence[Any] | None = None) -> Eos:
    cells = [bulk("MgO", "rocksalt", a=4.2, cubic=True), bulk("NaCl", "rocksalt", a=4.25, cubic=True)]
    cells[0].info["binary"], cells[1].info["binary"] = "MgO", "NaCl"
    write(folder / "cells.extxyz", [*cells, cells[1]] if frames is None else frames)
    return Eos.read(validate(EosConfig, CONFIG, "test"), folder)


def of_curve(**kwargs: float) -> Any:
    def energies(structures: Sequence[Geometry]) -> np.ndarray:
        return energy(np.array([abs(np.linalg.det(cell)) for _, _, cell, _ in structures]), **kwargs)

    return energies


def test_cells_of_a_file_against_a_method(tmp_path: Path):
    judge = eos_of(tmp_path)
    assert list(judge.cells) == ["MgO Mg4O4", "NaCl Cl4Na4", "NaCl Cl4Na4 #2"]
    reference = judge.judge(of_curve())
    assert reference["MgO Mg4O4"] == {"a": pytest.approx(np.cbrt(V0), rel=1e-5), "b": pytest.approx(160, rel=1e-3)}
    softer = judge.judge(of_curve(v0=V0 * 1.01**3, bulk_modulus=152.0))
    lost = judge.judge(of_curve(v0=120.0))
    assert lost["MgO Mg4O4"] is None
    half = {**softer, "NaCl Cl4Na4 #2": None}
    results = {"hf_all": {126: {0: reference}}, "soft": {8: {0: half, 1: softer}}, "lost": {8: {0: lost}}}
    summary = judge.summarise(results)
    (point,) = summary["methods"]["soft"]
    assert point["a_uncovered"] == {"mean": pytest.approx(1, rel=1e-2), "least": pytest.approx(1, rel=1e-2),
                                    "most": pytest.approx(1, rel=1e-2), "seeds": 1}  # fmt: skip
    assert point["b_covered"]["mean"] == pytest.approx(5, rel=1e-2)
    assert point["failed"] == 1
    assert summary["methods"]["lost"][0]["a_covered"] is None
    assert "hf_all" not in summary["methods"]
    page = "\n".join(section(summary, {"soft": "Soft", "lost": "Lost", "hf_all": "All"}, "r2scan"))
    assert "MAE in % of All (126 frames), same seed" in page
    assert "- Soft, 8 frames, seed 0: NaCl Cl4Na4 #2" in page
    assert "| Lost | 8 |  |  |  |  | 3 |" in page
    assert "not finished yet" in "\n".join(section(judge.summarise({}), {"hf_all": "All"}, "r2scan"))


def test_a_molecule_has_no_volume(tmp_path: Path):
    water = molecule("H2O")
    water.info["binary"] = "MgO"
    with pytest.raises(InputError, match="H2O is not periodic"):
        eos_of(tmp_path, [water])
