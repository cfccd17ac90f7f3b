"""Two files become a study that the ordinary commands take; what cannot be one is refused with the remedy."""

from pathlib import Path

import ase.io
import pytest
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from mffm.config.base import load
from mffm.config.data import DataConfig
from mffm.config.study import load_study
from mffm.data.differences import add_difference
from mffm.data.ingest import ingest
from mffm.errors import InputError
from mffm.study import new
from mffm.study.gate import gates
from mffm.study.grid import Grid, expand

ROOT = Path(__file__).parents[3]
SHIPPED: list[Atoms] = ase.io.read(ROOT / "data" / "molecules.extxyz", "::3")  # type: ignore[assignment]


def labelled(frames: list[Atoms], level: str, forces: bool = True) -> list[Atoms]:
    """Return the bare structures with the shipped labels of a level, as ASE writes them: energy and forces."""
    found = []
    for frame in frames:
        atoms = Atoms(frame.numbers, frame.positions)
        labels = {"energy": frame.info[f"energy_{level}"]} | (
            {"forces": frame.arrays[f"forces_{level}"]} if forces else {}
        )
        atoms.calc = SinglePointCalculator(atoms, **labels)
        found.append(atoms)
    return found


@pytest.fixture
def sides(tmp_path: Path) -> tuple[new.Side, new.Side]:
    """GFN2 labels of 200 structures, PBE labels of 90 of them."""
    ase.io.write(tmp_path / "gfn2.extxyz", labelled(SHIPPED[:200], "gfn2"))
    ase.io.write(tmp_path / "pbe.xyz", labelled(SHIPPED[:180:2], "pbe"))
    return new.Side(tmp_path / "gfn2.extxyz", "--low"), new.Side(tmp_path / "pbe.xyz", "--high")


def made(low: new.Side, high: new.Side, folder: Path) -> new.NewStudy:
    found = new.new_study(low, high, folder, steps=60, seeds=2)
    new.write(found)
    return found


def expanded(found: new.NewStudy, store: Path) -> Grid:
    recipe = found.folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(found.data["store"], str(store)))
    data = load(DataConfig, found.folder / "data.yaml")
    ingest(data, found.folder, store, progress=False)
    if found.has_differences:
        high, low = found.high.side.fidelity, found.low.side.fidelity
        add_difference(store, high, low, f"{high}_minus_{low}", "difference")
    path = found.folder / "study.yaml"
    return expand(load_study(path), path, store.parent / "out")


