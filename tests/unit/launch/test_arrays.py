"""A study's trainings as arrays: what SLURM is told, and what a second controller adopts, ends and submits again."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from launch import records, trials
from launch.arrays import ArrayExecutor, groups, refuse_under_way
from mffm.config.cluster import ClusterConfig
from mffm.errors import InputError
from mffm.executor import Job, State

SLURM = ClusterConfig(executor="slurm")
AFTER = {"s0": (), "s1": (), "alone": (), "tuned0": ("s0",), "tuned1": ("s1",), "more0": ("s0",)}
NAMES = list(AFTER)


class Interrupted(BaseException):
    """What a signal raises."""


@pytest.fixture
def jobs(make_recipe: Callable[..., Path], tmp_path: Path) -> list[Job]:
    found = []
    for name, after in AFTER.items():
        recipe = make_recipe(name, run=str(tmp_path / "study" / "runs" / name))
        command = [sys.executable, "-m", "mffm", "train", str(recipe)]
        found.append(Job(name, command, tmp_path / "study" / "logs" / f"{name}.log", {"OMP_NUM_THREADS": "1"}, after))
    return found


@pytest.fixture
def queue(slurm_programs: Path, program: Callable[[str, str], None], tmp_path: Path) -> Callable[[str], None]:
    """Return a function that sets what squeue says of all jobs; arrays are found by name where sbatch got them."""

    def say(lines: str) -> None:
        (tmp_path / "queue").write_text(lines)
        program(
            "squeue", f'case "$*" in *--name*) cat {tmp_path}/named 2>/dev/null; exit 0;; esac; cat {tmp_path}/queue'
        )

    say("")
    program("scancel", f'echo "$@" >> {tmp_path}/cancelled; rm -f {tmp_path}/named')
    return say


def interrupted(states: Mapping[str, State]) -> None:
    raise Interrupted


def executor(tmp_path: Path, workers: int | None = None) -> tuple[ArrayExecutor, list[str]]:
    said: list[str] = []
    return ArrayExecutor(tmp_path / "study", "tiny", SLURM, workers, said.append, poll_seconds=0.05), said


def options(script: Path) -> set[str]:
    return {line.removeprefix("#SBATCH --") for line in script.read_text().splitlines() if line.startswith("#SBATCH")}


def finish(tmp_path: Path, name: str) -> None:
    records.write_status(tmp_path / "study" / "runs" / name, "finished")


def test_groups_keep_the_order_of_stages():
    made = [Job(name, [], Path("x"), after=after) for name, after in AFTER.items()]
    found = {after: [job.name for job in group] for after, group in groups(made, {"s1"}).items()}
    assert found == {(): ["s0", "s1", "alone", "tuned1"], ("s0",): ["tuned0", "more0"]}
    assert next(iter(found)) == ()
    assert groups(made[3:4], set()) == {("s0",): [made[3]]}


def test_stages_hold_arrays_and_a_second_controller_adopts_them(
    jobs: list[Job], slurm_programs: Path, queue: Callable[[str], None], tmp_path: Path
):
    first, said = executor(tmp_path)
    with pytest.raises(Interrupted):
        first.run(jobs, interrupted)
    assert said == [
        "array 8: 3 training(s) submitted", "array 9: 2 training(s) submitted, behind 8_0",
        "array 10: 1 training(s) submitted, behind 8_1",
    ]  # fmt: skip
    scripts = [options(slurm_programs / f"{number}.sh") for number in (8, 9, 10)]
    assert "array=0-2%3" in scripts[0]
    assert {"array=0-1%2", "dependency=afterok:8_0", "kill-on-invalid-dep=yes", "requeue"} <= scripts[1]
    assert "dependency=afterok:8_1" in scripts[2]
    assert not any(option.startswith("array") for option in scripts[2])
    run = tmp_path / "study" / "runs" / "more0"
    assert records.read_json(run / "job.json")["job_id"] == "9_1"

    # s0 has finished and started tuned0; s1 has failed, and SLURM ended what it held; `alone` is long forgotten.
    finish(tmp_path, "s0")
    queue("8_1 FAILED\n9_0 RUNNING\n9_1 PENDING\n10 CANCELLED\n")
    seen: list[dict[str, State]] = []

    def report(states: Mapping[str, State]) -> None:
        """The second controller's jobs: s1 fails again, all others finish."""
        seen.append(dict(states))
        if len(seen) == 2:
            for name in ("alone", "tuned0", "more0"):
                finish(tmp_path, name)
            queue("9_0 COMPLETED\n9_1 COMPLETED\n11_0 FAILED\n11_1 COMPLETED\n12 PENDING\n")

    second, said = executor(tmp_path)
    states = second.run(jobs, report)
    assert states == {**dict.fromkeys(NAMES, "done"), "s1": "failed", "tuned1": "failed"}
    assert said == [
        "2 training(s) of an earlier start are queued or run", "array 11: 2 training(s) submitted",
        "array 12: 1 training(s) submitted, behind 11_0",
    ]  # fmt: skip
    assert (seen[0]["s0"], seen[0]["tuned0"]) == ("done", "waiting")
    log = tmp_path / "study" / "logs"
    assert "job 11_0 is FAILED" in (log / "s1.log").read_text()
    assert "not started: s1 failed" in (log / "tuned1.log").read_text()
    assert (log / "more0.log").read_text().endswith("job 9_1 adopted\n")
    assert (tmp_path / "cancelled").read_text() == "12\n"
    assert not (slurm_programs / "13.sh").exists()


