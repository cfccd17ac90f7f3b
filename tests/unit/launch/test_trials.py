"""A trial as a SLURM job while SLURM is away: it is neither over nor submitted again."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from launch import records, trials
from launch.machine import job_state
from launch.submit import submit
from mffm.config.base import load
from mffm.config.cluster import ClusterConfig
from mffm.config.recipe import Recipe
from mffm.errors import InputError
from mffm.executor import Job, State

SLURM = ClusterConfig(executor="slurm")


def test_an_outage_ends_no_trial_and_submits_none_again(
    make_recipe: Callable[..., Path],
    slurm_programs: Path,
    slurm_away: Callable[[], None],
    program: Callable[[str, str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    recipe = load(Recipe, make_recipe())
    (one,) = submit(recipe, SLURM, job_name="trial")
    monkeypatch.setattr(trials, "FORGOTTEN_SECONDS", 0.2)
    said: list[str] = []
    polls: list[State] = []

    def report(states: Mapping[str, State]) -> None:
        """SLURM is away, comes back with the job in the queue, is away for longer than it may forget a job, ends it."""
        polls.extend(states.values())
        if len(polls) in (3, 12):
            program("scontrol", f"echo JobState={'PENDING' if len(polls) == 3 else 'FAILED'}")
        elif len(polls) == 6:
            slurm_away()

    slurm_away()
    with pytest.raises(InputError, match=r"SLURM does not answer, so a job may still train it"):
        trials.under_way(one.folder, "trial")
    executor = trials.ClusterExecutor(recipe, SLURM, said.append, poll_seconds=0.1)
    job = Job("trial", [], tmp_path / "trial.log")
    assert executor.run([job], report) == {"trial": "failed"}
    assert said == [
        "SLURM does not answer; trial waits until it does", "job 8 adopted", "SLURM does not answer; job 8 is kept",
        "job 8 is FAILED",
    ]  # fmt: skip
    assert len(polls) == 13
    assert [path.name for path in slurm_programs.iterdir()] == ["8.sh"]


def test_nothing_is_free_to_submit_in_an_outage(
    make_recipe: Callable[..., Path], slurm_programs: Path, slurm_away: Callable[[], None]
):
    recipe = load(Recipe, make_recipe())
    (one,) = submit(recipe, SLURM)
    assert job_state(one.job, SLURM, one.folder) == "failed"  # forgotten
    slurm_away()
    assert job_state(one.job, SLURM, one.folder) == "running"
    with pytest.raises(InputError, match=r"SLURM does not answer, so job 8 of this run may be under way.*remove"):
        submit(recipe, SLURM)
    (one.folder / "job.json").unlink()
    with pytest.raises(InputError, match="SLURM does not answer"):  # a controller may have died after sbatch
        trials.under_way(one.folder, "trial")
    (one.folder / "cluster.yaml").unlink()
    assert trials.under_way(one.folder, "trial") is None
    assert records.read_json(one.folder / "job.json") == {}
