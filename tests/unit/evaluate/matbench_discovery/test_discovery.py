"""Published rows from their own counts, and the rules for missing, absurd and rounded values."""

import math

import numpy as np
import pytest

from mffm.evaluate import published
from mffm.evaluate.matbench_discovery import discovery
from mffm.evaluate.matbench_discovery.discovery import Confusion, Labels

ROWS = published.matbench_discovery()
SUBSETS = {"uniq": discovery.WBM_PREVALENCE, "full": None, "10k": discovery.WBM_PREVALENCE}


def test_rates_of_published_rows_follow_from_their_counts():
    compared = 0
    for row in ROWS:
        for subset, prevalence in SUBSETS.items():
            counts = Confusion(*(int(row[f"{subset}_{k}"]) for k in ("TP", "FP", "TN", "FN")))
            found = counts.metrics(prevalence)
            for name in ("F1", "Precision", "Recall", "Accuracy", "DAF"):
                assert found[name] == pytest.approx(float(row[f"{subset}_{name}"]), abs=5.01e-4), (row["model"], name)
                compared += 1
    assert compared == 62 * 3 * 5


def test_only_one_count_of_stable_prototypes_gives_every_published_daf():
    def largest_error(n_stable: int) -> float:
        prevalence = n_stable / 215_488
        return max(
            abs(float(r[f"{s}_TP"]) / (float(r[f"{s}_TP"]) + float(r[f"{s}_FP"])) / prevalence - float(r[f"{s}_DAF"]))
            for r in ROWS
            for s in ("uniq", "10k")
        )

    fitting = [n for n in range(32_900, 33_000) if largest_error(n) <= 5.01e-4]
    assert fitting == [32_942]
    assert fitting[0] / 215_488 == discovery.WBM_PREVALENCE


def labels(n: int = 400, seed: int = 0) -> Labels:
    random = np.random.default_rng(seed)
    return Labels(
        tuple(f"wbm-{i}" for i in range(n)),
        random.normal(0.05, 0.1, n),
        random.normal(-1, 0.5, n),
        random.random(n) < 0.7,
    )


def test_a_perfect_prediction_finds_all_and_daf_is_one_over_prevalence():
    truth = labels()
    found = discovery.score(truth, truth.e_form)
    full = found["full_test_set"]
    rounded = np.round(truth.e_above_hull, 3) <= 0
    assert (full["F1"], full["MAE"], full["R2"]) == (1, pytest.approx(0, abs=1e-12), pytest.approx(1))
    assert full["DAF"] == pytest.approx(1 / rounded.mean())
    # The other subsets divide by the prevalence of labels that are not rounded.
    assert found["unique_prototypes"]["DAF"] == pytest.approx(1 / truth.prevalence())


def test_missing_counts_as_unstable_and_is_left_out_of_errors():
    truth = labels()
    stable = np.flatnonzero(np.round(truth.e_above_hull, 3) <= 0)
    prediction = truth.e_form + 0.01
    prediction[stable[:3]] = np.nan
    found = discovery.score(truth, prediction)["full_test_set"]
    assert found["missing_preds"] == 3
    assert found["FN"] >= 3
    assert found["TP"] + found["FN"] == len(stable)
    assert found["MAE"] == pytest.approx(0.01, abs=6e-4)


def test_a_prediction_more_than_5_ev_off_counts_as_missing():
    truth = labels()
    near, far = truth.e_form.copy(), truth.e_form.copy()
    near[0] += 4.999
    far[0] -= 5.001  # far below the hull: it would be called stable
    assert discovery.score(truth, near)["full_test_set"]["missing_preds"] == 0
    found = discovery.score(truth, far)["full_test_set"]
    assert found["missing_preds"] == 1
    assert found["MAE"] == pytest.approx(0, abs=1e-12)


def test_labels_and_predictions_are_rounded_to_1_mev():
    truth = Labels(("a", "b"), np.array([0.0004, 0.2]), np.array([-1.0004, -1.0]), np.array([True, True]))
    found = discovery.score(truth, np.array([-1.00041, -0.9997]), prevalence=0.5)["unique_prototypes"]
    assert (found["TP"], found["TN"]) == (1, 1)  # 0.4 meV above the hull rounds to stable
    assert found["MAE"] == pytest.approx(0, abs=1e-15)
    assert found["DAF"] == 2


def test_the_most_stable_are_ranked_by_predicted_hull_distance(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(discovery, "N_MOST_STABLE", 20)
    truth = labels()
    prediction = truth.e_form.copy()
    worst = np.flatnonzero(truth.is_unique)[np.argsort(truth.e_above_hull[truth.is_unique])[-1]]
    prediction[worst] -= 3  # called the most stable of all
    found = discovery.score(truth, prediction)["most_stable_10k"]
    assert (found["TP"], found["FP"], found["TN"], found["FN"]) == (19, 1, 0, 0)
    assert (found["Recall"], found["FPR"]) == (1, 1)


def test_no_prediction_at_all_gives_numbers_where_they_exist():
    truth = labels()
    found = discovery.score(truth, np.full(len(truth.ids), np.nan))["full_test_set"]
    assert (found["Recall"], found["TNR"]) == (0, 1)
    assert all(math.isnan(found[k]) for k in ("F1", "Precision", "MAE", "RMSE", "R2"))


def test_predictions_of_unknown_materials_are_refused():
    with pytest.raises(ValueError, match="wbm-9999"):
        discovery.aligned(labels(3), {"wbm-9999": 1.0})
    values = discovery.aligned(labels(3), {"wbm-1": 1.0})
    assert np.isnan(values[[0, 2]]).all()
    assert values[1] == 1
