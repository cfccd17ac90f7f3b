"""The checks of ``mffm selftest``, in the order in which they need each other."""

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mffm.config.base import dump
from mffm.errors import InputError
from mffm.release import read_weights
from mffm.selftest import data, runs
from mffm.selftest.machine import CheckFailedError, Machine, NotApplicableError, TrainingJob
from mffm.selftest.report import Report, Result

# Relative, of losses over two dozen steps: sums in another order, on other ranks or by GPU kernels without a
# fixed order. Measured 8e-5 on 4 CPU ranks; an optimiser state that is wrong by half shows as 6e-2 at the second step.
ROUNDING = 1e-3
GPU_DRIFT = 0.05  # relative, of the mean loss of a whole run that is repeated on GPUs, where rounding grows
REPEATED = 5  # steps between the last checkpoint and a kill, which the resumed run has to repeat
PARITY = 1e-5  # relative, of gradients and parameters
DEATH_SECONDS = 90.0  # within which a job has to end after one of its ranks was killed
JOB_SECONDS = 600.0  # that one job of the self-test may run
TELL_SECONDS = 30.0  # between lines of progress
COMPARED = 12  # steps on 1 and on N ranks
ELASTIC_STEPS = 10  # on each number of ranks
HEADROOM = 1.2  # loader over training, in edges/s; below, the training waits for its data


