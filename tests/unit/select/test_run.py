"""Selections from a real release: copies are not picked, limits hold, a killed run goes on, mistakes are told."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import read, write
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from mffm.cli import app
from mffm.data.store import Store
from mffm.deploy.ase import Calculator
from mffm.errors import InputError
from mffm.release import load, save
from mffm.select import report, run
from mffm.select.run import MEASURED, Options, Selection

ROOT = Path(__file__).parents[3]
RELEASE = ROOT / "tests" / "golden" / "release-v2"  # gfn2 and pbe of H, C, N, O
SHIPPED = ROOT / "data" / "molecules.extxyz"
N_POOL = 24


def molecules(start: int, n: int) -> list[Atoms]:
    return read(SHIPPED, f"{start}:{start + n}")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pool") / "pool.extxyz"
    write(path, molecules(0, N_POOL))
    return path


@pytest.fixture(scope="module")
def uncertain(tiny_run: Path, molecule_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_run, tmp_path_factory.mktemp("uncertain") / "release", fit_uncertainty_on=Store(molecule_store))


def select(folder: Path, pool: Path, release: Path = RELEASE, **options) -> Selection:
    return run.select(release, [pool], Options(**{"fidelity": "pbe", "n": None, **options}), folder, lambda *a: None)


def chosen(found: Selection) -> list[int]:
    return [int(found.candidates[pick.index]) for pick in found.picks]


@pytest.mark.parametrize("by", ["fps", "lcmd", "maxdet"])
def test_a_turned_copy_of_a_labelled_frame_is_never_early(pool: Path, tmp_path: Path, by: str):
    """Turned, so that it is another geometry but the same latent point: a quarter of the pool is such copies."""
    frames = molecules(0, N_POOL)
    copies = range(0, N_POOL, 4)
    labelled = []
    for seed, i in enumerate(copies):
        turned = frames[i].copy()
        turned.positions = Rotation.random(random_state=seed).apply(turned.positions)
        labelled.append(turned)
    write(tmp_path / "labelled.extxyz", labelled)
    n = N_POOL - len(copies)
    found = select(tmp_path, pool, by=by, n=N_POOL, labelled=[tmp_path / "labelled.extxyz"])
    assert found.left_out == {"labelled already": 0, "the same as one before": 0}
    first = chosen(found)[: n // 2] if by == "maxdet" else chosen(found)[: n - 4]
    assert not set(first) & set(copies)
    alone = select(tmp_path, pool, by=by, n=N_POOL)
    assert set(chosen(alone)[: len(first)]) & set(copies), "without labels the copies are like others"


def test_the_same_geometry_is_no_candidate(tmp_path: Path):
    frames = molecules(0, 12)
    again, moved = frames[2].copy(), frames[5].copy()
    moved.positions += 1e-4  # Å
    write(tmp_path / "pool.extxyz", [*frames, again])
    write(tmp_path / "labelled.extxyz", [moved])
    found = select(tmp_path, tmp_path / "pool.extxyz", by="random", n=11, labelled=[tmp_path / "labelled.extxyz"])
    assert found.left_out == {"labelled already": 1, "the same as one before": 1}
    assert sorted(chosen(found)) == [i for i in range(12) if i != 5]


def test_written_in_the_order_of_the_picks(pool: Path, tmp_path: Path):
    found = select(tmp_path, pool, by="lcmd", n=5, cost="atoms^2.4")
    report.write(found, tmp_path)
    frames, told = read(tmp_path / "selected.extxyz", ":"), json.loads((tmp_path / "selection.json").read_text())
    source = molecules(0, N_POOL)
    for atoms, entry, index in zip(frames, told["chosen"], chosen(found), strict=True):
        assert atoms.info["frame_id"] == source[index].info["frame_id"]
        assert atoms.info["place"] == entry["place"] == f"{pool}: frame {index}"
        np.testing.assert_allclose(atoms.positions, source[index].positions, atol=1e-7)
        assert entry["cost"] == pytest.approx(len(atoms) ** 2.4)
    assert told["spent"] == pytest.approx(sum(e["cost"] for e in told["chosen"]))
    assert "farthest from the mean for its cost" in told["chosen"][0]["reason"]
    assert "from pick 1" in " ".join(e["reason"] for e in told["chosen"][1:])
    assert (tmp_path / "selection.png").stat().st_size > 5_000


def test_what_a_kill_left_is_gone_on_with(pool: Path, tmp_path: Path):
    whole = select(tmp_path, pool, by="fps", n=8)
    (rows,) = (tmp_path / MEASURED).glob("*.rows")
    content = rows.read_bytes()
    rows.write_bytes(content[: len(content) // 2 + 3])  # in the middle of a number
    counted: list[tuple[str, int]] = []
    options = Options(by="fps", n=8, fidelity="pbe")
    again = run.select(RELEASE, [pool], options, tmp_path, lambda what, n, total: counted.append((what, n)))
    assert 0 < next(n for what, n in counted if what == "latent features") < N_POOL
    np.testing.assert_allclose(np.fromfile(rows, "<f4"), np.frombuffer(content, "<f4"), atol=1e-5)
    assert chosen(again) == chosen(whole)


def test_features_are_of_the_structure_alone(pool: Path, tmp_path: Path):
    """Mean over atoms of the last layer's inputs: the energy per atom but for references is linear in them."""
    found = select(tmp_path, pool, by="fps", n=2)
    whole = load(RELEASE).potential.folded("pbe").learned.heads
    assert found.x.shape == (N_POOL, whole.mlp.weights[-1].shape[0])
    assert np.square(found.x).sum(1).mean() == pytest.approx(1, rel=1e-4)
    assert np.abs(found.x.mean(0)).max() < 1e-5


