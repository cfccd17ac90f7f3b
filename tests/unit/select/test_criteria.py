"""Criteria and the greedy choice against definitions written out, on points drawn at random."""

import math

import numpy as np
import pytest

from mffm.select import criteria
from mffm.select.criteria import Distances, LargestCluster, MaxDet, Random, Weighted, nearest
from mffm.select.greedy import Limits, greedy


@pytest.fixture
def points() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    groups = rng.normal(size=(6, 5)) * 3
    x = groups[rng.integers(0, 6, 150)] + rng.normal(size=(150, 5))
    return x.astype(np.float32), (groups[:2] + rng.normal(size=(2, 5))).astype(np.float32)


def picks(criterion, size: int, n: int | None = None, costs=None, budget=math.inf, formulas=None, per_formula=None):
    formulas = np.zeros(size, np.int64) if formulas is None else formulas
    limits = Limits(n, costs, budget, formulas, per_formula)
    return [p.index for p in greedy(criterion, limits, np.ones(size, bool), lambda i: None)]


def squared(x: np.ndarray, centres: np.ndarray) -> np.ndarray:
    return np.square(x[:, None].astype(np.float64) - centres[None].astype(np.float64)).sum(2)


def test_nearest_is_the_nearest_across_blocks(points, monkeypatch):
    x, labelled = points
    monkeypatch.setattr(criteria, "BLOCK", 7)
    found, which = nearest(labelled.repeat(20, 0), x)
    everything = squared(labelled.repeat(20, 0), x)
    np.testing.assert_allclose(found, everything.min(1), atol=1e-4)
    np.testing.assert_array_equal(which, everything.argmin(1))
    assert np.isinf(nearest(x, x[:0])[0]).all()


def test_farthest_point_by_definition(points):
    x, labelled = points
    centres, expected = labelled, []
    for _ in range(25):
        expected.append(int(squared(x, centres).min(1).argmax()))
        centres = np.concatenate([centres, x[expected[-1:]]])
    assert picks(Distances(x, labelled), len(x), 25) == expected
    assert len(set(expected)) == 25


def test_largest_cluster_by_definition(points):
    x, labelled = points
    centres, expected = labelled, []
    for _ in range(25):
        distances = squared(x, centres)
        cluster, least = distances.argmin(1), distances.min(1)
        least[expected] = 0
        left = np.setdiff1d(np.arange(len(x)), expected)
        sizes = [least[left][cluster[left] == k].sum() for k in range(len(centres))]
        inside = [i for i in left if cluster[i] == int(np.argmax(sizes))]
        expected.append(int(inside[int(least[inside].argmax())]))
        centres = np.concatenate([centres, x[expected[-1:]]])
    assert picks(LargestCluster(x, labelled), len(x), 25) == expected


@pytest.mark.parametrize("n_labelled", [0, 2])
def test_maxdet_gains_are_those_of_the_determinant(points, n_labelled: int):
    """Rank-one updates over 60 picks of six features; A is nearly singular at the first of them."""
    x, labelled = points
    labelled = labelled[:n_labelled]
    criterion = MaxDet(x, labelled)
    f, trained = (np.concatenate([v.astype(np.float64), np.ones((len(v), 1))], 1) for v in (x, labelled))
    chosen: list[int] = []
    allowed = np.ones(len(x), bool)
    for _ in range(60):
        rows = np.concatenate([trained, f[chosen]])
        matrix = rows.T @ rows + criterion.ridge * np.eye(6)
        direct = np.einsum("ij,ij->i", f @ np.linalg.inv(matrix), f)
        np.testing.assert_allclose(criterion.variances, direct, rtol=1e-4, atol=1e-8)
        best = int(np.where(allowed, criterion.gains(allowed), -1).argmax())
        gain = np.linalg.slogdet(matrix + np.outer(f[best], f[best]))[1] - np.linalg.slogdet(matrix)[1]
        assert criterion.gains(allowed)[best] == pytest.approx(gain, rel=1e-4)
        criterion.add(best)
        chosen.append(best)
        allowed[best] = False
    assert picks(MaxDet(x, labelled), len(x), 60) == chosen


