"""Harmonics and couplings against integrals and rotations."""

import numpy as np
import pytest
import torch

from mffm.models.angular import Constant, coupling, harmonics, natural_paths, spherical_harmonics

LMAX = 4


def unit_vectors(n: int, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(n, 3))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def wigner(degree: int, q: np.ndarray) -> np.ndarray:
    """Return D with Y_l(q r) = D Y_l(r), from a fit over points."""
    points = unit_vectors(60)
    columns = slice(degree**2, (degree + 1) ** 2)
    before, after = harmonics(LMAX, points)[:, columns], harmonics(LMAX, points @ q.T)[:, columns]
    return np.linalg.lstsq(before, after, rcond=None)[0].T


def test_torch_equals_numpy() -> None:
    points = unit_vectors(20)
    found = torch.cat(spherical_harmonics(torch.tensor(points), LMAX), dim=1)
    np.testing.assert_allclose(found.numpy(), harmonics(LMAX, points), atol=1e-12)
    np.testing.assert_allclose(found[:, 1:4].numpy(), np.sqrt(3) * points, atol=1e-14)


def test_orthonormal_over_the_sphere() -> None:
    z, weights = np.polynomial.legendre.leggauss(LMAX + 1)
    phi = 2 * np.pi * np.arange(2 * LMAX + 1) / (2 * LMAX + 1)
    s = np.sqrt(1 - z**2)[:, None]
    points = np.stack([s * np.cos(phi), s * np.sin(phi), z[:, None] + 0 * phi], -1).reshape(-1, 3)
    y = harmonics(LMAX, points)
    gram = (y * np.repeat(weights, len(phi))[:, None] / (2 * len(phi))).T @ y
    np.testing.assert_allclose(gram, np.eye((LMAX + 1) ** 2), atol=1e-12)


@pytest.mark.parametrize("determinant", [1, -1])
def test_couplings_are_equivariant(determinant: int) -> None:
    q = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
    q *= np.linalg.det(q) * determinant
    d = [wigner(degree, q) for degree in range(LMAX + 1)]
    assert np.allclose(d[1], q)
    for l3, pairs in enumerate(natural_paths(LMAX, LMAX, LMAX)):
        assert pairs
        for l1, l2 in pairs:
            c = coupling(l1, l2, l3)
            np.testing.assert_allclose(np.einsum("abc,ia,jb,kc->ijk", c, d[l1], d[l2], d[l3]), c, atol=1e-10)
            np.testing.assert_allclose((c**2).sum((0, 1)), 1.0, atol=1e-10)


def test_vector_couplings_are_dot_and_traceless_product() -> None:
    np.testing.assert_allclose(coupling(1, 1, 0)[..., 0], np.eye(3) / np.sqrt(3), atol=1e-12)
    assert (1, 1) not in natural_paths(1, 1, 1)[1]  # the cross product has the wrong parity


def test_constants_survive_casts() -> None:
    third = Constant(np.array([1 / 3]))
    assert third.like(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert float(third.like(torch.zeros(1, dtype=torch.float64))) == 1 / 3
    with torch.inference_mode():
        fresh = Constant(np.array([0.5])).like(torch.zeros(1))
    assert not fresh.is_inference()
