"""Small data sets written as extxyz, and a data YAML for them."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mffm.config.data import DataConfig

SYMBOLS = {1: "H", 6: "C", 8: "O", 14: "Si"}
BOX = np.array([[5.2, 0.0, 0.0], [0.4, 5.0, 0.0], [0.1, -0.3, 5.4]])
SITES = np.array([[0.1, 0.1, 0.1], [0.6, 0.1, 0.6], [0.1, 0.6, 0.6], [0.6, 0.6, 0.1]])


class Structures:
    """Harmonic crystals and molecules whose energy, forces and stress belong together."""

    stiffness = 8.0  # eV/Å²

    def __init__(self, seed: int = 0):
        self.rng = np.random.default_rng(seed)

    def crystal(self, amplitude: float = 0.08, scale: float = 1.0) -> dict[str, Any]:
        cell = BOX * scale ** (1 / 3)
        shift = self.rng.normal(0, amplitude, (4, 3))
        volume = np.linalg.det(cell)
        bulk, strain = 0.6, scale - 1  # eV/Å³: E = ½ B V0 strain²
        stress = np.eye(3) * bulk * strain
        energy = -21.0 + 0.5 * self.stiffness * (shift**2).sum() + 0.5 * bulk * volume / scale * strain**2
        return {
            "numbers": np.array([14, 8, 8, 6]),
            "positions": SITES @ cell + shift,
            "cell": cell,
            "energy": energy,
            "forces": -self.stiffness * shift,
            "stress": stress,
        }

    def molecule(self, amplitude: float = 0.05) -> dict[str, Any]:
        rest = np.array([[0.0, 0, 0], [1.1, 0, 0], [-0.4, 1.0, 0], [-0.4, -0.5, 0.9], [-0.4, -0.5, -0.9]])
        shift = self.rng.normal(0, amplitude, (5, 3))
        return {
            "numbers": np.array([6, 1, 1, 1, 1]),
            "positions": rest + shift,
            "energy": -1101.0 + 0.5 * self.stiffness * (shift**2).sum(),
            "forces": -self.stiffness * shift,
        }


def _text(frame: dict[str, Any]) -> str:
    """Return one frame as extxyz; ``info`` adds raw text to its comment, ``raw`` replaces whole values."""
    columns = [("pos", frame["positions"])]
    columns += [(name, frame[name]) for name in frame.get("columns", ("forces",)) if name in frame]
    head = "Properties=species:S:1" + "".join(f":{name}:R:{np.shape(values)[1]}" for name, values in columns)
    parts = [head]
    if "cell" in frame:
        parts.append('Lattice="' + " ".join(f"{x:.10f}" for x in np.ravel(frame["cell"])) + '"')
        parts.append('pbc="T T T"')
    for name in ("energy", "stress"):
        if name in frame:
            value = frame[name]
            text = value if isinstance(value, str) else " ".join(f"{x:.10f}" for x in np.ravel(value))
            parts.append(f'{name}="{text}"')
    parts += [f"{k}={v}" for k, v in frame.get("info", {}).items()]
    lines = [str(len(frame["numbers"])), " ".join(parts)]
    for i, z in enumerate(frame["numbers"]):
        numbers = np.concatenate([np.atleast_1d(values[i]) for _, values in columns])
        lines.append(SYMBOLS.get(int(z), str(int(z))) + " " + " ".join(f"{x:.10f}" for x in numbers))
    return "\n".join(lines) + "\n"


@pytest.fixture
def structures() -> Structures:
    return Structures()


@pytest.fixture
def write_frames(tmp_path: Path) -> Callable[[str, Iterable[dict[str, Any]]], Path]:
    """Return a function that writes frames as extxyz below ``tmp_path``."""

    def write(name: str, frames: Iterable[dict[str, Any]]) -> Path:
        path = tmp_path / name
        with path.open("w") as file:
            file.writelines(_text(frame) for frame in frames)
        return path

    return write


@pytest.fixture
def data_config(tmp_path: Path) -> Callable[..., DataConfig]:
    """Return a function that makes a data YAML of one source; keywords override it, ``source_*`` the source."""

    def make(path: str | list[str] = "data.extxyz", **changes: Any) -> DataConfig:
        source = {
            "name": "set",
            "path": path,
            "pair_by": "geometry",
            "licence": "MIT",
            "labels": {"pbe": {"energy": "energy", "forces": "forces"}},
        }
        source |= {k.removeprefix("source_"): v for k, v in changes.items() if k.startswith("source_")}
        content = {
            "store": str(tmp_path / "store"),
            "fidelities": {"pbe": {"level_of_theory": "PBE"}, "ccsdt": {"level_of_theory": "CCSD(T)"}},
            "sources": [source],
        }
        content |= {k: v for k, v in changes.items() if not k.startswith("source_")}
        return DataConfig.model_validate(content)

    return make
