"""κ end to end: copper with EMT on a small mesh, scored against itself and against a strained copy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT

from mffm.evaluate.matbench_discovery import kappa, phonondb

pytest.importorskip("phono3py", reason="needs phono3py: pip install 'mffm[properties]'")
TWICE = 2 * np.eye(3, dtype=int)


class Stiffer(EMT):
    """EMT with forces and stresses half as large again: frequencies grow by √1.5."""

    def calculate(self, *args: Any, **kwargs: Any) -> None:
        super().calculate(*args, **kwargs)
        for name in ("energy", "free_energy", "forces", "stress"):
            if name in self.results:
                self.results[name] = 1.5 * self.results[name]


def crystal(atoms: Any) -> phonondb.Crystal:
    return phonondb.Crystal(atoms, TWICE, TWICE, (3, 3, 3), (Path(), ""))


@pytest.mark.slow
def test_copper_end_to_end():
    atoms = bulk("Cu", a=3.59, cubic=True)
    record = phonondb.compute(crystal(atoms), EMT(), 0.03)
    assert (record["init_spg_num"], record["final_spg_num"], record["has_imag_ph_modes"]) == (225, 225, False)
    label = kappa.from_record(record)
    assert label.kappa is not None
    assert label.mode_kappa is not None
    assert label.weights is not None
    # The modes, particles and waves, add up to the tensor's mean.
    assert label.mode_kappa.sum() / label.weights.sum() == pytest.approx(label.kappa, rel=1e-6)
    assert 1 < label.kappa < 1000
    assert kappa.srme(label, label) == 0
    stiffer = kappa.from_record(phonondb.compute(crystal(atoms), Stiffer(), 0.03))
    assert stiffer.frequencies is not None
    assert label.frequencies is not None
    assert stiffer.frequencies[1:] == pytest.approx(label.frequencies[1:] * 1.5**0.5, rel=1e-3)
    error = kappa.srme(stiffer, label)
    assert error is not None
    assert 0.05 < error < 1.5


@pytest.mark.slow
def test_an_unstable_crystal_has_no_conductivity():
    record = phonondb.compute(crystal(bulk("Cu", "bcc", a=2.86, cubic=True)), EMT(), 0.03)  # bcc copper shears
    assert record["has_imag_ph_modes"]
    assert record["conductivity_skipped"]
    found = kappa.from_record(record)
    assert found.kappa is None
    assert kappa.srme(found, kappa.Conductivity(1.0, np.ones((2, 3)), np.ones(2))) is None


def test_the_set_and_its_published_part(public_data: Path):
    items = phonondb.Kappa103().load(public_data)
    assert len(items) == 103
    assert items["mp-1265"].mesh == (19, 19, 19)
    assert items["mp-1265"].fc2_supercell.tolist() == (4 * np.eye(3)).tolist()
    chosen = {i: items[i] for i in ("mp-1265", "mp-2472")}
    labels = phonondb.read_references(public_data / phonondb.REFERENCE.path)
    perfect = labels["mp-1265"]
    assert perfect.mode_kappa is not None
    assert perfect.weights is not None
    record = {
        "kappa_tot_avg": [perfect.kappa], "mode_kappa_tot_avg": perfect.mode_kappa.tolist(),
        "mode_weights": perfect.weights.tolist(), "init_spg_num": 225, "final_spg_num": 225, "transport_type": "DFT",
    }  # fmt: skip
    score = phonondb.Kappa103().score(chosen, {"mp-1265": record})
    assert score.metrics["κ_SRME"] == pytest.approx(1)  # one perfect, one without result
    assert (score.n, score.n_failed) == (2, 1)
    assert "CHGNet 0.7" in score.remark  # 0.7923 of MgO and 0.7944 of SrO
    assert not score.submission
