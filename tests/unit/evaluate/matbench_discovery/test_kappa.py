"""κ: published averages, a published mode-resolved prediction, and the rules for failures."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from mffm.evaluate import published
from mffm.evaluate.matbench_discovery import kappa, phonondb
from mffm.evaluate.matbench_discovery.kappa import Conductivity


def test_kappa_srme_of_40_models_is_the_mean_of_their_materials():
    leaderboard = {r["key"]: r["κ_SRME"] for r in published.matbench_discovery()}
    models = {k: v for k, v in published.kappa_103().items() if k != "_reference"}
    assert len(models) == 40
    for key, values in models.items():
        assert len(values["srme"]) == 103
        found, failed = kappa.mean_srme([None if v == kappa.WORST else v for v in values["srme"]])
        assert found == pytest.approx(float(leaderboard[key]), abs=5.01e-5), key
        assert failed == pytest.approx(np.mean([v == 2 for v in values["srme"]]))


@pytest.fixture(scope="module")
def references(public_data: Path) -> dict[str, Conductivity]:
    return phonondb.read_references(public_data / phonondb.REFERENCE.path)


def test_the_reference_file_has_the_published_kappas(references: dict[str, Conductivity]):
    reference = published.kappa_103()["_reference"]
    for i, value in zip(reference["material_ids"], reference["kappa"], strict=True):
        assert references[i].kappa == pytest.approx(value, rel=1e-4)
        mode, weights = references[i].mode_kappa, references[i].weights
        assert mode is not None
        assert weights is not None
        assert mode.sum() / weights.sum() == pytest.approx(value, rel=2e-3)  # the modes add up


@pytest.mark.slow
def test_srme_of_mace_from_its_mode_kappas(public_data: Path, references: dict[str, Conductivity]):
    with gzip.open(public_data / "kappa103" / "mace_agnesi_medium_pred.json.gz", "rt") as file:
        records = json.load(file)
    predicted = {
        i: Conductivity(
            r["kappa_tot_avg"],
            None if r["shape"] is None else np.reshape(r["mode_kappa_tot_avg"], r["shape"][1:]),
            None if r["weights"] is None else np.array(r["weights"]),
            has_imaginary=r["imaginary"] or r["broken"],
        )
        for i, r in records.items()
    }
    found = kappa.metrics(predicted, references)
    assert found["κ_SRME"] == pytest.approx(0.5648209, abs=1e-6)  # 0.5667916 published: with NAC
    assert found["κ_failure_rate"] == pytest.approx(3 / 103)


def mode_data(scale: float = 1.0) -> Conductivity:
    modes = np.arange(1.0, 13).reshape(2, 6) * scale
    weights = np.array([1.0, 3])
    return Conductivity(modes.sum() / weights.sum(), modes, weights, space_groups=(225, 225))


def test_srme_sees_errors_that_cancel_in_kappa():
    label, swapped = mode_data(), mode_data()
    assert label.mode_kappa is not None
    swapped = Conductivity(label.kappa, label.mode_kappa[::-1], label.weights)
    assert kappa.srd(swapped, label) == 0
    error = np.abs(label.mode_kappa[::-1] - label.mode_kappa).sum() / 4
    assert kappa.srme(swapped, label) == pytest.approx(2 * error / (2 * label.kappa))
    assert kappa.srme(label, label) == 0
    assert kappa.srme(mode_data(3), label) == pytest.approx(2 * 2 / 4)  # 2 |3κ − κ| / (3κ + κ)


def test_what_failed_scores_two():
    label = mode_data()
    imaginary = Conductivity(label.kappa, label.mode_kappa, label.weights, has_imaginary=True)
    changed = Conductivity(label.kappa, label.mode_kappa, label.weights, space_groups=(225, 166))
    assert label.mode_kappa is not None
    other_mesh = Conductivity(label.kappa, label.mode_kappa[:1], label.weights)
    for failed in (imaginary, changed, other_mesh, Conductivity(None)):
        assert kappa.srme(failed, label) is None
    found = kappa.metrics({"a": label}, {"a": label, "b": label})  # b has no prediction
    assert found["κ_SRME"] == 1
    assert found["κ_SRD"] == -1
    assert found["κ_failure_rate"] == 0.5


def test_imaginary_modes():
    clean = np.ones((3, 6))
    clean[0, :3] = -0.005  # noise of the acoustic modes at Γ
    assert not kappa.has_imaginary_modes(clean)
    for q, mode, value in ((0, 0, -0.02), (0, 4, -1e-4), (2, 0, -1e-4)):
        bad = clean.copy()
        bad[q, mode] = value
        assert kappa.has_imaginary_modes(bad)
    assert kappa.has_imaginary_modes(np.full((3, 6), np.nan))


def test_mode_totals_add_up_and_directions_are_averaged():
    random = np.random.default_rng(0)
    particle, heat = random.random((1, 4, 6, 6)), random.random((1, 4, 6))
    coherence = random.random((1, 4, 6, 6, 6))
    coherence = coherence + np.swapaxes(coherence, 2, 3)  # κ_C is symmetric in the two modes
    total = kappa.mode_total(particle, coherence, heat)
    # Each pair's coherence is shared between its two modes by their heat capacities, so nothing is lost.
    assert total.sum(axis=2) == pytest.approx(particle.sum(axis=2) + coherence.sum(axis=(2, 3)))
    tensor = random.random((2, 3, 3))
    voigt = tensor[:, [0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    assert kappa.average(voigt) == pytest.approx(kappa.average(tensor))
    assert kappa.average(tensor) == pytest.approx(np.trace(tensor, axis1=1, axis2=2) / 3)


def test_spectra_weigh_q_points_by_multiplicity():
    irreducible = Conductivity(1.0, frequencies=np.array([[1.0], [2]]), weights=np.array([1.0, 3]))
    full = Conductivity(1.0, frequencies=np.array([[1.0], [2], [2], [2]]))
    assert kappa.spectrum_w1(irreducible, full) == pytest.approx(0)
    shifted = Conductivity(1.0, frequencies=full.frequencies + 0.5)
    assert kappa.spectrum_w1(shifted, irreducible) == pytest.approx(0.5)
    assert kappa.spectrum_w1(Conductivity(None), full) is None