def test_weights_lead_but_do_not_repeat_themselves():
    """Two near copies have the largest weights: the second of them comes after what lies elsewhere."""
    x = np.array([[0.0], [0.01], [5.0], [-5.0]], np.float32)
    weights = np.array([10.0, 9.9, 1.0, 1.0])
    assert picks(Weighted(x, x[:0], weights), 4, 4) == [0, 2, 3, 1]


def test_random_is_one_order_for_a_seed():
    first, again, other = (picks(Random(50, seed), 50, 20) for seed in (1, 1, 2))
    assert first == again != other
    assert len(set(first)) == 20


def test_budget_and_costs(points):
    x, labelled = points
    costs = np.random.default_rng(0).uniform(1, 10, len(x))
    found = picks(Distances(x, labelled), len(x), costs=costs, budget=40.0)
    assert costs[found].sum() <= 40
    left = 40 - costs[found].sum()
    assert not (np.delete(costs, found) <= left).any()  # nothing that could still be paid is left
    alike = picks(Distances(x, labelled), len(x), 10, costs=np.full(len(x), 3.0))
    assert alike == picks(Distances(x, labelled), len(x), 10)


def test_the_best_single_one_where_greedy_by_cost_fails():
    """A cheap point of little gain leaves too little for the dear one that gains more: the dear one is taken."""
    x = np.array([[0.01], [30.0]], np.float32)
    labelled = np.zeros((200, 1), np.float32)
    found = picks(MaxDet(x, labelled), 2, costs=np.array([1e-6, 10.0]), budget=10.0)
    assert found == [1]


def test_so_many_of_a_formula(points):
    x, labelled = points
    formulas = np.arange(len(x)) % 3
    found = picks(Distances(x, labelled), len(x), formulas=formulas, per_formula=4)
    assert np.bincount(formulas[found]).tolist() == [4, 4, 4]


def test_compositions_that_labels_do_not_span_come_first(points):
    """An element in one candidate in fifty, and one mixture in ten; then the criterion's own order goes on."""
    x, labelled = points
    fractions = np.array([[1.0, 0, 0], [0.5, 0.5, 0], [0.9, 0, 0.1]])
    formulas = np.zeros(len(x), np.int64)
    formulas[::10], formulas[7::50] = 1, 2
    covered = np.array([[2 / 3, 1 / 3, 0]])

    def chosen(by, fractions, covered):
        limits = Limits(20, None, math.inf, formulas, None, fractions, covered)
        return [p.index for p in greedy(by, limits, np.ones(len(x), bool), lambda i: None)]

    for by in (lambda: Random(len(x), 5), lambda: Distances(x, labelled), lambda: LargestCluster(x, labelled)):
        found = chosen(by(), fractions, covered)
        plain = picks(by(), len(x), 20)
        for which, rank in ((found, 3), (plain, 2)):
            seen = np.concatenate([covered, fractions[formulas[which[:2]]]])
            assert np.linalg.matrix_rank(seen) == rank, "without the rule they are not among the first"
        assert len(set(found)) == 20
    every = chosen(Distances(x, labelled), fractions, np.eye(3))
    assert every == picks(Distances(x, labelled), len(x), 20), "where labels span every composition nothing changes"


def test_far_compositions_before_near_ones():
    """Two that differ by a hundredth determine both elements, but a hundred times worse than two that differ by one."""
    x = np.array([[1.0], [9.0], [8.0], [0.0]], np.float32)
    fractions = np.array([[0.5, 0.5], [0.51, 0.49], [0.52, 0.48], [0.9, 0.1]])
    limits = Limits(2, None, math.inf, np.arange(4), None, fractions, np.array([[0.5, 0.5]]))
    found = [p.index for p in greedy(Distances(x, x[:0]), limits, np.ones(4, bool), lambda i: None)]
    assert found == [3, 1]
