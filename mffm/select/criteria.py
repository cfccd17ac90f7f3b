"""What a greedy choice looks for, on features [n, d] of candidates: every pick is O(n d).

    random        a drawn order
    fps           farthest point: the largest distance to what is labelled or chosen
    lcmd          largest cluster, maximum distance (Holzmueller et al., arXiv:2203.09410): in the cluster around a
                  labelled or chosen point with the largest sum of squared distances, the point farthest from its centre
    maxdet        D-optimality: the largest gain log(1 + fᵀA⁻¹f) of log det A, A = Σ f fᵀ over labelled and chosen + λ 1
    weighted      farthest point, squared distances times squared weights (σ, a difference of two levels)

Without anything labelled the first pick is the point farthest from the mean; of ``weighted`` the largest weight.
"""

from typing import Protocol

import numpy as np

BLOCK = 1 << 13  # rows of a block; 8 MB of float64 at 128 features
RELATIVE_RIDGE = 1e-6  # λ over the mean square of a feature


class Criterion(Protocol):
    """What ``greedy`` asks."""

    def gains(self, allowed: np.ndarray) -> np.ndarray:
        """Return what each candidate would gain now. [n], not negative; where ``allowed`` [n] is False, anything.

        What is not to be chosen by its own gain in this pick may be -inf.
        """
        ...

    def add(self, chosen: int) -> None:
        """Take note of a pick."""
        ...


class Random:
    """A drawn order; gains fall from 1 to 0 along it."""

    def __init__(self, n: int, seed: int):
        self._gains = np.empty(n)
        self._gains[np.random.default_rng(seed).permutation(n)] = np.linspace(1.0, 0.0, n)

    def gains(self, allowed: np.ndarray) -> np.ndarray:
        del allowed
        return self._gains

    def add(self, chosen: int) -> None:
        del chosen


class Distances:
    """Farthest point; the base of what counts distances.

    Args:
        x: [n, d] candidates.
        labelled: [m, d]; m may be 0.

    Attributes:
        squared: [n] squared distance to the nearest labelled or chosen point; inf where there is none.
        nearest: [n] which one: index in ``labelled``, from m on the picks in their order; -1 where there is none.
    """

    def __init__(self, x: np.ndarray, labelled: np.ndarray):
        self.x = x
        self._norms = np.einsum("ij,ij->i", x, x)
        self.squared, self.nearest = nearest(x, labelled)
        self._n_centres = len(labelled)

    def gains(self, allowed: np.ndarray) -> np.ndarray:
        del allowed
        return self.squared if self._n_centres else self._norms

    def add(self, chosen: int) -> None:
        squared = self._norms + self._norms[chosen] - 2 * (self.x @ self.x[chosen])
        np.maximum(squared, 0, out=squared)
        squared[chosen] = 0  # rounding leaves something
        nearer = squared < self.squared
        self.squared[nearer] = squared[nearer]
        self.nearest[nearer] = self._n_centres
        self._n_centres += 1


class LargestCluster(Distances):
    """LCMD."""

    def gains(self, allowed: np.ndarray) -> np.ndarray:
        if not self._n_centres:
            return self._norms
        weights = np.bincount(self.nearest[allowed], self.squared[allowed], self._n_centres)
        counts = np.bincount(self.nearest[allowed], minlength=self._n_centres)
        largest = int(np.argmax(np.where(counts > 0, weights, -1.0)))
        return np.where(self.nearest == largest, self.squared, -np.inf)


class Weighted(Distances):
    """Farthest point with weights [n], not negative."""

    def __init__(self, x: np.ndarray, labelled: np.ndarray, weights: np.ndarray):
        super().__init__(x, labelled)
        self._weights = np.square(weights)

    def gains(self, allowed: np.ndarray) -> np.ndarray:
        del allowed
        return self._weights * self.squared if self._n_centres else self._weights


class MaxDet:
    """D-optimality of rows [x, 1], in float64 by rank-one updates.

    The first picks take gains of 1/λ out of numbers of order 1 (errors of 1e-5 at λ = 1e-6): all is computed anew
    after as many picks as there are features, which is O(n d) a pick too. The rows are kept in float64, 1 GB for a
    million of 128: casting them block by block took six times as long a pick.

    Attributes:
        ridge: λ, ``RELATIVE_RIDGE`` times the mean square of a feature of a candidate.
        variances: [n] fᵀA⁻¹f.
    """

    def __init__(self, x: np.ndarray, labelled: np.ndarray):
        self._rows = np.concatenate([x.astype(np.float64), np.ones((len(x), 1))], 1)
        width = x.shape[1] + 1
        self.ridge = RELATIVE_RIDGE * (float(np.mean(np.square(x, dtype=np.float64))) * (width - 1) + 1) / width
        self._matrix = self.ridge * np.eye(width)
        for first in range(0, len(labelled), BLOCK):
            part = labelled[first : first + BLOCK].astype(np.float64)
            rows = np.concatenate([part, np.ones((len(part), 1))], 1)
            self._matrix += rows.T @ rows
        self._n_updates = 0
        self._compute()

    def gains(self, allowed: np.ndarray) -> np.ndarray:
        del allowed
        return np.log1p(np.maximum(self.variances, 0))

    def add(self, chosen: int) -> None:
        row = self._rows[chosen]
        self._matrix += np.outer(row, row)
        self._n_updates += 1
        if self._n_updates % len(row) == 0:
            self._compute()
            return
        solved = self._inverse @ row
        denominator = 1 + float(row @ solved)
        self.variances -= np.square(self._rows @ solved) / denominator
        self._inverse -= np.outer(solved, solved) / denominator

    def _compute(self) -> None:
        self._inverse = np.linalg.inv(self._matrix)
        blocks = (self._rows[first : first + BLOCK] for first in range(0, len(self._rows), BLOCK))
        self.variances = np.concatenate([np.einsum("ij,ij->i", f @ self._inverse, f) for f in blocks])


def nearest(x: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row of x [n, d] the squared distance to the nearest of ``centres`` [m, d], and which one it is.

    Blocked, so that no [n, m] array is made. (inf, -1) where there are no centres.
    """
    squared, index = np.full(len(x), np.inf), np.full(len(x), -1, np.int64)
    own, others = (np.einsum("ij,ij->i", values, values) for values in (x, centres))
    for first in range(0, len(x), BLOCK):
        rows = slice(first, first + BLOCK)
        for start in range(0, len(centres), BLOCK):
            columns = slice(start, start + BLOCK)
            found = own[rows, None] + others[columns] - 2 * (x[rows] @ centres[columns].T)
            at = found.argmin(1)
            least = np.maximum(found[np.arange(len(found)), at], 0)
            nearer = least < squared[rows]
            squared[rows] = np.where(nearer, least, squared[rows])
            index[rows] = np.where(nearer, at + start, index[rows])
    return squared, index
