"""Sweeps: W&B's YAML becomes a search without a server; interrupted ones go on; the same YAML suits W&B's agent."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.trial import TrialState

from launch.sweep import Sweep, overrides, plot, summary
from mffm.config.base import load, validate
from mffm.config.cluster import ClusterConfig
from mffm.config.sweep import SweepConfig
from mffm.errors import InputError
from mffm.executor import Job, State

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))


def sweep_of(method: str = "random", **sections: Any) -> SweepConfig:
    content = {
        "name": "sweep",
        "method": method,
        "metric": {"name": "val/loss", "goal": "minimize"},
        "parameters": {"optim.lr": {"distribution": "log_uniform_values", "min": 1e-6, "max": 0.1}},
    }
    return validate(SweepConfig, {**content, **sections}, "test")


class Trainings:
    """An executor without processes: a trial's loss is a function of its number, one row per validation."""

    def __init__(
        self,
        losses: Callable[[int, int], float],
        validations: int = 4,
        interrupt: "Sweep | None" = None,
        finish: int | None = None,
    ):
        self.losses, self.validations, self.finish = losses, validations, finish
        self.commands: list[list[str]] = []
        self.stop_in: int | None = None
        self.sweep = interrupt

    def run(self, jobs: Sequence[Job], report: Callable[[Mapping[str, State]], None]) -> Mapping[str, State]:
        (job,) = jobs
        self.commands.append(list(job.command[3:]))
        number = int(job.name.removeprefix("trial-"))
        folder = job.log.parent / job.name
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        done = len(path.read_text().splitlines()) if path.is_file() else 0
        for n in range(done, self.validations):
            with path.open("a") as file:
                row = {"step": n, "val/loss": self.losses(number, n)}
                if self.finish is not None:  # as of a plan whose last part begins there
                    seen = range(self.finish if n >= self.finish else 0, n + 1)
                    row["best"] = min(self.losses(number, i) for i in seen)
                file.write(json.dumps(row) + "\n")
            (folder / "checkpoints" / "latest").write_text("x")
            if self.stop_in == number and n == 1:
                assert self.sweep is not None
                self.sweep._stop.set()
            report({job.name: "running"})
        report({job.name: "done"})
        return {job.name: "done"}


def run_sweep(
    config: SweepConfig, recipe: Path, folder: Path, trainings: Any, trials: int, workers: int = 1, **kwargs: Any
) -> Sweep:
    sweep = Sweep(config, recipe, folder, executor=lambda: trainings, say=lambda text: None, **kwargs)
    sweep.run(trials, workers)
    return sweep


def states(sweep: Sweep) -> list[str]:
    return [t.state.name for t in sweep.study.trials]