def test_uncertainty_of_the_last_layer_and_its_cut(uncertain: Path, pool: Path, tmp_path: Path):
    found = select(tmp_path, pool, uncertain, by="uncertainty", n=6, fidelity="gfn2")
    assert found.stds is not None
    assert chosen(found)[0] == int(found.candidates[found.stds.argmax()])
    cut = 1e3 * float(np.median(found.stds))
    below = select(tmp_path, pool, uncertain, by="uncertainty", n=6, fidelity="gfn2", max_std=cut)
    assert below.left_out[f"σ above {cut:g} meV/atom"] == int((1e3 * found.stds > cut).sum()) > 0
    inside = set(found.candidates[1e3 * found.stds <= cut].tolist())
    assert set(chosen(below)) <= inside


def test_an_ensemble_is_uncertain_too(tiny_release: Path, pool: Path, tmp_path: Path):
    found = select(tmp_path, pool, by="uncertainty", n=3, ensemble=[tiny_release])
    energies = []
    for path in (RELEASE, tiny_release):
        atoms = molecules(0, 1)[0]
        atoms.calc = Calculator(path, fidelity="pbe")
        energies.append(atoms.get_potential_energy() / len(atoms))
    assert found.stds is not None
    assert found.stds[0] == pytest.approx(np.std(energies, ddof=1), rel=1e-3)


def test_where_levels_disagree(pool: Path, tmp_path: Path):
    found = select(tmp_path, pool, by="disagreement", against="gfn2", n=4)
    assert found.differences is not None
    assert np.median(found.differences) == pytest.approx(0, abs=1e-12)
    assert chosen(found)[0] == int(found.candidates[np.abs(found.differences).argmax()])
    turned = select(tmp_path, pool, by="disagreement", fidelity="gfn2", against="pbe", n=4)
    np.testing.assert_allclose(turned.differences, -found.differences, atol=1e-9)


