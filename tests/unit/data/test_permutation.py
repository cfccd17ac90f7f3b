"""Permutations that are computed place by place."""

import numpy as np
import pytest

from mffm.data.permutation import SMALL, WINDOW_BLOCKS, mix, permute, permute_near


def key(n: int, seed: int = 0) -> np.ndarray:
    return np.repeat(mix(np.array([seed], np.uint64)), n)


@pytest.mark.parametrize("block", [1, 7, 40])
@pytest.mark.parametrize("size", [5, 64, SMALL + 1, 7 * 64, 7 * 64 + 1, 9000])
def test_near_order_is_a_permutation(size, block):
    for seed in range(3):
        found = permute_near(np.arange(size), size, key(size, seed), block)
        assert np.array_equal(np.sort(found), np.arange(size))


def test_near_order_does_not_depend_on_what_is_asked_with_it():
    size, block = 10_000, 16
    whole = permute_near(np.arange(size), size, key(size), block)
    some = np.random.default_rng(0).permutation(size)[:500]
    assert np.array_equal(permute_near(some, size, key(500), block), whole[some])
    assert np.array_equal(permute_near(some[:1], size, key(1), block), whole[some[:1]])


def test_near_order_reads_from_few_stretches_at_a_time():
    """A window's draws lie in 64 runs (65 where one wraps around); in any order they lie in nearly all blocks."""
    size, block = 200_000, 100
    window = block * WINDOW_BLOCKS
    near = permute_near(np.arange(size), size, key(size), block)
    free = permute(np.arange(size), size, key(size))
    for first in (0, 3 * window):
        units = np.sort(near[first : first + window])
        stretches = 1 + np.count_nonzero(np.diff(units) > 1)
        assert stretches <= WINDOW_BLOCKS + 1
        assert len(np.unique(free[first : first + window] // block)) > 0.9 * size / block
    # a batch of 600 is of most runs of its window, not of one
    batch = near[:600]
    assert len(np.unique(batch // block)) > WINDOW_BLOCKS - 5


def test_near_order_favours_no_entry():
    """Over 4000 passes every entry is in the first fifth as often as any other, within 5 standard deviations."""
    size, block, passes = 1000, 3, 4000
    first = np.arange(size // 5)
    counts = np.zeros(size)
    for seed in range(passes):
        counts[permute_near(first, size, key(len(first), seed), block)] += 1
    expected = passes / 5
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * 0.8)