def test_shipped_sweeps_suit_their_recipe_and_the_agent_of_wandb(tmp_path: Path):
    """The agent's own code fills in the command; sh gives each trial the run folder of its id."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    assert SHIPPED
    for path in SHIPPED:
        config = load(SweepConfig, path)
        assert config.command is not None
        chosen = {n: {"value": p.value or (p.values or [p.min])[0]} for n, p in config.parameters.items()}
        filled = create_sweep_command_args({"args": chosen})
        command: list[str] = []
        for chunk in create_sweep_command(list(config.command)):
            key = chunk.removeprefix("${").removesuffix("}")
            command += filled[key] if chunk.startswith("${args") else [chunk]
        assert command[0] == "${env}"
        stub = tmp_path / "mffm"
        stub.write_text(f"#!{sys.executable}\nimport sys, json\nprint(json.dumps(sys.argv[1:]))\n")
        stub.chmod(0o755)
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "abc123"}
        done = subprocess.run(command[1:], capture_output=True, text=True, env=environment, check=True)
        verb, recipe, *given = json.loads(done.stdout)
        assert verb == "train"
        from mffm.config.recipe import Recipe

        loaded = load(Recipe, ROOT / recipe, given)
        assert loaded.run_folder.endswith("/abc123")
        assert loaded.log.group == config.name


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"parameters": {"optim.lr": {"max": 1}}}, "needs min and max"),
        ({"parameters": {"optim.lr": {"min": 2.0, "max": 1.0}}}, "min 2 is not below max 1"),
        ({"parameters": {"optim": {"parameters": {"lr": {"value": 1}}}}}, "dotted name"),
        ({"parameters": {"optim.lr": {"distribution": "normal", "mu": 0, "sigma": 1}}}, "distribution"),
        ({"parameters": {"run": {"value": "x"}}}, "set by the sweep itself"),
        ({"method": "grid"}, "continuous"),
        ({"early_terminate": {"type": "hyperband"}}, "min_iter"),
    ],
)
def test_bad_sweeps_are_one_message(section: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        sweep_of(**section)


def test_values_reach_the_recipe_with_their_types(make_recipe: Callable[..., Path], tmp_path: Path):
    parameters = {
        "optim.lr": {"distribution": "log_uniform_values", "min": 1e-8, "max": 2e-8},
        "model.heads.hidden": {"values": [[8, 4]]},
        "train.patience": {"value": None},
        "optim.warmup_steps": {"min": 3, "max": 9},
        "data.plan.paired": {"values": [True]},
    }
    trainings = Trainings(lambda number, n: 1.0)
    sweep = run_sweep(sweep_of(parameters=parameters), make_recipe(), tmp_path / "s", trainings, 2)
    content = yaml.safe_load(yaml.safe_dump(dict(o.split("=", 1) for o in overrides(sweep.study.trials[0]))))
    read = {k: yaml.safe_load(v) for k, v in content.items()}
    assert read["model.heads.hidden"] == [8, 4]
    assert read["train.patience"] is None
    assert read["data.plan.paired"] is True
    assert isinstance(read["optim.lr"], float)
    assert 3 <= read["optim.warmup_steps"] <= 9
    command = trainings.commands[0]
    assert command[0] == "train"
    assert f"run={tmp_path / 's' / 'trial-0000'}" in command
    assert "log.group=sweep" in command


def test_an_unknown_name_stops_before_anything_runs(make_recipe: Callable[..., Path], tmp_path: Path):
    trainings = Trainings(lambda number, n: 1.0)
    with pytest.raises(InputError, match=r"optim\.rate: unknown key"):
        run_sweep(sweep_of(parameters={"optim.rate": {"value": 1}}), make_recipe(), tmp_path / "s", trainings, 1)
    assert trainings.commands == []


def test_a_grid_is_gone_through_once_by_two_workers(make_recipe: Callable[..., Path], tmp_path: Path):
    parameters = {"optim.lr": {"values": [0.1, 0.01]}, "optim.warmup_steps": {"min": 1, "max": 3}}
    trainings = Trainings(lambda number, n: float(number))
    sweep = run_sweep(sweep_of("grid", parameters=parameters), make_recipe(), tmp_path / "s", trainings, 50, workers=2)
    assert states(sweep) == ["COMPLETE"] * 6
    assert len({tuple(sorted(t.params.items())) for t in sweep.study.trials}) == 6


def test_a_run_counts_by_the_weights_that_it_keeps(make_recipe: Callable[..., Path], tmp_path: Path):
    """Where a run ends on one fidelity alone its best weights are from there, not from where the loss was least."""
    recipe, losses = make_recipe(), [[1.0, 4.0, 6.0, 7.0], [3.0, 4.0, 2.0, 5.0]]
    grid = sweep_of("grid", parameters={"optim.lr": {"values": [0.01, 0.001]}})
    trainings = Trainings(lambda number, n: losses[number][n], finish=2)
    sweep = run_sweep(grid, recipe, tmp_path / "s", trainings, 2)
    assert [t.value for t in sweep.study.trials] == [6.0, 2.0]
    other = sweep_of(
        "grid", parameters={"optim.lr": {"values": [0.01, 0.001]}}, metric={"name": "step", "goal": "minimize"}
    )
    sweep = run_sweep(other, recipe, tmp_path / "other", trainings, 2)
    assert [t.value for t in sweep.study.trials] == [0.0, 0.0], "another metric than that of the weights: its least"


def test_an_interrupted_sweep_resumes_its_trial_and_keeps_the_finished(
    make_recipe: Callable[..., Path], tmp_path: Path
):
    recipe, config = make_recipe(), sweep_of("bayes")
    trainings = Trainings(lambda number, n: 10.0 * number + abs(n - 2))
    first = Sweep(config, recipe, tmp_path / "s", executor=lambda: trainings, say=lambda text: None)
    trainings.sweep, trainings.stop_in = first, 1
    first.run(4, 1)
    assert first.stopped
    assert states(first) == ["COMPLETE", "RUNNING"]
    assert "| 0001 | unfinished |" in summary(first)
    trainings.stop_in = None
    trainings.commands.clear()
    second = run_sweep(config, recipe, tmp_path / "s", trainings, 4)
    assert states(second) == ["COMPLETE"] * 4
    assert trainings.commands[0] == ["resume", str(tmp_path / "s" / "trial-0001")]
    assert [c[0] for c in trainings.commands] == ["resume", "train", "train"]
    assert [t.value for t in second.study.trials] == [0.0, 10.0, 20.0, 30.0]  # the best validation, not the last
    assert len({t.params["optim.lr"] for t in second.study.trials}) == 4
    text = summary(second)
    assert text.index("| 0000 | complete | 0 |") < text.index("| 0003 | complete | 30 |")
    plot(second, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    with pytest.raises(InputError, match="another metric"):
        run_sweep(sweep_of("bayes", metric={"name": "lr", "goal": "minimize"}), recipe, tmp_path / "s", trainings, 4)


def test_hyperband_ends_bad_trials_early(make_recipe: Callable[..., Path], tmp_path: Path):
    config = sweep_of(early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2})
    trainings = Trainings(lambda number, n: float(number), validations=8)
    sweep = run_sweep(config, make_recipe(), tmp_path / "s", trainings, 6)
    assert states(sweep)[0] == "COMPLETE"
    assert states(sweep).count("PRUNED") >= 4
    rows = (tmp_path / "s" / "trial-0005" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) < 8
    assert "| 0005 | pruned | 5 |" in summary(sweep)


def test_a_metric_that_is_never_measured_stops_the_sweep(make_recipe: Callable[..., Path], tmp_path: Path):
    config = sweep_of(metric={"name": "val/pbe/loss", "goal": "minimize"})
    with pytest.raises(InputError, match=r"no metric 'val/pbe/loss' .* the run measures: val/loss"):
        run_sweep(config, make_recipe(), tmp_path / "s", Trainings(lambda number, n: 1.0), 5)


def test_failed_trials_are_kept_apart_and_three_without_a_success_stop(
    make_recipe: Callable[..., Path], tmp_path: Path
):
    class Failing:
        def run(self, jobs: Sequence[Job], report: Callable[[Mapping[str, State]], None]) -> Mapping[str, State]:
            jobs[0].log.write_text("something\nerror: the store is gone\n\n")
            return {jobs[0].name: "failed"}

    with pytest.raises(InputError, match="the first 3 trials failed, the last with: error: the store is gone"):
        run_sweep(sweep_of(), make_recipe(), tmp_path / "s", Failing(), 9)
    sweep = run_sweep(sweep_of(), make_recipe(), tmp_path / "s", Trainings(lambda number, n: 1.0), 4)
    assert states(sweep) == ["FAIL"] * 3 + ["COMPLETE"]


def test_one_controller_a_folder_and_no_orphans(make_recipe: Callable[..., Path], tmp_path: Path):
    import fcntl

    recipe, folder = make_recipe(), tmp_path / "s"
    trainings = Trainings(lambda number, n: 1.0)
    sweep = Sweep(sweep_of(), recipe, folder, executor=lambda: trainings, say=lambda text: None)
    trainings.sweep, trainings.stop_in = sweep, 0
    sweep.run(1, 1)
    assert sweep.study.trials[0].state is TrialState.RUNNING
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="another controller"):
            run_sweep(sweep_of(), recipe, folder, trainings, 1)
    orphan = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", f"run={folder / 'trial-0000'}"])
    try:
        with pytest.raises(InputError, match=f"process {orphan.pid} of an earlier start"):
            run_sweep(sweep_of(), recipe, folder, trainings, 1)
    finally:
        orphan.kill()
        orphan.wait()


def test_trials_on_a_cluster_are_adopted_and_pruned(
    make_recipe: Callable[..., Path], tmp_path: Path, slurm_programs: Path, program: Callable[[str, str], None]
):
    """With programs in place of SLURM's: what is asked of them, after an interruption and after a bad trial."""
    folder, recipe = tmp_path / "s", make_recipe()
    config = sweep_of(early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2})
    trainings = Trainings(lambda number, n: float(number), validations=8)
    run_sweep(config, recipe, folder, trainings, 4)
    cluster = validate(ClusterConfig, {"executor": "slurm"}, "test")
    program("scontrol", "echo JobState=PENDING")
    said: list[str] = []
    first = Sweep(config, recipe, folder, say=said.append, cluster=cluster)
    threading.Timer(2.0, first._stop.set).start()
    first.run(5, 1)
    assert states(first)[4] == "RUNNING"
    assert said[1:] == ["trial-0004: job 8 submitted", "trial-0004 goes on in the queue"]
    run = folder / "trial-0004"
    name = f"sweep-{first.study.user_attrs['token']}-0004"
    assert f"#SBATCH --job-name={name}" in (slurm_programs / "8.sh").read_text()
    assert yaml.safe_load((run / "cluster.yaml").read_text())["environment"]["WANDB_RUN_ID"] == name

    with pytest.raises(InputError, match=r"job 8 of an earlier start .* scancel 8"):
        run_sweep(config, recipe, folder, trainings, 5)
    # The controller died before it wrote down the job; the job trains, and badly.
    (run / "job.json").unlink()
    program("squeue", f'[ "$5" = {name} ] && echo 8')
    program("scancel", f"echo $1 >> {tmp_path}/cancelled")
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "val/loss": 99.0}) + "\n" for n in range(4)))
    second = Sweep(config, recipe, folder, say=said.append, cluster=cluster)
    second.run(5, 1)
    assert states(second)[4] == "PRUNED"
    assert said[-2:] == ["trial-0004: job 8 adopted", "trial-0004 pruned"]
    assert (tmp_path / "cancelled").read_text() == "8\n"
    assert not (slurm_programs / "9.sh").exists()

    program("squeue", "exit 1")
    program("scontrol", "echo JobState=NODE_FAIL")
    third = Sweep(config, recipe, folder, say=said.append, cluster=cluster)
    third.run(6, 1)
    assert states(third)[5] == "FAIL"
    assert "job 9 is NODE_FAIL" in said[-1]
    local = validate(ClusterConfig, {"executor": "local"}, "test")
    with pytest.raises(InputError, match="needs executor: slurm"):
        Sweep(config, recipe, folder, cluster=local)