@dataclass
class Selftest:
    """One self-test of a machine in a folder.

    Attributes:
        say: gets lines of progress.
        parity_bound: relative error of gradients and parameters that passes.
    """

    machine: Machine
    folder: Path
    quick: bool
    say: Callable[[str], None]
    parity_bound: float = PARITY
    report: Report = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.folder.resolve()
        self.n = self.machine.n_ranks
        self.report = Report(self.machine.description)
        self._live: list[TrainingJob] = []
        self._started = time.monotonic()
        self._one: Path | None = None  # the run on 1 rank
        self._reference: Path | None = None  # the uninterrupted run on all ranks
        self._killed: TrainingJob | None = None  # the killed run, resumed

    def run(self) -> Report:
        """Run every check and return the report; a failed check does not stop the others.

        Raises:
            InputError: the folder holds something else than an earlier self-test.
        """
        self._clear()
        self._progress("making a small store")
        self.store = data.make_store(self.folder / "data")
        checks: list[tuple[str, Callable[[], Sequence[Result]]]] = [
            ("environment", self.environment),
            ("all-reduce", self.all_reduce),
            ("checkpoint disk", self.disk),
            (f"1 and {self.n} ranks train alike", self.ranks_agree),
            ("throughput", self.throughput),
            ("loader", self.loader),
            ("kill -9 of a rank, resume", self.kill),
            ("preemption", self.preemption),
            (f"elastic resume, {self.n} → 1 → {self.n} ranks", self.elastic),
            ("gradient parity", self.parity),
        ]
        try:
            for name, check in checks:
                self._guarded(name, check)
        finally:
            for job in self._live:
                if job.state() in ("waiting", "running"):
                    job.cancel()
        self.report.seconds = time.monotonic() - self._started
        return self.report

    def _clear(self) -> None:
        if self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / "data" / "store").is_dir():
            raise InputError(f"{self.folder}: holds something else than a self-test; give an empty --folder")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def _progress(self, text: str) -> None:
        self.say(f"{time.monotonic() - self._started:5.0f} s  {text}")

    def _guarded(self, name: str, check: Callable[[], Sequence[Result]]) -> None:
        self._progress(f"{name} ...")
        started = time.monotonic()
        try:
            results = check()
        except NotApplicableError as error:
            results = [Result(name, "n/a", reason=str(error))]
        except (CheckFailedError, InputError) as error:
            results = [Result(name, "failed", reason=str(error))]
        except Exception as error:  # noqa: BLE001 (whatever it is, it is this machine's result)
            results = [Result(name, "failed", reason=f"{type(error).__name__}: {error}")]
        seconds = (time.monotonic() - started) / max(len(results), 1)
        for result in results:
            self.report.results.append(Result(result.name, result.outcome, result.value, result.reason, seconds))
            self._progress(f"  {result.name}: {result.outcome}  {result.value}  {result.reason}".rstrip())

    # What one job on every rank measures

    def environment(self) -> list[Result]:
        """Versions on all ranks; the job also measures what the next checks show."""
        recipe = data.recipe(self.store, self.folder / "unused", self.n, 3, self.machine.on_gpu)
        folder = self.folder / "measure"
        folder.mkdir()
        path, out = folder / "recipe.yaml", folder / "measured.json"
        path.write_text(dump(recipe))
        largest = 256 if self.machine.on_gpu else 16 if self.quick else 64
        options = ["--largest-mb", str(largest), "--seconds", "1" if self.quick else "3"]
        options += ["--disk-mb", "64" if self.quick else "256"]
        why = self.machine.run("mffm.selftest.bandwidth", [str(path), str(out), *options], self.n, folder, JOB_SECONDS)
        if why is not None:
            raise CheckFailedError(why)
        self.report.measured = measured = json.loads(out.read_text())
        self.report.environment = measured["ranks"]
        return judge_environment(measured["ranks"], self.n)

    def _measured(self) -> dict[str, Any]:
        if not self.report.measured:
            raise NotApplicableError("the job that measures it failed, see environment")
        return self.report.measured

    def all_reduce(self) -> list[Result]:
        """Latency and bandwidth of sums over all ranks."""
        if self.n == 1:
            raise NotApplicableError("one rank")
        rows = self._measured()["all_reduce"]
        wrong = [f"{row['bytes']:,.0f} bytes" for row in rows if not row["right"]]
        value = (
            f"latency {rows[0]['seconds'] * 1e6:.0f} µs; {rows[-1]['bytes'] / 1e6:.0f} MB in "
            f"{rows[-1]['seconds'] * 1e3:.1f} ms = {rows[-1]['gb_per_s']:.2f} GB/s on the bus"
        )
        if wrong:
            return [Result("all-reduce", "failed", value, f"wrong sums of {', '.join(wrong)}")]
        return [Result("all-reduce", "passed", value, "sums are right")]

    def disk(self) -> list[Result]:
        """Speed of a checkpoint's write to the disk of the runs."""
        disk = self._measured()["disk"]
        rate = disk["megabytes"] / disk["seconds"]
        value = f"{rate:.0f} MB/s with fsync, {disk['free_gb']:.0f} GB free"
        if disk["free_gb"] < 1:
            return [Result("checkpoint disk", "failed", value, "less than 1 GB free")]
        return [Result("checkpoint disk", "passed", value)]

    # Runs

    def _train(self, name: str, ranks: int, steps: int) -> TrainingJob:
        recipe = data.recipe(self.store, self.folder / name, self.n, steps, self.machine.on_gpu)
        job = self.machine.train(recipe, ranks)
        self._live.append(job)
        return job

    def _resume(self, folder: Path, ranks: int) -> TrainingJob:
        job = self.machine.resume(folder, ranks)
        self._live.append(job)
        return job

    def _wait(self, job: TrainingJob, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until a condition holds or the job has ended well; return whether the condition held.

        Time in the queue does not count.

        Raises:
            CheckFailedError: the job failed, or ran too long.
        """
        ran, moment = 0.0, time.monotonic()
        told = moment
        while not until():
            state = job.state()
            now = time.monotonic()
            ran, moment = ran + (now - moment if state == "running" else 0.0), now
            if now - told > TELL_SECONDS:
                told = now
                self._progress(f"  {job.folder.name}: {state}, step {job.step()}")
            if state == "done":
                return until()
            if state == "failed":
                raise CheckFailedError(job.why())
            if ran > JOB_SECONDS:
                job.cancel()
                raise CheckFailedError(f"{job.folder.name}: not done after {ran:.0f} s: {job.why()}")
            time.sleep(0.05)
        return True

    def ranks_agree(self) -> list[Result]:
        """The loss of the same steps on one and on all ranks."""
        job = self._train("one-rank", 1, COMPARED)
        self._wait(job)
        self._one = job.folder
        job = self._train("all-ranks", self.n, self._steps())
        self._wait(job)
        self._reference = job.folder
        if self.n == 1:
            raise NotApplicableError("one rank")
        one, many = runs.training_rows(self._one), runs.training_rows(self._reference)
        steps = range(1, COMPARED + 1)
        name = f"1 and {self.n} ranks train alike"
        different = runs.first_difference(many, one, steps, ROUNDING)
        if different:
            return [Result(name, "failed", "", f"{self.n} ranks against 1: {different}")]
        value = f"losses of {COMPARED} steps differ by {runs.largest_difference(many, one, steps):.1e} at most"
        return [Result(name, "passed", value, f"≤ {ROUNDING:g} relative")]

    def _steps(self) -> int:
        """Return a number of steps, a multiple of 3, that takes long enough to be interrupted."""
        assert self._one is not None
        edges = data.edges(self.machine.on_gpu)
        seconds = edges / runs.rates(self._one)[1]  # all microbatches of 1 rank take n times as long
        wanted = (4.0 if self.quick else 8.0) / seconds
        return 3 * min(max(round(wanted / 3), ELASTIC_STEPS + 2), 1000)

    def _uninterrupted(self) -> tuple[Path, int]:
        if self._reference is None:
            raise NotApplicableError("the uninterrupted run to compare with failed")
        return self._reference, max(runs.training_rows(self._reference))

    def throughput(self) -> list[Result]:
        """Atoms and edges per second of the small recipe, on one and on all ranks."""
        reference, _ = self._uninterrupted()
        assert self._one is not None
        (_, one_edges), (atoms, edges) = runs.rates(self._one), runs.rates(reference)
        parameters = sum(v.numel() for v in read_weights(reference / "weights" / "last.safetensors").values())
        seconds = self.n * data.edges(self.machine.on_gpu) / edges
        efficiency = edges / (one_edges * self.n)
        self.report.measured["throughput"] = {
            "parameters": parameters, "ranks": self.n, "atoms_per_s": atoms, "edges_per_s": edges,
            "edges_per_s_one_rank": one_edges, "step_seconds": seconds, "efficiency": efficiency,
        }  # fmt: skip
        size = f"{parameters:,} parameters, cutoff {data.CUTOFF:g} Å, float32, ZeRO 1"
        batch = f"{data.edges(self.machine.on_gpu):,} edges a microbatch"
        self.report.expect.append(
            f"the default backbone ({size}) on energy, forces, stress, {batch}: {edges / self.n:,.0f} edges/s a rank "
            f"({atoms / self.n:,.0f} atoms/s), {atoms:,.0f} atoms/s on {self.n}"
        )
        value = f"{atoms / self.n:,.0f} atoms/s and {edges / self.n:,.0f} edges/s a rank"
        if self.n > 1:
            value += f"; {efficiency:.0%} of {self.n} × 1 rank"
            self.report.expect.append(
                f"1 rank alone: {one_edges:,.0f} edges/s, so {self.n} ranks work at {efficiency:.0%} each; ranks that "
                "share cores, memory or a slow network lose most"
            )
            self._expect_communication(parameters, seconds)
        return [Result("throughput", "passed", value)]

    def _expect_communication(self, parameters: int, step_seconds: float) -> None:
        rows = self.report.measured.get("all_reduce", [])
        for count in (parameters, 10_000_000):
            if rows:
                seconds = interpolated(rows, 4 * count)
                line = f"all-reduce of the gradient of {count:,} parameters: about {seconds * 1e3:.1f} ms"
                if count == parameters:
                    line += f", {seconds / step_seconds:.0%} of a step of {step_seconds * 1e3:.0f} ms"
                self.report.expect.append(line)

    def loader(self) -> list[Result]:
        """What the loader reads without a training, against what the training takes."""
        rates = [row["edges"] for row in self._measured()["loader"]]
        systems = min(row["systems"] for row in self._measured()["loader"])
        value = f"{systems:,.0f} frames/s and {min(rates):,.0f} edges/s on the slowest rank"
        used = self.report.measured.get("throughput")
        if used is None:
            return [Result("loader", "passed", value, "not compared: the throughput was not measured")]
        ratio = min(rates) / (used["edges_per_s"] / self.n)
        outcome = f"{ratio:.1f} × what the training takes"
        if ratio < HEADROOM:
            remedy = "the training waits for its data: give ranks more cores, or a faster disk for the store"
            return [Result("loader", "failed", value, f"only {outcome}; {remedy}")]
        return [Result("loader", "passed", value, outcome)]

    def kill(self) -> list[Result]:
        """SIGKILL for one rank in mid-run: the job ends, a resume goes on as if nothing had happened."""
        reference, steps = self._uninterrupted()
        job = self._train("interrupted", self.n, steps)
        victim, third = self.n - 1, steps // 3
        if not self._wait(job, lambda: third + REPEATED < job.step()):
            raise NotApplicableError("the run ended before a rank could be killed")
        at, died = job.step(), time.monotonic()
        job.kill_rank(victim)
        while (state := job.state()) in ("running", "waiting"):
            if time.monotonic() - died > DEATH_SECONDS:
                job.cancel()
                raise CheckFailedError(f"the job still runs {DEATH_SECONDS:.0f} s after rank {victim} was killed")
            time.sleep(0.05)
        seconds = time.monotonic() - died
        if state == "done":
            raise NotApplicableError("the run ended before a rank could be killed")
        self._progress(f"  {job.why()}")
        saved, before = runs.latest(job.folder), runs.training_rows(job.folder)
        repeated = range(saved + 1, min(max(before), saved + REPEATED) + 1)
        runs.cut_rows(job.folder, saved)
        job = self._resume(job.folder, self.n)
        self._wait(job, lambda: job.step() > saved + REPEATED)
        self._killed = job
        after, whole = runs.training_rows(job.folder), runs.training_rows(reference)
        exact = not self.machine.on_gpu
        different = runs.first_difference(after, before, repeated, 0.0 if exact else ROUNDING)
        if different is None and exact:
            different = runs.first_difference(after, whole, range(1, saved + REPEATED), 0.0)
        if different:
            raise CheckFailedError(f"resumed after step {saved}: {different}")
        said = "bit for bit" if exact else f"{len(repeated)} repeated steps, ≤ {ROUNDING:g} relative"
        value = f"rank {victim} killed at step {at}, the job ended after {seconds:.1f} s, resumed after step {saved}"
        return [Result("kill -9 of a rank, resume", "passed", value, said)]

    def preemption(self) -> list[Result]:
        """SIGUSR2 in mid-run: all ranks save, the job is requeued and ends as the uninterrupted run."""
        reference, steps = self._uninterrupted()
        job = self._killed or self._train("preempted", self.n, steps)
        if not self._wait(job, lambda: job.step() > steps // 2):
            raise NotApplicableError("the run ended before it could be warned")
        before, warned, at = job.starts(), time.monotonic(), job.step()
        job.warn()

        asked = False

        def is_started_again() -> bool:
            nonlocal asked
            if not asked and job.state() == "waiting":  # once: each call puts the start off
                job.start_now()
                asked = True
            return job.starts() > before

        if not self._wait(job, is_started_again):
            raise NotApplicableError(f"the run ended before the warning of step {at} could act")
        again = time.monotonic() - warned
        self._wait(job)
        rows, whole = runs.training_rows(job.folder), runs.training_rows(reference)
        exact, compared = not self.machine.on_gpu, range(1, steps + 1)
        different = runs.first_difference(rows, whole, compared, 0.0 if exact else math.inf)
        if different:
            raise CheckFailedError(f"not as the uninterrupted run: {different}")
        drift = abs(runs.mean_loss(rows) / runs.mean_loss(whole) - 1)
        if drift > GPU_DRIFT:
            raise CheckFailedError(f"the mean loss is {drift:.0%} off the uninterrupted run")
        if exact and (files := runs.differing_files(job.folder, reference, steps)):
            raise CheckFailedError(f"losses are as in the uninterrupted run, but not the final {', '.join(files)}")
        said = "bit for bit" if exact else f"the same batches, mean loss within {GPU_DRIFT:.0%}"
        value = f"warned at step {at}, started again after {again:.1f} s, ends as the uninterrupted run"
        return [Result("preemption", "passed", value, said)]

    def elastic(self) -> list[Result]:
        """All ranks, then one, then all again: the same batches, and losses up to rounding."""
        reference, steps = self._uninterrupted()
        if self.n == 1:
            raise NotApplicableError("one rank")
        begin = steps // 3
        middle, end = begin + ELASTIC_STEPS, begin + 2 * ELASTIC_STEPS
        fewer = runs.branch(reference, self.folder / "elastic-1", begin, middle)
        self._wait(self._resume(fewer, 1))
        again = runs.branch(fewer, self.folder / f"elastic-{self.n}", middle, end)
        self._wait(self._resume(again, self.n))
        rows, whole = runs.training_rows(again), runs.training_rows(reference)
        compared = range(begin + 1, end + 1)
        name = f"elastic resume, {self.n} → 1 → {self.n} ranks"
        different = runs.first_difference(rows, whole, compared, ROUNDING)
        if different:
            raise CheckFailedError(different)
        value = f"the same batches; losses differ by {runs.largest_difference(rows, whole, compared):.1e} at most"
        return [Result(name, "passed", value, f"≤ {ROUNDING:g} relative")]

    def parity(self) -> list[Result]:
        """Gradients through DeepSpeed, for every ZeRO stage, against one process without it."""
        if self.n == 1:
            raise NotApplicableError("one rank")
        folder = self.folder / "parity"
        out = folder / "parity.json"
        arguments = [str(self.store), str(out), *(["--stages", "2"] if self.quick else [])]
        why = self.machine.run("mffm.selftest.parity", arguments, self.n, folder, JOB_SECONDS)
        if not out.is_file():
            raise CheckFailedError(why or "mffm.selftest.parity wrote no result")
        entries = json.loads(out.read_text())
        self.report.measured["parity"] = entries
        results = judge_parity(entries, self.parity_bound)
        if why is not None and all(result.outcome == "passed" for result in results):
            raise CheckFailedError(why)
        return results


def judge_environment(ranks: Sequence[Mapping[str, str]], n_ranks: int) -> list[Result]:
    """Return whether all ranks are there and have the same versions."""
    first = ranks[0]
    own = {"rank", "host"}
    different = sorted({k for row in ranks for k in first if k not in own and row.get(k) != first[k]})
    hosts = sorted({row["host"] for row in ranks})
    value = (
        f"{len(ranks)} rank(s) on {len(hosts)} host(s), {first['device']}, {first['backend']}, torch {first['torch']}, "
        f"DeepSpeed {first['deepspeed']}, C++ compiler {first['compiler']}"
    )
    if len(ranks) != n_ranks:
        return [Result("environment", "failed", value, f"{n_ranks} ranks were asked for")]
    if different:
        shown = "; ".join(f"{k}: " + ", ".join(sorted({row.get(k, "") for row in ranks})) for k in different)
        return [Result("environment", "failed", value, f"ranks differ in {shown}")]
    return [Result("environment", "passed", value, "the same on all ranks")]


def judge_parity(entries: Sequence[Mapping[str, Any]], bound: float) -> list[Result]:
    """Return one result a ZeRO stage (and offload) from the cases of ``mffm.selftest.parity``."""
    results = []
    kinds = sorted({(entry["stage"], entry.get("offload", "none")) for entry in entries})
    for stage, offload in kinds:
        cases = [entry for entry in entries if (entry["stage"], entry.get("offload", "none")) == (stage, offload)]
        gradient = max(float(case["gradient_error"]) for case in cases)
        parameter = max(float(case["parameter_error"]) for case in cases)
        # written so that a NaN fails
        bad = [
            case for case in cases
            if not (case["passed"] and case["gradient_error"] <= bound and case["parameter_error"] <= bound)
        ]  # fmt: skip
        value = f"{len(cases)} cases: gradient {gradient:.1e}, parameters {parameter:.1e}"
        reason = f"≤ {bound:g} relative"
        if bad:
            one = bad[0]
            reason = (
                f"{len(bad)} over {bound:g}, e.g. {one['model']}, {one['case']}, {one['microbatches']} microbatch(es)"
            )
        name = f"gradient parity, ZeRO {stage}" + ("" if offload == "none" else f", offload {offload}")
        results.append(Result(name, "failed" if bad else "passed", value, reason))
    if not results:
        raise CheckFailedError("mffm.selftest.parity wrote no case")
    return results


def interpolated(rows: Sequence[Mapping[str, float]], n_bytes: float) -> float:
    """Return seconds of an all-reduce from those measured: linear between two sizes, by bandwidth above the last."""
    for low, high in itertools.pairwise(rows):
        if n_bytes <= high["bytes"]:
            share = max(0.0, n_bytes - low["bytes"]) / (high["bytes"] - low["bytes"])
            return low["seconds"] + share * (high["seconds"] - low["seconds"])
    return rows[-1]["seconds"] * n_bytes / rows[-1]["bytes"]
