"""Real spherical harmonics as polynomials of the unit vector, and the coupling of their products by quadrature.

Harmonics are component-normalised (the mean square of each over the sphere is 1). Degree 1 is ordered (x, y, z): a
degree-1 feature is a Cartesian vector; the other degrees run from m = -l to l. Only couplings of natural parity
(l1 + l2 + l3 even) are used: with features of parity (-1)^l they are all that is equivariant under reflections, and
they are proportional to the integral of three harmonics, so no complex Clebsch-Gordan coefficient is needed.
"""

from functools import cache
from math import factorial, sqrt

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Constant:
    """Fixed numbers that neither a state dict nor a cast touches (a bf16 engine also casts buffers): kept in float64.

    ``like(t)`` returns a copy in the dtype and on the device of ``t``; copies are cached. Integers keep their dtype.
    """

    def __init__(self, array: np.ndarray | Tensor):
        with _disable_current_modes():  # one made while a step is traced holds numbers all the same
            self._master = torch.as_tensor(array)
        self._copies: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(self, tensor: Tensor) -> Tensor:
        dtype = tensor.dtype if self._master.is_floating_point() else self._master.dtype
        key = (dtype, tensor.device)
        if key not in self._copies:
            with torch.inference_mode(False), _disable_current_modes():
                self._copies[key] = self._master.to(device=tensor.device, dtype=dtype)
        return self._copies[key]


def natural_paths(l_first: int, l_second: int, l_out: int, symmetric: bool = False) -> list[list[tuple[int, int]]]:
    """Return for each output degree l3 ≤ ``l_out`` the pairs (l1, l2) that couple to it with l1 + l2 + l3 even.

    Args:
        symmetric: the two factors are the same tensor, so (l1, l2) and (l2, l1) are one path.
    """
    return [
        [
            (l1, l2)
            for l1 in range(l_first + 1)
            for l2 in range(l_second + 1)
            if abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == 0 and (l1 <= l2 or not symmetric)
        ]
        for l3 in range(l_out + 1)
    ]


def harmonics(lmax: int, unit: np.ndarray) -> np.ndarray:
    """Return the harmonics of unit vectors [P, 3] as float64 [P, (lmax + 1)^2], by the Legendre recursion."""
    x, y, z = unit.T
    powers = [(x + 1j * y) ** m for m in range(lmax + 1)]
    columns = []
    legendre: dict[tuple[int, int], np.ndarray] = {}
    for degree in range(lmax + 1):
        by_order = {}
        for m in range(degree + 1):
            if m == degree:
                p = np.full_like(z, float(np.prod(np.arange(1, 2 * m, 2))))
            elif m == degree - 1:
                p = (2 * m + 1) * z * legendre[m, m]
            else:
                p = (2 * degree - 1) * z * legendre[degree - 1, m] - (degree + m - 1) * legendre[degree - 2, m]
                p = p / (degree - m)
            legendre[degree, m] = p
            norm = sqrt((2 * degree + 1) * (1 if m == 0 else 2) * factorial(degree - m) / factorial(degree + m))
            by_order[m], by_order[-m] = norm * p * powers[m].real, norm * p * powers[m].imag
            if m == 0:
                by_order[0] = norm * p
        order = (1, -1, 0) if degree == 1 else range(-degree, degree + 1)
        columns += [by_order[m] for m in order]
    return np.stack(columns, axis=1)


@cache
def coupling(l1: int, l2: int, l3: int) -> np.ndarray:
    """Return the coupling [2 l1 + 1, 2 l2 + 1, 2 l3 + 1] of a natural-parity path.

    It is normalised so that the squares over (m1, m2) sum to 1 for each m3: unit-variance factors give a unit-variance
    product. The integral of three harmonics is exact on a Gauss-Legendre × uniform grid of sufficient order.
    """
    assert (l1 + l2 + l3) % 2 == 0, (l1, l2, l3)
    assert abs(l1 - l2) <= l3 <= l1 + l2, (l1, l2, l3)
    degree = l1 + l2 + l3
    z, weights = np.polynomial.legendre.leggauss(degree // 2 + 1)
    phi = 2 * np.pi * np.arange(degree + 1) / (degree + 1)
    planar = np.sqrt(1 - z**2)[:, None]
    points = [planar * np.cos(phi), planar * np.sin(phi), np.broadcast_to(z[:, None], (len(z), len(phi)))]
    values = harmonics(max(l1, l2, l3), np.stack(points, axis=-1).reshape(-1, 3))
    a, b, c = (values[:, n * n : (n + 1) ** 2] for n in (l1, l2, l3))
    weight = np.repeat(weights, len(phi)) / (2 * len(phi))
    integral = np.einsum("p,pa,pb,pc->abc", weight, a, b, c)
    integral[np.abs(integral) < 1e-12] = 0.0
    return integral / sqrt((integral**2).sum() / (2 * l3 + 1))


@cache
def _raising(degree: int) -> Constant:
    """Return the matrix [(2l + 1) * 3, 2l + 3] that takes Y_l ⊗ Y_1 to Y_{l+1}, l = ``degree``."""
    matrix = coupling(degree, 1, degree + 1).reshape(-1, 2 * degree + 3)
    point = harmonics(degree + 1, np.array([[0.48, 0.6, 0.64]]))
    product = np.einsum("pa,pb->pab", point[:, degree**2 : (degree + 1) ** 2], point[:, 1:4]).reshape(1, -1) @ matrix
    target = point[:, (degree + 1) ** 2 :]
    return Constant(matrix * float((product * target).sum() / (product**2).sum()))


def spherical_harmonics(unit: Tensor, lmax: int) -> list[Tensor]:
    """Return the harmonics of unit vectors [E, 3]: for each l ≤ ``lmax`` a tensor [E, 2l + 1].

    Every degree is a polynomial of the unit vector, so there is no pole and no gauge.
    """
    out = [torch.ones_like(unit[:, :1])]
    if lmax > 0:
        out.append(unit * sqrt(3.0))
    for degree in range(1, lmax):
        outer = (out[degree].unsqueeze(-1) * out[1].unsqueeze(-2)).flatten(1)
        out.append(outer @ _raising(degree).like(unit))
    return out