def test_the_controller_imports_no_torch():
    code = "import sys, launch.sweep, optuna, matplotlib.figure; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout == "False\n"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_real_trainings_interrupted_and_resumed(make_recipe: Callable[..., Path], tmp_path: Path):
    recipe = make_recipe(log={"wandb": "offline"}, train={"steps": 40, "validate_every": 20, "save_every": 2})
    yaml_file = tmp_path / "sweep.yaml"
    content = sweep_of(parameters={"optim.lr": {"values": [0.001, 0.002, 0.003]}}).model_dump(exclude_unset=True)
    yaml_file.write_text(yaml.safe_dump(content))
    folder = tmp_path / "s"
    command = [sys.executable, "-m", "launch.sweep", str(yaml_file), "--recipe", str(recipe)]
    command += ["--trials", "5", "--workers", "2", "--folder", str(folder)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (folder / "trial-0000" / "checkpoints" / "latest").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    out = first.communicate(timeout=120)[0]
    assert first.returncode == 75, out
    assert "unfinished" in out
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr
    assert "trial-0000 resumed" in done.stdout
    assert done.stdout.count("| complete |") == 5
    for number in range(5):
        run = folder / f"trial-{number:04d}"
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [r["step"] for r in rows if "train/loss" in r]
        assert steps == list(range(1, 41))
        ids = {p.name.split("-", 3)[3] for p in (run / "wandb").glob("offline-run-*")}
        assert len(ids) == 1, "a resumed trial is the same W&B run"
        assert ids.pop().endswith(f"-{number:04d}")
    assert (folder / "summary.md").is_file()
    assert (folder / "sweep.png").is_file()
