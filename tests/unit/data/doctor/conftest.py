"""Sets without a fault, to plant one into, and a doctor for them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mffm.data.doctor import Diagnosis, examine

Frames = list[dict[str, Any]]


REST = np.array([[0.0, 0, 0], [1.1, 0, 0], [-0.4, 1.0, 0], [-0.4, -0.5, 0.9], [-0.4, -0.5, -0.9]])
STIFFNESS = 8.0  # eV/Å², of a spring between each two atoms


def methane(rng: np.random.Generator) -> dict[str, Any]:
    """Return a molecule of springs: energy and forces are those of its distances, as of a real one."""
    i, j = np.triu_indices(5, 1)
    positions = REST + rng.normal(0, 0.05, (5, 3))
    vectors = positions[j] - positions[i]
    distance = np.linalg.norm(vectors, axis=1)
    stretch = distance - np.linalg.norm(REST[j] - REST[i], axis=1)
    pull = STIFFNESS * (stretch / distance)[:, None] * vectors
    forces = np.zeros((5, 3))
    np.add.at(forces, i, pull)
    np.add.at(forces, j, -pull)
    energy = -1101.0 + 0.5 * STIFFNESS * (stretch**2).sum()
    return {"numbers": np.array([6, 1, 1, 1, 1]), "positions": positions, "energy": energy, "forces": forces}


def balanced(frame: dict[str, Any], stiffness: float) -> dict[str, Any]:
    """Return a harmonic frame whose forces sum to 0: its energy without that of the mean displacement."""
    mean = frame["forces"].mean(0)
    lost = 0.5 * len(frame["numbers"]) * float(mean @ mean) / stiffness
    return frame | {"forces": frame["forces"] - mean, "energy": frame["energy"] - lost}


@pytest.fixture
def molecules() -> Frames:
    rng = np.random.default_rng(0)
    return [methane(rng) for _ in range(60)]


@pytest.fixture
def crystals(structures) -> Frames:
    scales = np.linspace(0.92, 1.08, 20)
    return [balanced(structures.crystal(0.04, scale), structures.stiffness) for scale in scales]


@pytest.fixture
def turned() -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Return a function: a frame → the same structure rotated, moved, and with its atoms in the opposite order."""
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_euler("xyz", [20, 50, 110], degrees=True).as_matrix()

    def turn_frame(frame: dict[str, Any]) -> dict[str, Any]:
        result = frame | {"numbers": frame["numbers"][::-1]}
        result["positions"] = (frame["positions"] @ turn + [0.3, -1.2, 2.0])[::-1]
        result["forces"] = (frame["forces"] @ turn)[::-1]
        if "cell" in frame:
            result["cell"] = frame["cell"] @ turn
            result["stress"] = turn.T @ frame["stress"] @ turn
        return result

    return turn_frame


@pytest.fixture
def diagnose(write_frames) -> Callable[..., Diagnosis]:
    """Return a function: sets of frames, each a file, → what the doctor says."""

    def run(*sets: Frames, **options: Any) -> Diagnosis:
        paths = [write_frames(f"set{i}.extxyz", frames) for i, frames in enumerate(sets)]
        return examine(paths, **options)

    return run


@pytest.fixture
def found(diagnose) -> Callable[..., dict[str, str]]:
    """Return a function: sets of frames → check → severity of what the doctor finds."""

    def run(*sets: Frames, **options: Any) -> dict[str, str]:
        return {f.check: f.severity for f in diagnose(*sets, **options).findings}

    return run
