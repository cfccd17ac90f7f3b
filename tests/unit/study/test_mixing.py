"""Mixing energies: by hand, from a file, and from a potential."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read, write

from mffm.config.base import validate
from mffm.config.study import MixingConfig
from mffm.data.records import Geometry
from mffm.errors import InputError
from mffm.study.mixing import Mixing, draw, mixing_energies, section

CONFIG: dict[str, Any] = {
    "file": "alloys.extxyz", "group": "binary", "order": "n", "where": "ideal", "energy": "energy_high",
    "others": {"low": "energy_low"}, "uncovered": ["MgCaO"], "drawn_at": 8,
}  # fmt: skip


def alloys() -> list[Atoms]:
    """Return A(4-n)B(n)X4, n = 0, 2, 4, of two groups and a distorted cell; energies are sums over atoms and a bow."""
    frames = []
    for group, first, second, anion, bow in (("MgCaO", "Mg", "Ca", "O", 0.8), ("NaKCl", "Na", "K", "Cl", 0.4)):
        for n in (4, 0, 2):
            cell = bulk("NaCl", "rocksalt", a=5.0, cubic=True)
            cell.symbols[:] = [second if i // 2 < n else first if i % 2 == 0 else anion for i in range(8)]
            cell.symbols[1::2] = anion
            energy = -10.0 * cell.numbers.sum() + (bow if n == 2 else 0.0)
            cell.info = {"binary": group, "n": n, "ideal": True, "energy_high": energy, "energy_low": energy / 2}
            frames.append(cell)
    distorted = frames[-1].copy()
    distorted.info |= {"ideal": False}
    return [*frames, distorted]


def mixing_of(folder: Path, frames: Sequence[Atoms] | None = None, **changes: Any) -> Mixing:
    write(folder / "alloys.extxyz", frames if frames is not None else alloys())
    return Mixing.read(validate(MixingConfig, {**CONFIG, **changes}, "test"), folder, ["a", "b"])


def fake(structures: Sequence[Geometry]) -> np.ndarray:
    """Energies that are 1 eV an element's number and 0.6 eV more in a mixed cell."""
    return np.array([numbers.sum() + (0.6 if len(np.unique(numbers)) == 3 else 0.0) for numbers, *_ in structures])


def test_by_hand():
    energies = mixing_energies(np.array([0.0, 1.0, 4.0]), np.array([-10.0, -8.0, -2.0]))
    assert energies == pytest.approx([(-8 + 0.75 * 10 + 0.25 * 2) / 4])
    per_element = np.array([0.0, 1.0, 4.0]) * 1000 + 7
    assert mixing_energies(np.array([0.0, 1.0, 4.0]), np.array([-10.0, -8.0, -2.0]) + per_element) == pytest.approx(
        energies
    )


def test_labels_and_predictions_of_a_file(tmp_path: Path):
    judge = mixing_of(tmp_path)
    assert {g: e.tolist() for g, e in judge.labels("energy_high").items()} == {
        "MgCaO": [pytest.approx(0.2)], "NaKCl": [pytest.approx(0.1)]
    }  # fmt: skip
    found = judge.judge(fake)
    assert found == {"MgCaO": [pytest.approx(0.15)], "NaKCl": [pytest.approx(0.15)]}
    worse = {g: [e[0] + 0.1] for g, e in found.items()}
    summary = judge.summarise({"a": {8: {0: found, 1: worse}, 16: {0: found}}, "b": {32: {0: found}}})
    at_8 = summary["methods"]["a"][0]
    assert at_8["uncovered"] == {
        "mean": pytest.approx(50.0),
        "least": pytest.approx(50),
        "most": pytest.approx(50),
        "seeds": 2,
    }
    assert at_8["covered"]["most"] == pytest.approx(150.0)
    assert summary["methods"]["b"][0]["r2"]["mean"] == pytest.approx(0.0)
    assert summary["others"]["low"]["uncovered"]["mean"] == pytest.approx(100.0)
    assert (summary["drawn"]["a"]["n_high"], summary["drawn"]["b"]["n_high"]) == (8, 32)
    assert summary["drawn"]["a"]["groups"]["MgCaO"] == [pytest.approx(0.2)]
    titles = {"b": "second", "a": "first"}
    page = "\n".join(section(summary, titles, "r2scan"))
    assert "| first | 8 | 50 (50 to 50) | 100 (50 to 150) |" in page
    assert "| labels of low |  | 100 | 50 |" in page
    assert page.index("second") < page.index("first"), "not in the order of the page"
    assert draw(summary, titles, "r2scan", tmp_path).stat().st_size > 10_000


def test_another_code_is_drawn_beside_the_methods_asked_for(tmp_path: Path):
    judge = mixing_of(tmp_path, drawn=["a"])
    found = judge.judge(fake)
    assert list(judge.summarise({name: {8: {0: found}} for name in ("b", "a", "other")})["drawn"]) == ["a", "other"]


def test_what_is_read_decides_the_digest(tmp_path: Path):
    before = mixing_of(tmp_path).digest
    assert mixing_of(tmp_path, drawn=["a"], uncovered=[]).digest == before
    frames = alloys()
    frames[0].info["energy_high"] += 1
    assert mixing_of(tmp_path, frames).digest != before


def without_ends() -> list[Atoms]:
    return [f for f in alloys() if f.info["n"] == 2]


def wrong_order() -> list[Atoms]:
    frames = alloys()
    frames[2].info["n"] = 1
    return frames


MISTAKES: dict[str, tuple[list[Atoms], dict[str, Any], str]] = {
    "no file": (alloys(), {"file": "none.extxyz"}, "mixing.file: .*none.extxyz: no such file"),
    "unknown key": (alloys(), {"order": "x"}, "mixing.order: .* has no info key 'x'; keys: .*binary"),
    "unknown group": (alloys(), {"uncovered": ["AlBP"]}, "no group 'AlBP' in .*; groups: MgCaO, NaKCl"),
    "no end members": (without_ends(), {}, "group 'MgCaO': n is 2; needed are one structure each"),
    "two of one order": (alloys(), {"where": None}, "group 'NaKCl': n is 0, 2, 2, 4; .*narrow `where`"),
    "not between": (wrong_order(), {}, "Ca2Mg2O4 with n 1 does not lie between Mg4O4 and Ca4O4"),
    "not a structure file": ([], {"file": "__init__.py"}, "ASE cannot read it|no such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_error(tmp_path: Path, name: str):
    frames, changes, message = MISTAKES[name]
    with pytest.raises(InputError, match=f"(?s){message}"):
        mixing_of(tmp_path, frames or alloys(), **changes)


def test_shipped_labels_are_those_of_the_documentation():
    root = Path(__file__).parents[3]
    config = {**CONFIG, "file": "data/alloys.extxyz", "group": "pseudo_binary", "order": "n_second"}
    config |= {"energy": "energy_r2scan", "others": {"PBE": "energy_pbe"}}
    judge = Mixing.read(validate(MixingConfig, config, "test"), root, [])
    assert judge.labels("energy_r2scan")["MgCaO"].round(3).tolist() == [0.312, 0.352, 0.224]
    assert judge.labels("energy_pbe")["AlBP"].round(3).tolist() == [0.669, 1.059, 0.948]
    assert len(judge.frames) == 30 < len(read(root / "data" / "alloys.extxyz", ":"))
