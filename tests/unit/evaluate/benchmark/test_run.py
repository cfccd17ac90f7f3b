"""Runs: resumable after kill -9, one potential a folder, tasks without data listed as not run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from ase.io import write

from mffm.errors import InputError
from mffm.evaluate.benchmark import report, run, suites
from mffm.evaluate.benchmark.source import Source
from mffm.evaluate.benchmark.task import DataFile

HERE = Path(__file__).parent
NAME = "lambench/binding_energy"
N = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layout of PLF547 with small copper clusters; labels are EMT's own."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "lambench" / "PLF547"
    folder.mkdir(parents=True)
    parts: dict[str, list[Atoms]] = {"combined": [], "active_site": [], "drug": []}
    labels = []
    for k in range(N):
        site = Atoms("Cu3", [[0, 0, 0], [2.5, 0, 0], [0, 2.5, 0]])
        drug = Atoms("CuAu", [[1.2, 1.2, 2.2 + 0.1 * k], [1.2, 1.2, 4.8 + 0.1 * k]])
        energies = []
        for name, atoms in (("combined", site + drug), ("active_site", site), ("drug", drug)):
            atoms.info.update(charge=0, spin=1)
            energies.append(_energy(atoms))
            parts[name].append(atoms)
        labels.append((energies[0] - energies[1] - energies[2]) * 23.06092234465)
    for name, frames in parts.items():
        write(folder / f"{name}.traj", frames)
    np.save(folder / "labels.npy", np.array(labels))
    return root


def _energy(atoms: Atoms) -> float:
    atoms = atoms.copy()
    atoms.calc = EMT()
    return float(atoms.get_potential_energy())


def silent(task: str, done: int, total: int) -> None:
    pass


def test_a_run_is_exact_and_tells_its_subset(data: Path, tmp_path: Path):
    emt = Source("ase:ase.calculators.emt:EMT")
    done = run.run_task(emt, NAME, run.Settings(data, limit=5), tmp_path, silent)
    assert isinstance(done, run.Finished)
    assert done.score.metrics["MAE"] == pytest.approx(0, abs=1e-9)
    assert (done.score.n, done.n_of_set, done.is_whole) == (5, N, False)
    assert "5 of 547" in done.score.remark
    assert not done.score.compare
    before = (done.folder / "structures.jsonl").read_bytes()
    more = run.run_task(emt, NAME, run.Settings(data, limit=8), tmp_path, silent)
    assert isinstance(more, run.Finished)
    assert (done.folder / "structures.jsonl").read_bytes().startswith(before)  # the larger part contains the smaller
    assert {r.id for r in done.records} < {r.id for r in more.records}

    two = tuple(r.id for r in more.records[:2])
    named = run.run_task(emt, NAME, run.Settings(data, structures=two), tmp_path, silent)
    assert isinstance(named, run.Finished)
    assert tuple(r.id for r in named.records) == two
    with pytest.raises(InputError, match=r"binding_energy has no structure 'PLF-99'; its 16 begin with PLF-0, PLF-1"):
        run.run_task(emt, NAME, run.Settings(data, structures=("PLF-99",)), tmp_path, silent)

    page = report.write(tmp_path, emt.spec, {"potential": [more]}).read_text()
    assert "| MAE | " in page
    assert "8 of 547: not to be compared" in page
    assert "DPA-3.2-5M" not in page  # no published rows beside a part of the set

    with pytest.raises(InputError, match=r"has results of potential 'ase:ase.calculators.emt:EMT', this run is of"):
        run.run_task(Source("ase:ase.calculators.lj:LennardJones"), NAME, run.Settings(data, limit=5), tmp_path, silent)


def test_a_run_does_not_go_on_with_other_data(data: Path, tmp_path: Path):
    own = tmp_path / "data"
    shutil.copytree(data, own)
    emt, settings = Source("ase:ase.calculators.emt:EMT"), run.Settings(own, structures=("PLF-0",))
    run.run_task(emt, NAME, settings, tmp_path / "out", silent)
    run.run_task(emt, NAME, settings, tmp_path / "out", silent)
    labels = own / "lambench" / "PLF547" / "labels.npy"
    np.save(labels, np.load(labels) + 1)
    with pytest.raises(InputError, match="has results of data_sha256"):
        run.run_task(emt, NAME, settings, tmp_path / "out", silent)
    before = run._digest(own)
    np.save(labels, np.load(labels) + 1)
    assert run._digest(own) != before  # of a folder


def test_a_run_of_kappa_does_not_go_on_in_another_formulation(public_data: Path, tmp_path: Path):
    pytest.importorskip("phono3py", reason="needs phono3py: pip install 'mffm[properties]'")
    name = "matbench-discovery/kappa103"
    emt, settings = Source("ase:ase.calculators.emt:EMT"), run.Settings(public_data, structures=("mp-1265",))
    done = run.run_task(emt, name, settings, tmp_path, silent)
    assert isinstance(done, run.Finished)
    assert "No EMT-potential" in done.records[0].message  # of magnesium
    assert not (done.folder / "phonons-kappa-103.json.gz").exists()  # a part is no submission
    path = done.folder / "identity.json"
    identity = json.loads(path.read_text())
    other = {"MS-SMM19": "SMM19", "SMM19": "MS-SMM19"}[identity["transport"]]
    path.write_text(json.dumps({**identity, "transport": other}))
    with pytest.raises(InputError, match=f"has results of transport '{other}'"):
        run.run_task(emt, name, settings, tmp_path, silent)


def test_missing_data_are_named_and_the_task_is_not_run(tmp_path: Path):
    outcome = run.run_task(
        Source("ase:ase.calculators.emt:EMT"), NAME, run.Settings(tmp_path), tmp_path / "out", silent
    )
    assert isinstance(outcome, run.NotRun)
    assert next(f.path for f, _ in outcome.missing) == "lambench/PLF547/combined.traj"
    page = report.write(tmp_path, "x", {"potential": [outcome]}).read_text()
    assert "## Not run: data are missing" in page
    assert "ASE trajectory with charge and spin in info" in page
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_kill_9_loses_nothing_that_was_recorded(data: Path, tmp_path: Path):
    command = [
        sys.executable, "-m", "mffm", "benchmark", "ase:faulty_emt:Slow", "--task", NAME, "--data", str(data),
        "--output", str(tmp_path), "--workers", "1",
    ]  # fmt: skip
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    records = tmp_path / NAME / "structures.jsonl"
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 240
    while not (records.is_file() and records.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    children = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = records.read_bytes()
    assert before.count(b"\n") < N
    with records.open("ab") as file:
        file.write(b'{"id": "PLF-')  # half a record, as a crash of the machine leaves it
    assert children
    while any(_runs(pid) for pid in children):  # workers end with their parent
        assert time.monotonic() < end
        time.sleep(0.2)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    after = records.read_bytes()
    assert after.startswith(before[: before.rindex(b"\n") + 1])
    ids = [json.loads(line)["id"] for line in after.splitlines()]
    assert len(ids) == len(set(ids)) == N
    score = json.loads((tmp_path / NAME / "score.json").read_text())
    assert score["metrics"]["MAE"] == pytest.approx(0, abs=1e-9)
    assert (tmp_path / "report.md").is_file()


def _children(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_data_files_are_present_absent_or_damaged(tmp_path: Path):
    file = DataFile("a/b.json", "somewhere", "JSON", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")
    assert file.check(tmp_path) == "absent"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.json").write_text("abc")
    assert file.check(tmp_path) == "present"
    assert DataFile("a/", "somewhere", "files").check(tmp_path) == "present"
    assert DataFile("a/b.json", "s", "l", "900150983cd24fb0d6963f7d28e17f72").check(tmp_path) == "present"  # MD5
    (tmp_path / "a" / "b.json").write_text("abd")
    assert file.check(tmp_path) == "wrong checksum"


def test_the_shared_data_are_those_that_the_tasks_expect(public_data: Path):
    states = {f.path: state for _, f, state in suites.check_data(public_data, suites.of_suite("all"))}
    assert "wrong checksum" not in states.values()
    for path in (
        "elastic2015/elastic.json.gz",
        "bh876/BH876.extxyz.gz",
        "wbm972/wbm-random-pbe52-equilibrium-2025.1.json.gz",
    ):
        assert states[path] == "present"


def test_names_of_suites_and_tasks():
    assert set(suites.of_suite("all")) == set(suites.TASKS)
    assert all(n.startswith("lambench/") for n in suites.of_suite("lambench"))
    with pytest.raises(InputError, match="no suite 'matbench'; known: all, lambench, matbench-discovery"):
        suites.of_suite("matbench")
    with pytest.raises(InputError, match="no task 'elastic'; known: "):
        suites.task("elastic")
