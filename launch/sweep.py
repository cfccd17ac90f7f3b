"""Sweeps without a server: ``python -m launch.sweep SWEEP.yaml --recipe RECIPE --trials N --workers W``.

The YAML is W&B's. Optuna chooses the values and keeps the study in a journal file in the sweep's folder; each trial is
an ordinary training run in a folder of its own and a W&B run in one group. With ``--cluster`` a trial is a SLURM job.
The same command goes on after an interruption: finished trials are kept, unfinished ones resumed from their last
checkpoint, jobs that are still in the queue or running adopted.
"""

import itertools
import json
import math
import secrets
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from launch.trials import ClusterExecutor, cancel, under_way
from mffm.config.base import as_overrides, load
from mffm.config.cluster import ClusterConfig
from mffm.config.recipe import Recipe
from mffm.config.sweep import Parameter, SweepConfig
from mffm.errors import EXIT_INTERRUPTED, InputError, known
from mffm.executor import Executor, Job, LocalExecutor, State, handling_stops, locked, process_of

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.study import Study
    from optuna.trial import FrozenTrial


MAX_FAILURES = 3  # and not one success: it is the recipe or the machine, not the values


class _Stopped(Exception):
    """The sweep was interrupted: leave the trial for the next start."""


class _Pruned(Exception):
    """The trial is worse than the others at this point."""


# The search space


