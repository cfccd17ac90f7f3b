"""Aggregates of the LAMBench leaderboard from the published metrics of its tasks."""

import math

import pytest

from mffm.evaluate import published
from mffm.evaluate.lambench import scores

MODELS = published.lambench()


@pytest.mark.parametrize("name", MODELS)
def test_aggregates_of_the_leaderboard(name: str):
    row = MODELS[name]
    found = scores.aggregate(row["force_field"], row["property"], row["supports_omol"])
    assert found.force_field == pytest.approx(row["M_FF"], abs=1e-3)
    assert found.property == pytest.approx(row["M_PC"], abs=1e-3)


def test_a_dummy_scores_one_everywhere():
    direct = {
        t: {"energy_rmse_natoms": 1000 * s.energy, "force_rmse": 2000 * s.force, "virial_rmse_natoms": 1e9}
        for t, s in scores.FORCE_FIELD.items()
    }
    derived = {t: {**s.dummies, "success_rate": 1.0} for t, s in scores.PROPERTY.items()}
    found = scores.aggregate(direct, derived)
    assert found.force_field == pytest.approx(1)
    assert found.property == pytest.approx(1)


def test_a_domain_without_all_of_its_tasks_has_no_value():
    row = MODELS["MACE-MPA-0"]
    direct = {t: m for t, m in row["force_field"].items() if t != "MoS2"}
    derived = {t: m for t, m in row["property"].items() if t != "neb"}
    found = scores.aggregate(direct, derived)
    assert found.force_field is None
    assert found.property is None
    assert found.force_field_domains[scores.INORGANIC] is None
    assert found.force_field_domains[scores.CATALYSIS] is not None
    assert found.property_domains == {
        **scores.aggregate({}, row["property"]).property_domains,
        scores.CATALYSIS: None,
    }


def test_failures_divide_the_error_of_elastic_and_phonon_alone():
    half = {"MAE_G_VRH": 67.5431 / 4, "MAE_K_VRH": 1e9, "success_rate": 0.5}
    assert scores.property_errors("elastic", half) == {"MAE_G_VRH": pytest.approx(0.5), "MAE_K_VRH": pytest.approx(2)}
    assert scores.property_errors("rxn_barrier", {"MAE": 20.975 / 4, "success_rate": 0.5}) == {
        "MAE": pytest.approx(0.25)
    }
    assert scores.property_errors("elastic", {**half, "success_rate": 0.0}) == {}
    assert scores.property_errors("wiggle150", {"MAE": math.nan}) == {}


def test_instability_is_clipped_and_failures_count_five():
    assert scores.instability([5e-4, 5e-3, 0.0, None, 1e9]) == pytest.approx((0 + 1 + 0 + 5 + 5) / 5)
    assert scores.instability([MODELS["Orb-v2"]["applicability"]["nve_md"]["slope"]]) == pytest.approx(2.649, abs=1e-3)


def test_omol_models_are_scored_against_the_dummy_of_their_labels():
    metrics = {"energy_rmse_natoms": 10.0, "force_rmse": 100.0}
    assert scores.force_field_errors("AQM", metrics)["energy"] == pytest.approx(0.01 / 0.0274237364941365)
    assert scores.force_field_errors("AQM", metrics, omol=True)["energy"] == pytest.approx(0.01 / 0.026886363885976483)
    with pytest.raises(KeyError, match="MoS2: virial"):
        scores.force_field_errors("MoS2", {**metrics, "virial_rmse_natoms": None})
