"""The plan: the same global batches whatever the number of ranks, without replacement, at the shares asked for."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from mffm.config.recipe import PlanConfig
from mffm.data import pools as pools_module
from mffm.data.permutation import mix, permute
from mffm.data.plan import Cursor, Plan, Pool, build_pools
from mffm.errors import InputError
from mffm.fidelity import Fidelity, FidelityTable
from mffm.keys import N_ELEMENTS


def plan_pool(
    name="a", fidelity_idx=0, rows=1000, weight=None, edges=60, seed=0, live=3, properties=("energy", "forces")
):
    rows = np.arange(rows) if isinstance(rows, int) else np.asarray(rows)
    rng = np.random.default_rng(seed)
    n_edges = np.maximum(2, rng.lognormal(np.log(edges), 0.6, len(rows))).astype(np.int32)
    live = np.full(len(rows), live, np.uint8) if isinstance(live, int) else live
    return Pool(name, name, fidelity_idx, rows, (n_edges // 12 + 1).astype(np.int32), n_edges, live, properties, weight)


def plan_config(**changes):
    settings = {"pools": [{"fidelity": "a"}], "edge_budget": 3000, "oversize": "skip"}
    return PlanConfig(**{**settings, **changes})


def run_steps(plan, n, cursor=None):
    cursor = cursor or plan.start()
    steps = []
    for _ in range(n):
        step, cursor = plan.step(cursor)
        steps.append(step)
    return steps, cursor


def items(step):
    return list(zip(step.rows.tolist(), step.pool.tolist(), strict=True))


# Permutations


@pytest.mark.parametrize("size", [1, 2, 3, 5, 17, 100, 4097, 65536])
def test_permutation_is_a_bijection_and_differs_by_key(size):
    places = np.arange(size)
    first = permute(places, size, np.full(size, 11, np.uint64))
    assert np.array_equal(np.sort(first), places)
    assert np.array_equal(permute(places[::-1], size, np.full(size, 11, np.uint64)), first[::-1])  # place by place
    if size > 16:
        second = permute(places, size, np.full(size, 12, np.uint64))
        assert (first == second).mean() < 0.3
        assert (first == places).mean() < 0.3


def test_permutations_of_five_are_equally_likely():
    keys = mix(np.arange(24_000, dtype=np.uint64))
    orders = permute(np.tile(np.arange(5), len(keys)), 5, np.repeat(keys, 5)).reshape(-1, 5)
    counts = np.array(list(Counter(map(tuple, orders.tolist())).values()))
    assert len(counts) == 120
    assert ((counts - 200) ** 2 / 200).sum() < 180  # χ² with 119 degrees of freedom: beyond 180 once in 4000


def test_permutation_of_many_looks_random():
    size = 100_000_000
    result = permute(np.arange(20_000), size, np.full(20_000, 3, np.uint64))
    assert len(np.unique(result)) == 20_000
    histogram = np.bincount(result // (size // 20), minlength=20)
    assert ((histogram - 1000) ** 2 / 1000).sum() < 50  # χ² with 19 degrees of freedom: beyond 50 once in 7000
    neighbours = np.corrcoef(result[:-1], result[1:])[0, 1]
    assert abs(neighbours) < 0.03  # 4 / √20 000


# Draws


def test_steps_fill_the_budgets_and_a_frame_that_does_not_fit_opens_the_next_step():
    plan = Plan([plan_pool()], plan_config(atom_budget=290), seed=1)
    steps, _ = run_steps(plan, 40)
    for step, following in pairwise(steps):
        edges, atoms = step.n_edges.sum(), step.n_atoms.sum()
        assert edges <= 3000
        assert atoms <= 290
        assert edges + following.n_edges[0] > 3000 or atoms + following.n_atoms[0] > 290
    by_edges = sum(s.n_edges.sum() > 2900 for s in steps)
    assert 0 < by_edges < 40  # each of the two budgets was the one that counted


def test_a_pass_is_without_replacement_and_each_pass_is_reshuffled():
    plan = Plan([plan_pool(rows=np.arange(500) * 3)], plan_config(), seed=1)
    drawn = np.concatenate([s.rows for s in run_steps(plan, 60)[0]])
    assert len(drawn) > 1500
    passes = drawn[:1500].reshape(3, 500)
    for one in passes:
        assert np.array_equal(np.sort(one), np.arange(500) * 3)
    assert (passes[0] == passes[1]).mean() < 0.05
    assert (passes[1] == passes[2]).mean() < 0.05


def test_order_depends_on_seed_only_and_not_on_other_pools():
    a, b = plan_pool("a"), plan_pool("b", 1, rows=300)

    def rows_of_a(pools, seed):
        steps, _ = run_steps(Plan(pools, plan_config(), seed), 5)
        return np.concatenate([s.rows[s.pool == pools.index(a)] for s in steps])[:80]

    assert np.array_equal(rows_of_a([a], 4), rows_of_a([a], 4))
    assert np.array_equal(rows_of_a([a], 4), rows_of_a([b, a], 4))
    assert not np.array_equal(rows_of_a([a], 4), rows_of_a([a], 5))


def test_resume_from_a_serialised_cursor_gives_the_same_remaining_steps():
    pools = [plan_pool("a", weight=3.0), plan_pool("b", 1, rows=70, weight=1.0)]
    whole, _ = run_steps(Plan(pools, plan_config(), seed=2), 30)
    first, cursor = run_steps(Plan(pools, plan_config(), seed=2), 11)
    restored = Cursor.from_dict(json.loads(json.dumps(cursor.to_dict())))
    assert restored == cursor
    rest, _ = run_steps(Plan(pools, plan_config(), seed=2), 19, restored)
    assert [items(s) for s in first + rest] == [items(s) for s in whole]
    assert [s.step for s in first + rest] == list(range(30))
    assert [s.counts for s in first + rest] == [s.counts for s in whole]


def test_blocks_are_read_together_and_every_frame_once_a_pass():
    """With block_frames a step reads from few places; the order is a function of seed and cursor, as without."""
    plan = Plan([plan_pool(rows=20_000)], plan_config(block_frames=10), seed=0)
    steps, cursor = run_steps(plan, 40)
    rows = np.concatenate([step.rows for step in steps])
    assert len(np.unique(rows)) == len(rows)
    first = np.sort(rows[:640])  # what 64 blocks hold
    assert np.count_nonzero(np.diff(first) > 1) <= 64
    again, _ = run_steps(plan, 5, Cursor.from_dict(json.loads(json.dumps(cursor.to_dict()))))
    more, _ = run_steps(plan, 45)
    assert [items(s) for s in again] == [items(s) for s in more[40:]]
    whole, _ = run_steps(Plan([plan_pool(rows=700)], plan_config(block_frames=10), seed=0), 40)
    assert set(np.concatenate([step.rows for step in whole])[:700].tolist()) == set(range(700))


def test_a_step_is_a_pure_function_of_the_cursor():
    plan = Plan([plan_pool("a"), plan_pool("b", 1, rows=50)], plan_config(), seed=2)
    _, cursor = run_steps(plan, 7)
    once, after = plan.step(cursor)
    run_steps(plan, 3)
    again, after_again = plan.step(cursor)
    assert items(once) == items(again)
    assert after == after_again


def test_steps_do_not_depend_on_how_far_the_draws_are_looked_ahead():
    pools = [plan_pool("a", weight=40.0), plan_pool("b", 1, rows=70, weight=2.0), plan_pool("c", 2, rows=3, weight=1.0)]
    expected, _ = run_steps(Plan(pools, plan_config(), seed=2), 12)
    for n_draws in (1, 5000, *range(26, 62, 4)):  # a step takes about 45
        plan = Plan(pools, plan_config(), seed=2)
        plan._guess = n_draws
        assert [items(s) for s in run_steps(plan, 12)[0]] == [items(s) for s in expected]


@pytest.mark.parametrize("content", [{}, {"step": 1}, {"step": 1, "streams": [[1]]}, {"step": "x", "streams": []}])
def test_a_damaged_cursor_is_an_input_error(content):
    with pytest.raises(InputError, match="cursor"):
        Cursor.from_dict(content)


def test_a_cursor_of_another_plan_is_refused():
    with pytest.raises(InputError, match="recipe of the checkpoint"):
        Plan([plan_pool()], plan_config(), 0).step(Cursor(3, ((0, 1), (0, 1))))


# Shares


def test_explicit_weights_are_met_at_every_moment():
    weights = [7.0, 2.0, 0.05]
    pools = [
        plan_pool(n, i, rows=r, weight=w) for i, (n, r, w) in enumerate(zip("abc", (900, 40, 11), weights, strict=True))
    ]
    plan = Plan(pools, plan_config(), seed=0)
    drawn = np.concatenate([s.pool for s in run_steps(plan, 80)[0]])
    wanted = np.array(weights) / sum(weights)
    for n in (10, 100, 1000, len(drawn)):
        assert np.abs(np.bincount(drawn[:n], minlength=3) - wanted * n).max() < 1.5  # remainders carry over
    assert np.flatnonzero(drawn == 2)[0] == pytest.approx(0.5 / wanted[2], abs=2)  # half a period in, not a whole one
    assert np.bincount(drawn, minlength=3)[2] >= 10  # the rare one came, though a step holds a fraction of a draw of it


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, [0.9, 0.1]), (2.0, [0.75, 0.25]), (1e6, [0.5, 0.5])])
def test_temperature_decides_the_shares(temperature, expected):
    pools = [plan_pool("a", rows=900), plan_pool("b", 1, rows=100)]
    plan = Plan(pools, plan_config(temperature=temperature), seed=0)
    assert list(plan.shares().values()) == pytest.approx(expected, abs=1e-4)


def test_weights_for_some_pools_only_are_refused():
    with pytest.raises(InputError, match=r"not for b.*temperature"):
        Plan([plan_pool("a", weight=1.0), plan_pool("b", 1)], plan_config(), 0)


# Weights that change with the step


def scheduled():
    """All of a, then one a for three b, then b alone; each with its own properties."""
    pools = [
        plan_pool("a", rows=300, weight={0: 1, 20: 1, 40: 0}),
        plan_pool("b", 1, rows=100, weight={0: 0, 20: 3}, seed=1),
    ]
    return Plan(pools, plan_config(), seed=0)


def test_weights_hold_from_their_step_on():
    plan = scheduled()
    steps, _ = run_steps(plan, 60)
    for first, last, share in ((0, 20, 0.0), (20, 40, 0.75), (40, 60, 1.0)):
        drawn = np.concatenate([step.pool for step in steps[first:last]])
        assert abs((drawn == 1).sum() - share * len(drawn)) < 1.5  # also just behind a change: no debts of before
        assert plan.shares(first)["b"] == pytest.approx(share)


def test_a_stream_goes_on_with_its_order_where_its_weight_changes():
    steps, _ = run_steps(scheduled(), 60)
    for pool, size in ((0, 300), (1, 100)):
        rows = np.concatenate([step.rows[step.pool == pool] for step in steps])
        whole = len(rows) // size * size
        assert whole
        assert all(len(set(part)) == size for part in rows[:whole].reshape(-1, size))  # every frame once in each pass


def test_a_cursor_in_any_phase_goes_on_alike():
    plan = scheduled()
    steps, _ = run_steps(plan, 60)
    for stop in (5, 20, 21, 39, 40, 50):
        _, cursor = run_steps(plan, stop)
        again = Cursor.from_dict(json.loads(json.dumps(cursor.to_dict())))
        rest, _ = run_steps(scheduled(), 60 - stop, again)
        assert [items(step) for step in rest] == [items(step) for step in steps[stop:]]


def test_expected_counts_are_those_of_the_phase():
    plan = scheduled()
    steps, _ = run_steps(plan, 60)
    assert set(plan.expected_counts(5)) == {(0, "energy"), (0, "forces")}
    assert set(plan.expected_counts(50)) == {(1, "energy"), (1, "forces")}
    mean = np.mean([step.counts[1, "energy"] for step in steps[20:40]])
    assert plan.expected_counts(30)[1, "energy"] == pytest.approx(mean, rel=0.1)


def test_a_schedule_is_part_of_the_fingerprint():
    def fingerprint(weight):
        pools = [plan_pool("a", weight=1.0), plan_pool("b", 1, rows=100, weight=weight)]
        return Plan(pools, plan_config(), seed=0).fingerprint

    assert fingerprint({0: 2.0}) == fingerprint(2.0)
    assert len({fingerprint(w) for w in (2.0, {0: 2.0, 10: 1.0}, {0: 2.0, 11: 1.0})}) == 3


def test_steps_without_any_weight_are_refused():
    with pytest.raises(InputError, match="no pool has a weight above 0 from step 30 on"):
        Plan([plan_pool("a", weight={0: 1.0, 30: 0.0})], plan_config(), 0)
    with pytest.raises(ValueError, match=r"a share for step 0 is missing; given for 10"):
        plan_config(pools=[{"fidelity": "a", "weight": {10: 1.0}}])


# A last part on some fidelities alone


def finishing(steps=60, **finish):
    pools = [plan_pool("a", rows=900), plan_pool("b", 1, rows=100), plan_pool("c", 2, rows=300)]
    config = plan_config(
        pools=[{"fidelity": name} for name in "abc"], temperature=2.0, finish={"fidelities": ["b", "c"], **finish}
    )
    return Plan(pools, config, 0, steps)


def test_the_last_part_reads_its_fidelities_alone_at_the_shares_that_they_have():
    plan = finishing()
    before, after = plan.shares(39), plan.shares(40)
    assert before["b"] / before["c"] == pytest.approx(after["b"] / after["c"]) == pytest.approx((1 / 3) ** 0.5)
    assert before["a"] > 0.4
    assert after["a"] == 0
    steps, _ = run_steps(plan, 60)
    assert [0 in step.pool for step in steps] == [True] * 40 + [False] * 20
    assert set(plan.expected_counts(40)) == {(f, prop) for f in (1, 2) for prop in ("energy", "forces")}


def test_the_last_part_is_one_of_the_steps_and_of_the_fingerprint():
    assert finishing(part=0.25).shares(44)["a"] > 0
    assert finishing(part=0.25).shares(45)["a"] == 0
    prints = [finishing(steps, part=part).fingerprint for steps, part in ((60, 0.25), (60, 0.5), (80, 0.25))]
    assert len(set(prints)) == 3


def test_few_frames_make_the_last_part_short():
    plan = finishing(3000, passes=10, part=0.5)
    assert 1500 < plan.finish_start < 3000
    cursor = Cursor(plan.finish_start, plan.start().streams, (0, 0, 0))
    drawn = sum(len(step.rows) for step in run_steps(plan, 3000 - plan.finish_start, cursor)[0])
    assert drawn / 400 == pytest.approx(10, rel=0.1)  # b and c have 400 frames
    assert finishing(3000, passes=1e-6).finish_start == 2999
    assert finishing(1).finish_start == 1, "one step is one of the mixture"
    assert Plan([plan_pool()], plan_config(), 0).finish_start is None


def test_a_last_part_that_cannot_be_is_refused():
    pools = [{"fidelity": "a"}, {"fidelity": "b"}]
    with pytest.raises(ValueError, match=r"finish.fidelities: 'c' has no pool; those of the pools are a, b"):
        plan_config(pools=pools, finish={"fidelities": ["c"]})
    with pytest.raises(ValueError, match=r"finish needs paired: false"):
        plan_config(pools=pools, finish={"fidelities": ["b"]}, paired=True)
    config = plan_config(pools=pools, finish={"fidelities": ["b"]})
    weighted = [plan_pool("a", weight={0: 1, 50: 0}), plan_pool("b", 1, weight={0: 0, 55: 1})]
    with pytest.raises(InputError, match=r"no pool of data.plan.finish has a weight above 0 from step 40 on"):
        Plan(weighted, config, 0, 60)
    with pytest.raises(InputError, match=r"a would begin after step 40, from where on b are read alone"):
        Plan([plan_pool("a", weight={0: 0, 50: 1}), plan_pool("b", 1, weight=1)], config, 0, 60)
    with pytest.raises(InputError, match="needs the number of steps of the run"):
        Plan(weighted, config, 0)
    alone = plan_pool("b", 1)
    with pytest.raises(InputError, match="no frame that is drawn has an edge; give atom_budget"):
        Plan([plan_pool("a"), replace(alone, n_edges=np.zeros_like(alone.n_edges))], config, 0, 60)


# Partition


@pytest.mark.parametrize(("world", "micro"), [(1, 1), (1, 4), (2, 2), (8, 1), (8, 3), (64, 2)])
def test_partition_covers_each_system_once_with_the_same_number_of_microbatches(world, micro):
    plan = Plan([plan_pool()], plan_config(edge_budget=6000), seed=5)
    for step in run_steps(plan, 3)[0]:
        bins = step.partition(world, micro)
        assert len(bins) == world
        assert all(len(of_rank) == micro for of_rank in bins)
        dealt = np.concatenate([b for of_rank in bins for b in of_rank])
        assert np.array_equal(np.sort(dealt), np.arange(len(step)))
        assert all(b.dtype == np.int64 for of_rank in bins for b in of_rank)


def test_ranks_are_level_at_64_frames_each():
    plan = Plan([plan_pool(rows=20_000, edges=1000)], plan_config(edge_budget=8 * 64 * 1200), seed=5)
    step, _ = plan.step(plan.start())
    assert len(step) >= 8 * 64 * 0.9
    loads = np.array([step.n_edges[np.concatenate(b)].sum() for b in step.partition(8, 2)])
    assert loads.max() / loads.mean() - 1 < 0.005


def test_empty_bins_where_there_are_more_bins_than_systems():
    plan = Plan([plan_pool(rows=20)], plan_config(edge_budget=200), seed=5)
    step, _ = plan.step(plan.start())
    assert len(step) < 16
    bins = step.partition(8, 2)
    assert sum(len(b) for r in bins for b in r) == len(step)
    assert max(len(b) for r in bins for b in r) == 1


def test_microbatches_are_constant_and_scale_with_the_ranks():
    plan = Plan([plan_pool(edges=20)], plan_config(edge_budget=1000, edges_per_microbatch=100), seed=0)
    assert [plan.n_microbatches(w) for w in (1, 2, 3, 8, 64)] == [10, 5, 4, 2, 1]
    assert Plan([plan_pool()], plan_config(), 0).n_microbatches(2) == 1


# Counts


def test_counts_are_the_live_components_of_the_step():
    rng = np.random.default_rng(0)
    live = rng.choice(np.array([1, 2, 3, 5, 7], np.uint8), 400)
    pools = [
        plan_pool("a", 0, rows=400, live=live, properties=("energy", "forces", "stress")),
        plan_pool("b", 1, rows=60, live=1, properties=("energy",)),
    ]
    plan = Plan(pools, plan_config(), seed=0)
    for step in run_steps(plan, 5)[0]:
        expected = Counter()
        for row, f, p, n in zip(step.rows, step.fidelity_idx, step.pool, step.n_atoms, strict=True):
            code = int(pools[p].live[row])
            for number, (prop, components) in enumerate((("energy", 1), ("forces", 3 * n), ("stress", 9))):
                if code >> number & 1:
                    expected[int(f), prop] += int(components)
        assert step.counts == dict(expected)


def test_expected_counts_are_the_mean_of_many_steps():
    pools = [plan_pool("a", 0, rows=400, weight=30.0), plan_pool("b", 1, rows=60, live=1, weight=1.0, edges=90)]
    plan = Plan(pools, plan_config(), seed=0)
    steps, _ = run_steps(plan, 800)
    for key, expected in plan.expected_counts(0).items():
        mean = np.mean([s.counts.get(key, 0) for s in steps])
        assert expected == pytest.approx(mean, rel=0.02)
    assert set(plan.expected_counts(0)) == {(0, "energy"), (0, "forces"), (1, "energy")}


# Paired


def paired_plan(**changes):
    both = np.arange(0, 300, 3)  # frames 0, 3, 6 … at both fidelities
    pools = [plan_pool("lf", 0, rows=300), plan_pool("hf", 1, rows=both)]
    hf_edges = pools[0].n_edges[both]
    pools[1] = Pool("hf", "hf", 1, both, pools[0].n_atoms[both], hf_edges, np.full(100, 1, np.uint8), ("energy",))
    return Plan(pools, plan_config(paired=True, **changes), seed=3)


def test_paired_draws_a_frame_at_all_its_fidelities_together():
    plan = paired_plan()
    assert plan.shares() == pytest.approx({"lf+hf": 1 / 3, "lf": 2 / 3})  # proportional: every frame equally often
    steps, _ = run_steps(plan, 60)
    for step in steps:
        drawn = items(step)
        assert step.n_edges.sum() <= 3000
        for k, (row, pool) in enumerate(drawn):
            if row % 3 == 0:
                partner = drawn[k + 1] if pool == 0 else drawn[k - 1]
                assert partner == (row, 1 - pool)
    drawn = [i for s in steps for i in items(s)]
    lf = [row for row, pool in drawn if pool == 0]
    assert len(set(lf[:290])) > 280  # a pass of either stream has no repetition; the streams end within a draw
    assert steps[0].counts[1, "energy"] == sum(1 for _, pool in items(steps[0]) if pool == 1)


def test_paired_resume():
    whole, _ = run_steps(paired_plan(), 20)
    _, cursor = run_steps(paired_plan(), 8)
    rest, _ = run_steps(paired_plan(), 12, Cursor.from_dict(json.loads(json.dumps(cursor.to_dict()))))
    assert [items(s) for s in whole[8:]] == [items(s) for s in rest]


# Oversize


def with_a_giant():
    pool = plan_pool("a", rows=100)
    pool.n_edges[:] = 100
    pool.n_edges[42] = 5000
    return pool


def test_oversize_error_names_row_size_budget_and_remedy():
    with pytest.raises(InputError, match=r"row 42 has 5000 edges.*edge_budget = 3000.*1 of 100.*5000.*single or skip"):
        Plan([with_a_giant()], plan_config(oversize="error"), 0)


def test_oversize_skip_leaves_the_frame_out_and_counts_it():
    plan = Plan([with_a_giant()], plan_config(oversize="skip"), 0)
    assert plan.oversize == {"a": 1}
    drawn = np.concatenate([s.rows for s in run_steps(plan, 10)[0]])
    assert 42 not in drawn
    assert np.array_equal(np.sort(drawn[:99]), np.delete(np.arange(100), 42))


def test_oversize_single_gives_the_frame_a_step_of_its_own():
    plan = Plan([with_a_giant()], plan_config(oversize="single"), 0)
    assert plan.oversize == {"a": 1}
    steps, _ = run_steps(plan, 40)
    with_it = [s for s in steps if 42 in s.rows]
    assert with_it
    assert all(len(s) == 1 for s in with_it)
    drawn = np.concatenate([s.rows for s in steps])
    assert np.array_equal(np.sort(drawn[:100]), np.arange(100))  # still without replacement


def test_oversize_counts_frames_that_do_not_fit_a_microbatch():
    with pytest.raises(InputError, match="edges_per_microbatch = 2000"):
        Plan([with_a_giant()], plan_config(edge_budget=9000, edges_per_microbatch=2000, oversize="error"), 0)
    plan = Plan([with_a_giant()], plan_config(edge_budget=9000, edges_per_microbatch=2000, oversize="skip"), 0)
    assert plan.oversize == {"a": 1}


def test_a_pool_that_skip_empties_is_an_error():
    with pytest.raises(InputError, match=r"all 100 frames.*edge_budget"):
        Plan([with_a_giant()], plan_config(edge_budget=10), 0)


def test_a_batch_without_any_limit_is_an_error():
    pool = plan_pool("a", rows=10)
    pool.n_edges[:] = 0
    with pytest.raises(InputError, match="atom_budget"):
        Plan([pool], plan_config(), 0)
    step, _ = Plan([pool], plan_config(atom_budget=30), 0).step(Plan([pool], plan_config(atom_budget=30), 0).start())
    assert step.n_atoms.sum() <= 30


# Fingerprint


def test_fingerprint_covers_what_the_order_depends_on():
    def fingerprint(pool=None, seed=0, **changes):
        return Plan([pool or plan_pool()], plan_config(**changes), seed).fingerprint

    base = fingerprint()
    assert base == fingerprint()
    assert base == fingerprint(edges_per_microbatch=2500)  # partition, not order
    other_edges = plan_pool()
    other_edges.n_edges[3] += 1
    other_label = plan_pool()
    other_label.live[3] = 1
    others = [
        fingerprint(seed=1),
        fingerprint(edge_budget=2999),
        fingerprint(atom_budget=500),
        fingerprint(paired=True),
        fingerprint(block_frames=4),
        fingerprint(plan_pool(rows=np.arange(1, 1001))),
        fingerprint(plan_pool("b")),
        fingerprint(other_edges),
        fingerprint(other_label),
    ]
    assert len({base, *others}) == 1 + len(others)


# Pools


class ArrayStore:
    """The columns of a store that pools are made of."""

    def __init__(self, n=400, seed=0):
        rng = np.random.default_rng(seed)
        self.path = "arrays"
        self.n_frames = n
        self.fidelities = FidelityTable([Fidelity("pbe", "PBE"), Fidelity("cc", "CCSD(T)")])
        self.split_names = ("train", "val")
        self.split = (rng.random(n) < 0.2).astype(np.uint8)
        self.n_atoms = rng.integers(1, 30, n).astype(np.int32)
        self.frame_hash = rng.integers(0, 2**63, (n, 2)).astype(np.uint64)
        self._edges = self.n_atoms * 20
        self._has = {
            ("pbe", "energy"): np.ones(n, bool),
            ("pbe", "forces"): rng.random(n) < 0.7,
            ("cc", "energy"): rng.random(n) < 0.3,
        }

    def n_edges(self, cutoff):
        return self._edges

    def has(self, fidelity, prop):
        return self._has.get((fidelity, prop), np.zeros(self.n_frames, bool))

    def rows(self, **conditions):
        return np.flatnonzero(self.mask(**conditions))

    def mask(self, split=None, source=None, fidelity=None, prop=None):
        if split not in self.split_names:
            raise InputError(f"no split {split!r}; splits: train, val")
        if source not in (None, "s"):
            raise InputError(f"no source {source!r}; sources: s")
        return (self.split == self.split_names.index(split)) & self.has(fidelity, prop)

    def label_counts(self, split=None):
        return {"pbe": {"energy": 1}}

    def composition(self, rows):
        """Hydrogen in all, one of 12 other elements in each: the last in one frame of 40 only."""
        counts = np.zeros((len(rows), N_ELEMENTS + 1), int)
        counts[:, 1] = 2
        counts[np.arange(len(rows)), np.where(np.asarray(rows) % 40 == 0, 13, 2 + np.asarray(rows) % 11)] = 1
        return counts


def pools_of(*entries, store=None):
    config = PlanConfig(pools=list(entries), edge_budget=10_000)
    fidelities = FidelityTable([Fidelity(n, n) for n in dict.fromkeys(e["fidelity"] for e in entries)])
    return build_pools(store or ArrayStore(), config, fidelities, 5.0)


def test_pools_hold_rows_with_a_live_label_of_a_property_asked_for():
    store = ArrayStore()
    forces, cc = pools_of(
        {"fidelity": "pbe", "properties": ["forces"]},
        {"fidelity": "cc", "properties": ["energy", "stress"]},
        store=store,
    )
    train = store.split == 0
    assert np.array_equal(forces.rows, np.flatnonzero(train & store.has("pbe", "forces")))
    assert np.array_equal(cc.rows, np.flatnonzero(train & store.has("cc", "energy")))
    assert np.array_equal(cc.n_edges, store.n_edges(5.0)[cc.rows])
    assert (forces.fidelity_idx, cc.fidelity_idx) == (0, 1)
    assert cc.label_counts == {"energy": len(cc), "stress": 0}


def test_max_frames_is_nested_and_the_same_for_all_fidelities_with_a_seed():
    def chosen(n, seed=0, **entry):
        return set(pools_of({"fidelity": "pbe", "max_frames": n, "seed": seed, **entry})[0].rows.tolist())

    sizes = [5, 20, 100]
    sets = [chosen(n) for n in sizes]
    assert [len(s) for s in sets] == sizes
    assert sets[0] < sets[1] < sets[2]
    assert chosen(20) != chosen(20, seed=1)
    assert sets[1] != set(sorted(chosen(10_000))[:20])  # not simply the first rows
    full = chosen(10_000)
    assert len(full) == int((ArrayStore().split == 0).sum())
    store = ArrayStore()
    store._has["cc", "energy"][:] = True
    pbe, cc = pools_of({"fidelity": "pbe", "max_frames": 30}, {"fidelity": "cc", "max_frames": 30}, store=store)
    assert np.array_equal(pbe.rows, cc.rows)


def test_elements_first_knows_every_element_with_few_frames(monkeypatch):
    monkeypatch.setattr(pools_module, "_CHUNK", 7)
    store = ArrayStore()

    def chosen(n, first=True, seed=0):
        (pool,) = pools_of({"fidelity": "pbe", "max_frames": n, "elements_first": first, "seed": seed}, store=store)
        return pool.rows

    def n_elements(rows):
        return int((store.composition(rows).sum(0) > 0).sum())

    for seed in range(3):
        assert n_elements(chosen(12, seed=seed)) == 13, "12 elements beside hydrogen, a frame each"
        assert set(chosen(5, seed=seed)) < set(chosen(12, seed=seed)) < set(chosen(50, seed=seed))
    assert n_elements(chosen(12, first=False)) < 13
    by_hash = chosen(40, first=False)
    assert len(set(by_hash) & set(chosen(52))) == 40, "the rest is that of the hash"
    everything = chosen(10_000)
    assert np.array_equal(everything, chosen(10_000, first=False))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"fidelity": "b3lyp"}, r"pools\.0\.fidelity: 'b3lyp'.*cc, pbe"),
        ({"fidelity": "pbe", "split": "ood"}, r"pools\.0.*'ood'.*train, val"),
        ({"fidelity": "pbe", "source": "omat"}, r"pools\.0.*'omat'.*sources: s"),
        ({"fidelity": "pbe", "properties": ["stress"]}, r"pools\.0: no frame.*'pbe'.*stress.*energy 1.*change"),
    ],
)
def test_bad_pools_are_input_errors_that_list_what_exists(entry, message):
    with pytest.raises(InputError, match=message):
        pools_of(entry)


def test_the_same_label_in_two_pools_is_refused_but_not_two_properties_of_a_frame():
    with pytest.raises(InputError, match=r"energy.*fidelity 'pbe'.*frames are in both"):
        pools_of({"fidelity": "pbe"}, {"fidelity": "pbe", "properties": ["energy"], "max_frames": 10})
    energies, forces = pools_of(
        {"fidelity": "pbe", "properties": ["energy"]}, {"fidelity": "pbe", "properties": ["forces"], "max_frames": 10}
    )
    assert set(forces.rows) < set(energies.rows)
    assert energies.name != forces.name


def test_plan_of_world_1_2_8_reads_the_same_systems():
    plan = Plan(pools_of({"fidelity": "pbe"}, {"fidelity": "cc", "properties": ["energy"]}), plan_config(), seed=0)
    for step in run_steps(plan, 4)[0]:
        everything = items(step)
        for world in (1, 2, 8):
            bins = step.partition(world, plan.n_microbatches(world))
            read = [everything[k] for of_rank in bins for microbatch in of_rank for k in microbatch]
            assert Counter(read) == Counter(everything)
