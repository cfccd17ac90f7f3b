"""tools/enumerate_molecules.py: which graphs there are, and frames that keep their bonds."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from ase.io import read

if importlib.util.find_spec("rdkit") is None:
    pytest.skip("rdkit not installed: pip install -e '.[label]'", allow_module_level=True)

import enumerate_molecules as tool
from rdkit import Chem

TWO = ["C#C", "C#N", "C=C", "C=N", "C=O", "CC", "CN", "CO", "N#N", "N=N", "N=O", "NN", "NO"]


def test_all_graphs_of_two_atoms() -> None:
    assert tool.enumerate_smiles(2) == sorted(TWO)  # no O-O


def test_graphs_of_three_atoms_have_rings_and_full_valences() -> None:
    found = tool.enumerate_smiles(3)
    assert set(TWO) < set(found)
    assert {"C1CC1", "C1=CC1", "C1CO1", "C=C=C", "O=C=O", "N#CO", "CC=O"} < set(found)
    assert not {"C1#CC1", "NN=N", "OON", "ONO", "C1=C=C1"} & set(found)
    for smiles in found:
        molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
        assert sum(a.GetNumRadicalElectrons() + abs(a.GetFormalCharge()) for a in molecule.GetAtoms()) == 0, smiles


def test_bonds_of_positions() -> None:
    numbers, positions = np.array([8, 1, 1]), np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]])
    assert tool.bonded(numbers, positions) == {(0, 1), (0, 2)}
    positions[1, 0] = 1.4
    assert tool.bonded(numbers, positions) == {(0, 2)}


@pytest.mark.usefixtures("label_codes")
def test_frames(tmp_path: Path) -> None:
    paths = tmp_path / "first.extxyz", tmp_path / "second.extxyz"
    tool.main(*paths, molecules=6, heavy=2, atoms=6, holdout="C=O", seed=1, temperature=500.0)
    first, second = (read(path, ":") for path in paths)
    assert len(first) == len(second) > 3
    assert len({f.info["frame_id"] for f in [*first, *second]}) == 2 * len(first)
    assert any(f.info["molecule"] == "C=O" for f in first)
    for a, b in zip(first, second, strict=True):
        assert a.info["molecule"] == b.info["molecule"]
        assert b.info["split"] == "train"
        assert a.info.get("split") == ("ood" if a.info["molecule"] == "C=O" else None)
        assert tool.bonded(a.numbers, a.positions) == tool.bonded(b.numbers, b.positions)
        assert np.abs(a.positions - b.positions).max() > 1e-3