def test_rows_of_a_store(build_store, tmp_path: Path):
    """Frames with a CCSD(T) label are no candidates, and count as labelled; other splits are left alone."""
    lines = []
    for number, atoms in enumerate(molecules(0, 30)):
        if number % 3:
            atoms.info.pop("energy_ccsdt")
        lines.append(atoms)
    write(tmp_path / "in.extxyz", lines)
    path = build_store(tmp_path / "built", (tmp_path / "in.extxyz").read_text())
    store = Store(path)
    wanted = np.setdiff1d(store.rows(split="train"), store.rows(fidelity="ccsdt"))
    found = select(tmp_path, path, by="lcmd", n=len(wanted), labelled=[path], level="ccsdt")
    assert len(found.labelled.all) == len(store.rows(fidelity="ccsdt")) > 0
    rows = found.pool.origins[0].rows[chosen(found)]
    assert sorted(rows.tolist()) == wanted.tolist()
    taken = found.pool.take(chosen(found)[:2])
    assert [atoms.info["frame_id"] for atoms in taken] == [store.frame_id(int(row)) for row in rows[:2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--n", "25"], r"--n 25: the pool has 24 structures \(none left out\): 24 can be chosen"),
        (["--n", "3", "--by", "best"], "--by best: known are random, fps"),
        ([], "say how many: --n 50, or --cost with a --budget"),
        (["--budget", "0", "--cost", "atoms"], "--budget 0 must be a positive number"),
        (["--budget", "9"], "--budget 9 needs --cost"),
        (["--budget", "0.5", "--cost", "atoms"], "the cheapest structure costs"),
        (["--n", "2", "--cost", "electrons"], "neither atoms"),
        (["--n", "2", "--by", "disagreement"], "needs --against"),
        (["--n", "2", "--by", "uncertainty"], "no uncertainty at 'pbe'.*--uncertainty"),
        (["--n", "2", "--elements", "H,Xx"], "'Xx' is no element"),
        (["--n", "2", "--elements", "He"], "nothing to choose from"),
        (["--n", "2", "--fidelity", "r2scan"], "r2scan"),
        (["--n", "2", "--labelled", "nowhere.xyz"], "nowhere.xyz: no such file or store"),
    ],
)
def test_mistakes_are_told(pool: Path, tmp_path: Path, options: list[str], message: str, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check(["--fidelity", "pbe", *options], pool, tmp_path, message)


def check(options: list[str], pool: Path, folder: Path, message: str) -> None:
    result = CliRunner().invoke(app, ["select", str(RELEASE), str(pool), "--out", str(folder / "out"), *options])
    assert isinstance(result.exception, InputError), result.output
    assert re.search(message, str(result.exception)), result.exception
    assert not (folder / "out" / "selected.extxyz").exists()


def test_pools_that_are_none(tmp_path: Path):
    some = ["--fidelity", "pbe", "--n", "3"]
    (tmp_path / "empty.extxyz").write_text("")
    check(some, tmp_path / "empty.extxyz", tmp_path, "empty.extxyz: ")
    unknown = molecules(0, 3)
    unknown[1].symbols[0] = "Si"
    write(tmp_path / "si.extxyz", unknown)
    check(some, tmp_path / "si.extxyz", tmp_path, r"si.extxyz: frame 1 \(.*Si.*\): element Si is unknown")
    one = molecules(0, 1)[0]
    alike = [one.copy() for _ in range(5)]
    for i, atoms in enumerate(alike):
        atoms.rattle(0.05, seed=i)
    write(tmp_path / "one.extxyz", alike)
    check(
        [*some, "--max-per-formula", "2"],
        tmp_path / "one.extxyz",
        tmp_path,
        "5 can be chosen, 2 at 2 of each of 1 formula",
    )
    found = select(tmp_path, tmp_path / "one.extxyz", by="lcmd", n=5)
    assert sorted(chosen(found)) == [0, 1, 2, 3, 4]
    (tmp_path / "costs.txt").write_text("1 2 0 4 5")
    check([*some, "--cost", str(tmp_path / "costs.txt")], tmp_path / "one.extxyz", tmp_path, "cost 0 of structure 2")


def test_the_command_says_what_it_did(run_mffm, pool: Path, tmp_path: Path):
    command = ["select", str(RELEASE), str(pool), "--fidelity", "pbe", "--n", "4", "--out", str(tmp_path / "out")]
    done = run_mffm(*command, "--max-per-formula", "1", "--elements", "H,C,O")
    assert done.returncode == 0, done.stderr
    assert "other elements" in done.stdout
    formulas = [atoms.get_chemical_formula() for atoms in read(tmp_path / "out" / "selected.extxyz", ":")]
    assert len(set(formulas)) == 4
    assert "N" not in "".join(formulas)
    refused = run_mffm(*command, "--n", "400")
    assert refused.returncode == 2
    assert "Traceback" not in refused.stderr


def test_compositions_that_no_label_has_come_first(pool: Path, tmp_path: Path):
    frames = molecules(0, N_POOL)
    rare = min((1, 6, 7, 8), key=lambda z: sum(z in atoms.numbers for atoms in frames) or N_POOL)
    counts = np.array([np.bincount(atoms.numbers, minlength=119) for atoms in frames], np.float64)
    rank = np.linalg.matrix_rank(counts)
    assert rank == 4
    has = set(np.flatnonzero(counts[:, rare]).tolist())
    without = counts[counts[:, rare] == 0]
    ranks = []
    for seed in range(8):
        asked = {"by": "random", "n": 4, "seed": seed}
        first = select(tmp_path, pool, **asked)
        assert np.linalg.matrix_rank(counts[chosen(first)]) == rank
        assert all("do not determine" in report.reason(first, pick) for pick in first.picks)
        anyhow = select(tmp_path, pool, compositions_first=False, **asked)
        ranks.append(np.linalg.matrix_rank(counts[chosen(anyhow)]))
        lacking = chosen(select(tmp_path, pool, covered=without, **asked))
        assert lacking[0] in has
    assert min(ranks) < rank, "by chance some draws do not determine all elements"
    write(tmp_path / "labelled.extxyz", [frames[i] for i in range(N_POOL) if i not in has])
    labelled = [tmp_path / "labelled.extxyz"]  # what is covered, where it is not given
    for seed in range(8):
        found = chosen(select(tmp_path, pool, labelled=labelled, **asked | {"seed": seed}))
        assert found[0] in has