def test_workers_put_arrays_one_behind_the_other(
    jobs: list[Job], slurm_programs: Path, queue: Callable[[str], None], tmp_path: Path
):
    with pytest.raises(Interrupted):
        executor(tmp_path, workers=2)[0].run(jobs, interrupted)
    scripts = [options(slurm_programs / f"{number}.sh") for number in (8, 9, 10)]
    assert "array=0-2%2" in scripts[0]
    assert {"array=0-1%2", "dependency=afterok:8_0,afterany:8"} <= scripts[1]
    assert "dependency=afterok:8_1,afterany:9" in scripts[2]


def test_an_array_cut_short_is_ended_and_an_outage_waited_for(
    jobs: list[Job], slurm_programs: Path, queue: Callable[[str], None], slurm_away: Callable[[], None], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    folder = tmp_path / "study"
    (folder / "arrays").mkdir(parents=True)
    records.write_json(folder / "arrays" / "tiny-abc.json", {"after": None})
    (tmp_path / "named").write_text("7_[0-2]\n")
    with pytest.raises(InputError, match=r"array 7 of an earlier start with --cluster .* scancel --name tiny-abc"):
        refuse_under_way(folder)
    monkeypatch.setattr(trials, "FORGOTTEN_SECONDS", 0.2)
    polls = 0

    def report(states: Mapping[str, State]) -> None:
        """The array is gone after one look; then SLURM is away, comes back, and knows none of the jobs."""
        nonlocal polls
        polls += 1
        if polls == 2:
            slurm_away()
        elif polls == 12:
            queue("")

    one, said = executor(tmp_path)
    states = one.run(jobs[:1], report)
    assert states == {"s0": "failed"}
    assert said == [
        "array 7 was cut short as it was submitted and is being ended; waiting", "array 8: 1 training(s) submitted",
        "SLURM does not answer; the jobs are kept", "SLURM answers again",
    ]  # fmt: skip
    assert (tmp_path / "cancelled").read_text() == "--name tiny-abc\n"
    assert "SLURM knows nothing of job 8" in (folder / "logs" / "s0.log").read_text()
    assert [path.stem[:5] for path in (folder / "arrays").iterdir()] == ["tiny-"]
    refuse_under_way(folder)
    slurm_away()
    with pytest.raises(InputError, match="SLURM does not answer, so jobs of an earlier start"):
        refuse_under_way(folder)


def test_local_clusters_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match="needs executor: slurm"):
        ArrayExecutor(tmp_path, "tiny", ClusterConfig(executor="local"))
