"""Keyed permutations of 0..n-1, computed place by place, so that shuffling 1e8 frames takes neither memory nor time."""

import math

import numpy as np

SMALL = 1024  # up to here places are sorted by hash: 0.1 ms, and every order is as likely, which few rounds do not give
WINDOW_BLOCKS = 64  # blocks among whose places `permute_near` mixes
N_ROUNDS = 8  # four make a Feistel network pseudo-random for large n (Luby and Rackoff); the rest is margin
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_WHERE_RUNS_BEGIN = 0xD1B54A32D192ED03  # keeps this draw apart from the others of the same key


def mix(x: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each entry (the finaliser of splitmix64). ``x``: uint64 array, not a scalar."""
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(places: np.ndarray, size: int, key: np.ndarray) -> np.ndarray:
    """Return what stands at ``places`` of a permutation of 0..size-1 that ``key`` chooses.

    Up to ``SMALL`` the places are sorted by a hash. Beyond, a Feistel network runs over pairs (l, r) with l < a, r < b
    and a·b just above ``size``; the few results beyond the end walk on along their cycle
    (Black and Rogaway, CT-RSA 2002).

    Args:
        places: [n] int64, each in 0..size-1.
        size: length of the permutation.
        key: [n] uint64, one key per place, so that a draw may run across passes.

    Returns:
        [n] int64.
    """
    assert places.size == 0 or (int(places.min()) >= 0 and int(places.max()) < size)
    if size <= SMALL:
        keys, which = np.unique(key, return_inverse=True)
        orders = np.argsort(mix(mix(keys)[:, None] + np.arange(size, dtype=np.uint64)), axis=1, kind="stable")
        return orders[which, places]
    a = np.uint64(math.isqrt(size - 1) + 1)
    b = np.uint64(-(-size // int(a)))
    result = places.astype(np.uint64)
    pending = np.arange(len(places))
    while len(pending):
        left, right = np.divmod(result[pending], b)
        keys = key[pending]
        for number in range(N_ROUNDS):
            keys = mix(keys)
            if number % 2 == 0:
                left = (left + mix(right ^ keys) % a) % a
            else:
                right = (right + mix(left ^ keys) % b) % b
        result[pending] = left * b + right
        pending = pending[result[pending] >= size]
    return result.astype(np.int64)


def permute_near(places: np.ndarray, size: int, key: np.ndarray, block: int) -> np.ndarray:
    """Return what stands at ``places`` of a permutation of 0..size-1 that keeps neighbors together.

    Runs of ``block`` neighbors are shuffled as wholes; the entries of ``WINDOW_BLOCKS`` runs that then follow each
    other are mixed. So whoever walks along reads from ``WINDOW_BLOCKS`` stretches at a time. Where the runs begin is
    drawn too (they wrap around the end), so that every entry is as likely as any other at every place.

    Args:
        places, size, key: as of ``permute``.
        block: length of a run.

    Returns:
        [n] int64.
    """
    window = block * WINDOW_BLOCKS
    if size <= window:
        return permute(places, size, key)
    number = places // window
    inside = places - number * window
    window_key = mix(mix(key) + number.astype(np.uint64))
    slot = np.empty_like(places)
    last = number == size // window  # the last window is shorter
    for which, length in ((~last, window), (last, size % window)):
        slot[which] = number[which] * window + permute(inside[which], length, window_key[which])
    n_whole = size // block
    run = slot // block
    whole = run < n_whole  # what remains behind the whole runs stays at the end
    run[whole] = permute(run[whole], n_whole, mix(key[whole] ^ _GOLDEN))
    offset = (mix(key ^ np.uint64(_WHERE_RUNS_BEGIN)) % np.uint64(size)).astype(np.int64)
    return (run * block + slot % block + offset) % size
