"""The labelling scripts' output file and run loop: nothing lost, nothing twice, whatever kills the run."""

from pathlib import Path

import labelling
import numpy as np
import pytest
from ase import Atoms
from ase.io import read
from fake_levels import LEVELS, label
from labelling import Job

from mffm.errors import InputError


def make_jobs(n: int, levels: tuple[str, ...] = ("fake",), **fates: str) -> list[Job]:
    rng = np.random.default_rng(0)
    jobs = []
    for i in range(n):
        frame = Atoms("OH2", rng.normal(size=(3, 3)), info={"frame_id": f"f-{i}", "molecule": "H2O", "holdout": False})
        if f"f{i}" in fates:
            frame.info["fate"] = fates[f"f{i}"]
        jobs.append(Job(frame, levels))
    return jobs


def names(path: Path) -> list[str]:
    return sorted(frame.info["frame_id"] for frame in read(path, ":"))


def write(path: Path, jobs: list[Job]) -> bytes:
    output = labelling.Output(path, ("fake",))
    for job in jobs:
        output.append(label(job))
    output.close()
    return path.read_bytes()


def test_every_cut_of_the_last_frame_is_found(tmp_path: Path) -> None:
    path = tmp_path / "out.extxyz"
    whole = write(path, make_jobs(3))
    starts = [0]
    for _ in range(3):
        n_lines = 2 + int(whole[starts[-1] :].split(b"\n", 1)[0])
        starts.append(starts[-1] + sum(len(x) + 1 for x in whole[starts[-1] :].split(b"\n")[:n_lines]))
    assert starts[-1] == len(whole)
    for length in range(starts[2], len(whole)):
        path.write_bytes(whole[:length])
        found = labelling.scan(path)
        assert (len(found.infos), found.whole, found.size) == (2, starts[2], length)
    path.write_bytes(whole)
    assert len(labelling.scan(path).infos) == 3


def test_a_cut_frame_is_dropped_and_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.extxyz"
    jobs = make_jobs(4)
    whole = write(path, jobs[:3])
    path.write_bytes(whole[:-20])
    counts = labelling.run(jobs, path, label, minutes=1, workers=1)
    assert counts == {"fake": 2}  # the cut one and the fourth
    assert names(path) == ["f-0", "f-1", "f-2", "f-3"]
    assert "the last frame was cut off" in capsys.readouterr().out
    assert labelling.run(jobs, path, label, minutes=1, workers=1) == {}


def test_damage_in_the_middle_is_not_repaired(tmp_path: Path) -> None:
    path = tmp_path / "out.extxyz"
    whole = write(path, make_jobs(3))
    damaged = whole.replace(b"\nH ", b"\n", 1)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"out\.extxyz: line 1: .*damaged"):
        labelling.Output(path, ("fake",))
    assert path.read_bytes() == damaged


def test_a_file_that_is_no_extxyz_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("not a structure\nat all\n")
    with pytest.raises(InputError, match="not an extxyz file"):
        labelling.Output(path, ("fake",))
    assert path.read_text() == "not a structure\nat all\n"


def test_two_runs_cannot_write_one_file(tmp_path: Path) -> None:
    first = labelling.Output(tmp_path / "out.extxyz", ("fake",))
    with pytest.raises(InputError, match="another run is writing"):
        labelling.Output(tmp_path / "out.extxyz", ("fake",))
    first.close()


def test_other_levels_need_another_file(tmp_path: Path) -> None:
    write(tmp_path / "out.extxyz", make_jobs(1))
    with pytest.raises(InputError, match="f-0 has no label and no error of steady"):
        labelling.Output(tmp_path / "out.extxyz", ("fake", "steady"))


def test_failures_are_recorded_beside_the_other_levels(tmp_path: Path) -> None:
    path = tmp_path / "out.extxyz"
    jobs = make_jobs(3, ("fake", "steady"), f0="unconverged", f1="nan")
    counts = labelling.run(jobs, path, label, minutes=1, workers=1)
    assert counts == {"fake": 1, "steady": 3, "failed fake": 2}
    frames = {frame.info["frame_id"]: frame for frame in read(path, ":")}
    assert frames["f-0"].info["error_fake"] == "convergence: NotConverged quoted message of two lines"
    assert "not finite" in frames["f-1"].info["error_fake"]
    assert "energy_fake" not in frames["f-0"].info
    assert frames["f-0"].info["energy_steady"] == 1.0
    assert frames["f-2"].info["holdout"] == False  # noqa: E712 - a bool of Python or of NumPy, not the text "F"
    assert 0 < frames["f-2"].info["cpu_s_steady"] < 0.1  # microseconds: 10 ms digits would make it zero
    assert labelling.run(jobs, path, label, minutes=1, workers=1) == {}  # what failed for a reason is not tried again


def test_a_worker_that_dies_costs_only_its_own_structure(tmp_path: Path) -> None:
    path = tmp_path / "out.extxyz"
    jobs = make_jobs(2, f0="die")
    assert labelling.run(jobs, path, label, minutes=2, workers=1) == {"fake": 1, "failed fake": 1}
    errors = {f.info["frame_id"]: f.info.get("error_fake", "") for f in read(path, ":")}
    assert errors["f-0"].startswith("lost: ")
    assert errors["f-1"] == ""


@pytest.mark.slow
def test_structures_beside_a_dying_worker_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "out.extxyz"
    jobs = make_jobs(7, f1="die", f3="die once", f5="slow")
    jobs[3].frame.info["marker"] = str(tmp_path / "died")
    counts = labelling.run(jobs, path, label, minutes=4, workers=2, restart_after=2)
    assert counts == {"fake": 6, "failed fake": 1}
    assert names(path) == [f"f-{i}" for i in range(7)]


def test_the_time_budget_leaves_a_file_to_go_on_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.extxyz"
    write(path, make_jobs(1))
    labelling.run(make_jobs(3), path, label, minutes=0, workers=1)
    assert "2 structures are left" in capsys.readouterr().out
    assert names(path) == ["f-0"]


def test_a_random_subset_is_nested_and_labels_of_the_input_stay_behind(tmp_path: Path) -> None:
    path = tmp_path / "in.extxyz"
    write(path, make_jobs(8))
    frames = labelling.read_frames([path])
    assert set(frames[0].info) == {"frame_id", "molecule", "holdout"}
    assert "forces_fake" not in frames[0].arrays
    small, large = (labelling.plan(frames, ("fake",), n, seed=3) for n in (3, 6))
    assert [job.frame_id for job in small] == [job.frame_id for job in large[:3]]
    with pytest.raises(InputError, match="occurs 2 times"):
        labelling.read_frames([path, path])


def test_unknown_levels_and_missing_codes_say_so() -> None:
    with pytest.raises(InputError, match="expected some of fake, steady"):
        labelling.choose_levels("fake,b3lyp", LEVELS)
    with pytest.raises(InputError, match="no_such_code is not installed"):
        labelling.versions(["no_such_code.part"])