def distribution(parameter: Parameter) -> "BaseDistribution":
    """Return a parameter as Optuna's; choices are JSON texts, because Optuna takes only scalars there."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if parameter.distribution == "constant":
        return CategoricalDistribution([json.dumps(parameter.value)])
    if parameter.values is not None:
        return CategoricalDistribution([json.dumps(v) for v in parameter.values])
    low, high = parameter.range
    if parameter.distribution == "int_uniform":
        return IntDistribution(int(low), int(high))
    log = parameter.distribution in ("log_uniform", "log_uniform_values")
    return FloatDistribution(low, high, log=log, step=None if log else parameter.q)


def values(trial: "FrozenTrial") -> dict[str, Any]:
    """Return what a trial sets: dotted name → value."""
    return {name: json.loads(v) if isinstance(v, str) else v for name, v in trial.params.items()}


def overrides(trial: "FrozenTrial") -> list[str]:
    """Return what a trial sets as overrides."""
    return as_overrides(values(trial))


def _grid(config: SweepConfig) -> dict[str, list[Any]]:
    grid: dict[str, list[Any]] = {}
    for name, parameter in config.parameters.items():
        if parameter.distribution == "constant":
            grid[name] = [json.dumps(parameter.value)]
        elif parameter.values is not None:
            grid[name] = [json.dumps(v) for v in parameter.values]
        else:
            low, high = parameter.range
            step = parameter.q or 1
            count = int((high - low) / step + 1e-9) + 1
            points = [low + i * step for i in range(count)]
            grid[name] = [int(p) for p in points] if parameter.distribution == "int_uniform" else points
    return grid


def _study(config: SweepConfig, folder: Path, seed: int) -> "Study":
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    stop = config.early_terminate
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if stop is not None:
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=stop.first, reduction_factor=stop.eta)
    study = optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / "study.journal"))),
        study_name=config.name,
        direction=config.metric.goal,
        pruner=pruner,
        load_if_exists=True,
    )
    # The count moves the seed: a sampler that starts anew would draw the same values again.
    seed += len(study.trials)
    if config.method == "bayes":
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=5, constant_liar=True)
    else:  # a grid's values are given to `ask` as a queued trial
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
    fixed = config.model_dump(mode="json", exclude={"description", "run_cap", "command", "program"})
    before = study.user_attrs.get("sweep")
    if before not in (None, fixed):
        changed = [k for k in fixed if before.get(k) != fixed[k]]
        raise InputError(
            f"{folder}: holds a sweep with another {', '.join(changed)}; give another --folder, or the same YAML"
        )
    if before is None:
        study.set_user_attr("sweep", fixed)
        study.set_user_attr("token", secrets.token_hex(3))  # W&B ids must differ between sweeps of one name
    return study


# Trials


@dataclass
class Sweep:
    """A sweep in its folder.

    Attributes:
        executor: makes what runs one trial on this machine; a new one for every trial.
        cluster: run trials there instead.
    """

    config: SweepConfig
    recipe: Path
    folder: Path
    fixed: Sequence[str] = ()
    executor: Callable[[], Executor] = lambda: LocalExecutor(workers=1, poll_seconds=0.2)
    seed: int = 0
    say: Callable[[str], None] = print
    cluster: ClusterConfig | None = None

    def __post_init__(self) -> None:
        if self.cluster is not None and self.cluster.executor != "slurm":
            raise InputError("--cluster needs executor: slurm; without --cluster, trials run on this machine")
        self.folder = self.folder.resolve()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._names = {n: distribution(p) for n, p in self.config.parameters.items()}

    def run(self, trials: int, workers: int) -> "Study":
        """Bring the sweep to so many trials, unfinished ones of an earlier start first; return the study.

        Raises:
            InputError: the sweep and the recipe do not fit; another controller or an orphan is at work in the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / "lock"):
            self.study = _study(self.config, self.folder, self.seed)
            if self.config.method == "grid":
                trials = min(trials, math.prod(len(v) for v in _grid(self.config).values()))
            self._wanted = trials
            self._left = self._unfinished()
            (self.folder / "sweep.yaml").write_text(
                yaml.safe_dump(self.config.model_dump(mode="json", exclude_unset=True), sort_keys=False)
            )
            threads = [threading.Thread(target=self._work, name=f"worker-{i}") for i in range(workers)]
            with self._signals():
                for thread in threads:
                    thread.start()
                for thread in threads:
                    while thread.is_alive():  # short waits: a join without an end would hold signals up
                        thread.join(0.2)
            if self._error is not None:
                raise self._error
            return self.study

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def path(self, trial: "FrozenTrial") -> Path:
        """Return the run folder of a trial."""
        return self.folder / f"trial-{trial.number:04d}"

    def _name(self, trial: "FrozenTrial") -> str:
        """Return a trial's id in W&B and in the queue; no other sweep has it."""
        return f"{self.config.name}-{self.study.user_attrs['token']}-{trial.number:04d}"

    def _unfinished(self) -> "list[FrozenTrial]":
        from optuna.trial import TrialState

        left = []
        for trial in self.study.get_trials(states=[TrialState.RUNNING]):
            if set(trial.params) != set(self._names):  # killed between its birth and its values
                self.study.tell(trial.number, state=TrialState.FAIL)
                continue
            job = under_way(self.path(trial), self._name(trial))
            orphan = None if job is not None else process_of(self.path(trial))
            if job is not None and self.cluster is None:
                raise InputError(
                    f"{self.path(trial)}: SLURM job {job} of an earlier start with --cluster trains it; go on with "
                    f"--cluster, or end it first: scancel {job}"
                )
            if orphan is not None:
                raise InputError(
                    f"{self.path(trial)}: process {orphan} of an earlier start still trains it; end it (kill {orphan} "
                    "saves a checkpoint first) and give the same command again"
                )
            left.append(trial)
        return left

    def _next(self) -> "FrozenTrial | None":
        from optuna.trial import TrialState

        with self._lock:
            if self._stop.is_set():
                return None
            if self._left:
                return self._left.pop(0)
            counted = [t for t in self.study.get_trials(deepcopy=False) if set(t.params) == set(self._names)]
            if len(counted) >= self._wanted:
                return None
            if self.config.method == "grid":
                # Optuna's own grid sampler ends with Study.stop(), which ask and tell may not call.
                points = [
                    dict(zip(self._names, p, strict=True)) for p in itertools.product(*_grid(self.config).values())
                ]
                made = [t.params for t in counted]
                if not self.study.get_trials(states=[TrialState.WAITING]):  # one is left where a kill came just here
                    self.study.enqueue_trial(next(p for p in points if p not in made))
            number = self.study.ask(fixed_distributions=self._names).number
            return self.study.trials[number]

    def _work(self) -> None:
        try:
            while (trial := self._next()) is not None:
                self._run(trial)
        except BaseException as error:  # noqa: BLE001 (handed to the main thread)
            self._error = self._error or error
            self._stop.set()

    def _run(self, trial: "FrozenTrial") -> None:
        from optuna.trial import TrialState

        folder = self.path(trial)
        chosen = [
            *self.fixed,
            *overrides(trial),
            f"run={folder}",
            f"log.group={self.config.name}",
        ]
        if self.config.project:
            chosen.append(f"log.project={self.config.project}")
        recipe = load(Recipe, self.recipe, chosen)  # a wrong name is one message, not a failed training
        resumed = (folder / "checkpoints" / "latest").exists()
        arguments = ["resume", str(folder)] if resumed else ["train", str(self.recipe), *chosen]
        environment = {"WANDB_RUN_ID": self._name(trial), "WANDB_JOB_TYPE": "trial"}
        name = f"trial-{trial.number:04d}"
        key = name if self.cluster is None else self._name(trial)
        job = Job(key, [sys.executable, "-m", "mffm", *arguments], self.folder / f"{name}.log", environment)
        self.say(f"{name} {'resumed' if resumed else 'started'}: {' '.join(overrides(trial))}")
        try:
            state = self._executor(recipe, name).run([job], self._watch(trial, folder))[key]
        except _Stopped:
            self.say(f"{name} interrupted" if self.cluster is None else f"{name} goes on in the queue")
            return
        except _Pruned:
            cancel(folder)
            self.study.tell(trial.number, state=TrialState.PRUNED)
            self.say(f"{name} pruned")
            return
        except InputError:
            if not self._stop.is_set():  # Ctrl-C may have reached sbatch
                raise
            self.say(f"{name} interrupted")
            return
        seen = self._curve(folder)
        if self._stop.is_set() and state == "failed":  # Ctrl-C reached the training before it reached us
            self.say(f"{name} interrupted")
        elif state == "failed":
            self.study.tell(trial.number, state=TrialState.FAIL)
            self.say(f"{name} failed: {_last_line(job.log)} ({job.log})")
            states = [t.state for t in self.study.get_trials(deepcopy=False)]
            if states.count(TrialState.FAIL) >= MAX_FAILURES and TrialState.COMPLETE not in states:
                raise InputError(f"the first {MAX_FAILURES} trials failed, the last with: {_last_line(job.log)}")
        elif not seen:
            self.study.tell(trial.number, state=TrialState.FAIL)
            raise InputError(
                f"metric.name: no metric {self.config.metric.name!r} in {folder / 'metrics.jsonl'}; the run measures: "
                f"{known(_metric_names(folder))}"
            )
        else:
            value = self._best(seen)
            # That of the weights: not the least one where the run ends on some fidelities alone.
            if self.config.metric.name == recipe.train.best and self.config.metric.goal == "minimize":
                value = [row.get("best", value) for row in _rows(folder) if self.config.metric.name in row][-1]
            self.study.tell(trial.number, value)
            self.say(f"{name} done: {self.config.metric.name} {value:.6g}")

    def _executor(self, recipe: Recipe, name: str) -> Executor:
        if self.cluster is None:
            return self.executor()
        return ClusterExecutor(recipe, self.cluster, lambda text: self.say(f"{name}: {text}"))

    def _watch(self, trial: "FrozenTrial", folder: Path) -> Callable[[Mapping[str, State]], None]:
        """Return what the executor calls now and then; an exception ends the process, which saves a checkpoint."""
        from optuna.trial import Trial

        live = Trial(self.study, trial._trial_id)
        told = {"n": len(trial.intermediate_values)}

        def report(states: Mapping[str, State]) -> None:
            running = not {"done", "failed"} & set(states.values())
            if self._stop.is_set() and running:
                raise _Stopped
            seen = self._curve(folder)
            with self._lock:
                for n in range(told["n"], len(seen)):
                    live.report(seen[n], step=n + 1)  # W&B counts validations, not steps
                    told["n"] = n + 1
                    if running and live.should_prune():
                        raise _Pruned

        return report

    def _curve(self, folder: Path) -> list[float]:
        """Return the metric's values so far."""
        return [row[self.config.metric.name] for row in _rows(folder) if self.config.metric.name in row]

    def _best(self, seen: Sequence[float]) -> float:
        finite = [v for v in seen if math.isfinite(v)] or [math.inf]
        return min(finite) if self.config.metric.goal == "minimize" else max(finite)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn SIGINT and SIGTERM into a stop that leaves every trial with a checkpoint."""

        def handler(number: int, frame: object) -> None:
            self._stop.set()

        with handling_stops(handler):
            yield


def _rows(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # a line that is being written
    return rows


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "no message")


def _metric_names(folder: Path) -> set[str]:
    return {name for row in _rows(folder) for name in row if name not in ("step", "time")}


# The end: a table and a plot


def summary(sweep: Sweep) -> str:
    """Return the sweep as a Markdown table, the best trial first."""
    config = sweep.config
    varied = [n for n, p in config.parameters.items() if p.distribution != "constant"]
    sign = 1 if config.metric.goal == "minimize" else -1
    trials = [t for t in sweep.study.trials if set(t.params) == set(config.parameters)]
    order = {"COMPLETE": 0, "PRUNED": 1, "RUNNING": 2, "FAIL": 3}

    def last(trial: "FrozenTrial") -> float | None:
        seen = list(trial.intermediate_values.values())
        return trial.value if trial.value is not None else sweep._best(seen) if seen else None

    def rank(trial: "FrozenTrial") -> tuple[int, float, int]:
        value = last(trial)
        return order.get(trial.state.name, 9), math.inf if value is None else sign * value, trial.number

    trials.sort(key=rank)
    lines = [
        f"# {config.name}: {config.method}, {config.metric.goal} {config.metric.name}",
        "",
        f"| trial | state | {config.metric.name} | {' | '.join(varied)} | step | minutes |",
        "|---" * (len(varied) + 5) + "|",
    ]
    for trial in trials:
        value, chosen, rows = last(trial), values(trial), _rows(sweep.path(trial))
        minutes = "" if trial.duration is None else f"{trial.duration.total_seconds() / 60:.1f}"
        cells = [f"{chosen[n]:.4g}" if isinstance(chosen[n], float) else json.dumps(chosen[n]) for n in varied]
        state = "unfinished" if trial.state.name == "RUNNING" else trial.state.name.lower()
        shown = "" if value is None else f"{value:.6g}"
        step = max((r["step"] for r in rows), default=0)
        lines.append(f"| {trial.number:04d} | {state} | {shown} | {' | '.join(cells)} | {step:g} | {minutes} |")
    fixed = {n: p.value for n, p in config.parameters.items() if p.distribution == "constant"}
    if fixed:
        lines += ["", "Fixed: " + ", ".join(f"`{n}={json.dumps(v)}`" for n, v in fixed.items())]
    if trials and trials[0].state.name == "COMPLETE":
        lines += ["", f"Best: {sweep.path(trials[0])}", "", f"    mffm train {sweep.recipe} " + " ".join(
            [*sweep.fixed, *overrides(trials[0])]
        )]  # fmt: skip
    return "\n".join(lines) + "\n"


def plot(sweep: Sweep, path: Path) -> None:
    """Draw the best value so far over the trials, and the value over each parameter."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

    config = sweep.config
    done = [t for t in sweep.study.trials if t.state.name == "COMPLETE"]
    varied = [n for n, p in config.parameters.items() if p.distribution != "constant"]
    figure = Figure(figsize=(4 * (1 + len(varied)), 3.5), layout="constrained")
    axes = figure.subplots(1, 1 + len(varied), squeeze=False)[0]
    numbers, found = [t.number for t in done], [float(t.value or 0.0) for t in done]
    best = list(itertools.accumulate(found, min if config.metric.goal == "minimize" else max))
    axes[0].plot(numbers, found, "o", label="trial")
    axes[0].step(numbers, best, where="post", label="best so far")
    axes[0].set(xlabel="trial", ylabel=config.metric.name)
    axes[0].legend()
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis, name in zip(axes[1:], varied, strict=True):
        parameter, shown = config.parameters[name], [values(t)[name] for t in done]
        axis.plot(shown if parameter.values is None else [json.dumps(v) for v in shown], found, "o")
        axis.set(xlabel=name, ylabel=config.metric.name)
        if shown and "log" in (parameter.distribution or ""):
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.xaxis.set_minor_formatter(NullFormatter())
    figure.savefig(path, dpi=120)


