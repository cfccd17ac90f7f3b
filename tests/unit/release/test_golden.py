"""Releases that earlier versions wrote predict the same for ever: tests/golden is never written again."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from mffm.deploy.ase import Calculator

GOLDEN = Path(__file__).parents[2] / "golden"
RELEASES = sorted(p.name.removesuffix(".expected.json") for p in GOLDEN.glob("*.expected.json"))


def test_every_format_version_has_one():
    assert {"release-v1", "release-v2", "release-v2.safetensors"} <= set(RELEASES)


@pytest.mark.parametrize("name", RELEASES)
def test_a_frozen_release_predicts_what_it_did(name: str):
    """float64: on another machine sums may be taken in another order, which is worth about 1e-12 here."""
    for row in json.loads((GOLDEN / f"{name}.expected.json").read_text())["structures"]:
        for fidelity, expected in row["fidelities"].items():
            atoms = Atoms(row["numbers"], row["positions"], cell=row["cell"], pbc=row["pbc"])
            atoms.calc = Calculator(GOLDEN / name, fidelity=fidelity, dtype="float64")
            assert atoms.get_potential_energy() == pytest.approx(expected["energy"], abs=1e-9, rel=0)
            np.testing.assert_allclose(atoms.get_forces(), expected["forces"], atol=1e-9, rtol=0)
            if "stress" in expected:
                np.testing.assert_allclose(atoms.get_stress(), expected["stress"], atol=1e-9, rtol=0)
