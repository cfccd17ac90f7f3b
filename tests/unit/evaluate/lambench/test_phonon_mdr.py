"""The phonon task against a published file, and end to end with EMT."""

import bz2
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase.build import bulk
from ase.calculators.emt import EMT

from mffm.evaluate.benchmark.task import Options
from mffm.evaluate.lambench import phonon_mdr

phonopy = pytest.importorskip("phonopy", reason="needs phonopy: pip install 'mffm[properties]'")


@pytest.mark.slow
def test_quantities_of_a_published_file_from_its_own_force_constants(public_data: Path):
    file = public_data / "mdr_phonon_example" / "mp-1000.yaml.bz2"
    content = yaml.load(bz2.decompress(file.read_bytes()), yaml.CSafeLoader)
    phonons = phonon_mdr.read_phonopy(file)
    constants = content["force_constants"]
    phonons.force_constants = np.array(constants["elements"]).reshape(*constants["shape"], 3, 3)
    found = phonon_mdr.quantities(phonons)
    at = content["temperatures"].index(300.0)
    assert found["entropy"] == pytest.approx(content["entropy"][at], rel=1e-5)
    assert found["free_energy"] == pytest.approx(content["free_e"][at], rel=1e-5)
    assert found["heat_capacity"] == pytest.approx(content["heat_capacity"][at], rel=1e-5)
    assert found["max_freq"] == pytest.approx(np.max(content["phonon_freq"]) * 47.9924, rel=1e-5)


@pytest.mark.slow
def test_copper_end_to_end(tmp_path: Path):
    folder = tmp_path / "lambench" / "MDR_PBE_phonon"
    folder.mkdir(parents=True)
    copper = bulk("Cu", a=3.62, cubic=True)
    from phonopy.structure.atoms import PhonopyAtoms

    made = phonopy.Phonopy(
        PhonopyAtoms(list(copper.symbols), cell=copper.cell.array, scaled_positions=copper.get_scaled_positions()),
        supercell_matrix=2 * np.eye(3, dtype=int),
        primitive_matrix="F",
    )
    made.save(tmp_path / "plain.yaml")
    (folder / "mp-30.yaml.bz2").write_bytes(bz2.compress((tmp_path / "plain.yaml").read_bytes()))
    (folder / "pbe.csv").write_text("mp_id,max_freq,entropy,free_energy,heat_capacity\nmp-30,340.0,33.0,-5.0,24.0\n")
    items = phonon_mdr.TASK.load(tmp_path)
    result = phonon_mdr.TASK.run(items["mp-30"], EMT(), Options())
    # Copper: measured 7.2 THz = 345 K, 33.2 J/K/mol; at constant volume 23.7 J/K/mol of at most 3R = 24.94.
    assert result["max_freq"] == pytest.approx(345, rel=0.15)
    assert result["entropy"] == pytest.approx(33.2, rel=0.15)
    assert result["heat_capacity"] == pytest.approx(23.7, rel=0.02)
    score = phonon_mdr.TASK.score(items, {"mp-30": result})
    assert score.metrics["mae_max_freq"] == pytest.approx(abs(result["max_freq"] - 340))
    assert score.metrics["success_rate"] == 1
    assert "1 of 9958" in score.remark