def main(
    sweep: Annotated[Path, typer.Argument(help="sweep YAML, as for `wandb sweep`")],
    recipe: Annotated[Path, typer.Option(help="recipe YAML that the trials override")],
    fixed: Annotated[list[str] | None, typer.Argument(help="key.key=value for every trial")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="in all; the YAML's run_cap where not given")] = None,
    workers: Annotated[int, typer.Option(min=1, help="trials at a time")] = 1,
    folder: Annotated[Path | None, typer.Option(help="runs/sweeps/<name> where not given")] = None,
    seed: Annotated[int, typer.Option(help="of the search")] = 0,
    cluster: Annotated[Path | None, typer.Option(help="cluster YAML: trials are SLURM jobs")] = None,
) -> None:
    """Run a sweep without a server, on this machine or a cluster; the same command goes on after an interruption."""
    try:
        config = load(SweepConfig, sweep)
        wanted = trials or config.run_cap
        if wanted is None:
            raise InputError(f"{sweep}: say how many trials with --trials, or with run_cap in the YAML")
        task = Sweep(
            config, recipe, folder or Path("runs/sweeps") / config.name, fixed or [], seed=seed, say=typer.echo,
            cluster=None if cluster is None else load(ClusterConfig, cluster),
        )  # fmt: skip
        task.run(wanted, workers)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    text = summary(task)
    (task.folder / "summary.md").write_text(text)
    plot(task, task.folder / "sweep.png")
    typer.echo(text)
    if task.stopped:
        left = "" if cluster is None else "; jobs that were submitted go on without it, and it adopts them"
        typer.echo(f"interrupted; the same command goes on{left}")
        raise typer.Exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    typer.run(main)