def test_paired_files_become_a_study_with_every_method(sides: tuple[new.Side, new.Side], tmp_path: Path):
    found = made(*sides, tmp_path / "mine")
    assert found.n_paired == 90
    assert found.commands == [
        f"mffm ingest {tmp_path}/mine/data.yaml", "mffm difference stores/mine --high pbe --low gfn2",
        f"mffm study {tmp_path}/mine/study.yaml",
    ]  # fmt: skip
    held = found.data["splits"]["holdout"]["ood"]
    assert len(held) > 1
    grid = expanded(found, tmp_path / "store")
    there = int((grid.store.has("pbe", "energy") & (grid.store.split == grid.store.split_index("train"))).sum())
    assert found.n_train == there, "the training labels were counted as the ingest draws them"
    assert sorted({cell.n_high for cell in grid.cells}) == [
        n for n in (there // 8, there // 4, there // 2, there) if n >= 8
    ]
    assert {"delta_exact", "delta_ml", "mffm", "hf_only"} <= set(grid.config.methods)
    assert len(grid.trainings) == new.n_trainings(found)
    assert [gate.low for gate in gates(grid)] == ["gfn2"]
    in_ood = {grid.store.group_names[g] for g in grid.store.group[grid.store.rows(split="ood", fidelity="pbe")]}
    assert in_ood <= set(held)
    assert grid.trainings[f"methods/mffm/n{there}-s0"].recipe.train.steps == 60


def test_energies_alone_of_one_molecule_partly_elsewhere(tmp_path: Path):
    frames: list[Atoms] = ase.io.read(ROOT / "data" / "molecules.extxyz", ":")  # type: ignore[assignment]
    one = [frame for frame in frames if frame.get_chemical_formula() == "C4H6"]
    n = len(one) // 4
    ase.io.write(tmp_path / "low.xyz", labelled(one[: 2 * n], "gfn2"))
    ase.io.write(tmp_path / "high.xyz", labelled(one[n:], "pbe", forces=False))
    found = made(new.Side(tmp_path / "low.xyz", "--low"), new.Side(tmp_path / "high.xyz", "--high"), tmp_path / "one")
    assert (found.n_paired, found.high.properties) == (n, ["energy"])
    assert "holdout" not in found.data["splits"]
    assert found.study["ood"] is None
    assert found.study["properties"] == ["energy"]
    assert not {"delta_exact", "delta_ml"} & set(found.study["methods"])
    changes = found.study["methods"]["mffm"]["changes"]
    assert (changes["data.plan.finish"], changes["train.best"]) == ({"fidelities": ["high"]}, "val/high/energy_mae")
    assert len(found.commands) == 2
    assert not new.notes(found)
    assert expanded(found, tmp_path / "store").cells


def test_one_energy_of_each_molecule_is_no_reason_to_end_on_them(tmp_path: Path):
    frames: list[Atoms] = ase.io.read(ROOT / "data" / "molecules_many.extxyz", ":")  # type: ignore[assignment]
    frames = [frame for frame in frames if "energy_pbe" in frame.info]
    assert len(frames) > 3 * len({frame.get_chemical_formula() for frame in frames}), "isomers share their formula"
    ase.io.write(tmp_path / "low.xyz", labelled(frames, "gfn2"))
    ase.io.write(tmp_path / "high.xyz", labelled(frames, "pbe", forces=False))
    found = made(new.Side(tmp_path / "low.xyz", "--low"), new.Side(tmp_path / "high.xyz", "--high"), tmp_path / "many")
    assert found.high.properties == ["energy"]
    assert "data.plan.finish" not in found.study["methods"]["mffm"]["changes"]


def test_the_files_say_where_they_are_and_have_no_anchors(sides: tuple[new.Side, new.Side], tmp_path: Path):
    found = made(*sides, tmp_path / "mine")
    texts = {name: (found.folder / name).read_text() for name in ("data.yaml", "recipe.yaml", "study.yaml")}
    assert "../gfn2.extxyz" in texts["data.yaml"]
    assert not any("&id" in text for text in texts.values())
    assert texts["study.yaml"].startswith("# How many pbe labels, and which method?")
    new.write(found)  # the same again is no mistake
    path = found.folder / "study.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "seeds": [5]}))
    with pytest.raises(InputError, match=r"study.yaml: is there and says something else, perhaps your changes"):
        new.write(found)


def test_two_levels_in_one_file(tmp_path: Path):
    path = tmp_path / "both.extxyz"
    ase.io.write(path, SHIPPED[:120])
    low, high = ({"energy": f"energy_{level}"} for level in ("gfn2", "pbe"))
    with pytest.raises(InputError, match=r"both files give the fidelity 'both'; name them apart with --low-name"):
        new.new_study(new.Side(path, "--low"), new.Side(path, "--high"), tmp_path / "x", 60, 1)
    named = new.Side(path, "--low", "gfn2"), new.Side(path, "--high", "pbe")
    with pytest.raises(InputError, match=r"several keys look like energy: .*energy_pbe.*--low-energy KEY"):
        new.new_study(*named, tmp_path / "x", 60, 1)
    with pytest.raises(InputError, match=r"low and high are the same labels \(energy_pbe\)"):
        new.new_study(*(new.Side(path, s.option, s.name, high) for s in named), tmp_path / "x", 60, 1)
    found = made(new.Side(path, "--low", "gfn2", low), new.Side(path, "--high", "pbe", high), tmp_path / "mine")
    assert [spec.key for spec in found.high.found.labels.values()] == ["energy_pbe", "forces_pbe"]
    assert found.n_paired == 120


def test_notes_of_what_the_files_do_not_share(sides: tuple[new.Side, new.Side], tmp_path: Path):
    shifted = [atoms.copy() for atoms in SHIPPED[:60]]
    for atoms, frame in zip(shifted, SHIPPED, strict=False):
        atoms.positions += 1.0
        atoms.arrays["forces_pbe"], atoms.info["energy_pbe"] = frame.arrays["forces_pbe"], frame.info["energy_pbe"]
        atoms.numbers[0] = 9
    ase.io.write(tmp_path / "moved.xyz", labelled(shifted, "pbe"))
    found = new.new_study(sides[0], new.Side(tmp_path / "moved.xyz", "--high"), tmp_path / "x", 60, 1)
    assert found.n_paired == 0
    fluorine, pairs = new.notes(found)
    assert fluorine.startswith("F: in ")
    assert pairs.startswith("0 structures have both levels: too few to tell")


def test_too_few_labels_are_refused(sides: tuple[new.Side, new.Side], tmp_path: Path):
    ase.io.write(tmp_path / "few.xyz", labelled(SHIPPED[:30], "pbe"))
    with pytest.raises(InputError, match=r"few.xyz: 30 structures with an energy; 40 is the least"):
        new.new_study(sides[0], new.Side(tmp_path / "few.xyz", "--high"), tmp_path / "x", 60, 1)


def test_compositions_held_out_leave_their_elements():
    names = ["H2O"] * 20 + [f"C{n}H4" for n in range(1, 17)] * 3 + ["HCl"] * 3
    held = new._held_out(names)
    assert held
    assert "HCl" not in held
    assert "H2O" not in held
    assert sum(names.count(name) for name in held) <= new.HELD_OUT * len(names)
    assert new._held_out(["H2O", "CH4"] * 30) == []
