"""What can be known before the long part starts: rendezvous, versions, all-reduce, disk, the largest planned batch.

Every check ends in one ``Check``, the same on all ranks; RUN/preflight.json keeps them. The batch is run for real:
forward, forces and the double backward of the run's own module, with random numbers, weights and gradients left as
they were, so that a run with the preflight equals one without it bit for bit.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mffm import __version__, distributed
from mffm.config.recipe import Recipe
from mffm.data.loader import microbatch
from mffm.data.plan import Cursor, StepPlan
from mffm.errors import InputError
from mffm.failures import node_name
from mffm.optim import state_shapes
from mffm.release import write_json
from mffm.training.faults import Faults
from mffm.training.setup import Setup, Trainee, deepspeed_config, prepare, trainee_of

ALL_REDUCE_BYTES = 16_000_000
DISK_BYTES = (1_000_000, 64_000_000)  # the least and the most that is written: what a checkpoint has, in between
SCAN_STEPS, SCAN_SECONDS = 200, 2.0
CHECKPOINT_BYTES = 8  # per parameter, beside the optimiser's state: raw weights, moving average
RESIDENT_BYTES = 8  # per parameter, beside weights, gradients and the optimiser's state: moving average, validated copy
SHARED_SECONDS = 2.0  # in which a file that rank 0 wrote appears on the other nodes


@dataclass(frozen=True)
class Check:
    """One result.

    Attributes:
        value: what was found, for people.
        problem: value, place and remedy; empty where all is well.
        numbers: what was found, for programs.
    """

    name: str
    value: str
    problem: str = ""
    seconds: float = 0.0
    numbers: dict[str, Any] = field(default_factory=dict)


def only(recipe: Recipe) -> list[Check]:
    """Do everything that comes before the first step of a run, and return the checks; leaves only preflight.json.

    Raises:
        InputError: no rendezvous, or the recipe does not fit the store.
    """
    distributed.tune_allocator()
    run, ranks = Path(recipe.run_folder), distributed.ranks_from_environment()
    with Faults(run, ranks) as faults:
        started = time.perf_counter()
        device = distributed.start(ranks, recipe.train.collective_timeout_seconds)
        seconds = time.perf_counter() - started
        faults.joined()
        if recipe.train.threads:
            torch.set_num_threads(recipe.train.threads)
        setup = prepare(recipe)
        deepspeed_config(setup.recipe, ranks, setup.plan.n_microbatches(ranks.world_size))  # what it refuses
        return check(run, setup, trainee_of(setup, device), setup.plan.start(), ranks, device, seconds)


def check(
    run: Path,
    setup: Setup,
    trainee: Trainee,
    cursor: Cursor,
    ranks: distributed.Ranks,
    device: torch.device,
    rendezvous_seconds: float,
) -> list[Check]:
    """Check everything, write RUN/preflight.json and return the checks in order. Collective.

    Args:
        trainee: as it is before an engine has it.
        cursor: where the run goes on.
        rendezvous_seconds: that it took to join the process group.
    """
    hosts = len({p.host for p in distributed.processes()})
    text = f"{ranks.world_size} rank(s) on {hosts} host(s)"
    checks = [Check("rendezvous", text, seconds=rendezvous_seconds)]
    n = setup.potential.n_parameters
    steps: list[Callable[[], Check]] = [
        lambda: versions(setup, ranks, device),
        lambda: all_reduce(n, ranks, device),
        lambda: disk(run, setup, n, ranks),
        lambda: memory(setup, trainee, cursor, ranks, device),
    ]
    for step in steps:
        started = time.perf_counter()
        found = step()
        checks.append(replace(found, seconds=time.perf_counter() - started))
    if ranks.is_main:
        with contextlib.suppress(OSError, InputError):  # the disk check has said so
            run.mkdir(parents=True, exist_ok=True)
            content = {"time": time.time(), "world_size": ranks.world_size, "checks": [asdict(c) for c in checks]}
            write_json(run / "preflight.json", content)
    return checks


def require(checks: list[Check]) -> None:
    """Stop where there is a problem.

    Raises:
        InputError: with every problem.
    """
    problems = [f"{c.name}: {c.problem}" for c in checks if c.problem]
    if problems:
        text = "\n".join(f"  {p}" for p in problems)
        raise InputError(
            f"preflight found {len(problems)} problem(s); train.preflight=false starts in spite of it\n{text}"
        )


def summary(checks: list[Check]) -> str:
    """Return the checks as one line of the log."""
    shown = "; ".join(f"{c.name} {c.value}" for c in checks if c.name not in ("rendezvous", "versions"))
    return f"preflight, {sum(c.seconds for c in checks):.1f} s: {shown}"


# Checks


def versions(setup: Setup, ranks: distributed.Ranks, device: torch.device) -> Check:
    """Compare what has to be the same on all ranks."""
    resolved = json.dumps(setup.recipe.model_dump(mode="json"), sort_keys=True)
    mine = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": importlib.metadata.version("deepspeed"),
        "mffm": __version__,
        "code": code_commit(),
        "recipe": hashlib.sha256(resolved.encode()).hexdigest()[:12],
        "store": setup.store.fingerprint[:12],
        "plan": setup.plan.fingerprint[:12],
    }
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    everyone = _gather({"host": node_name(), "device": f"{device} {gpu}".strip(), **mine}, ranks)
    problems = []
    for key, value in everyone[0].items():
        other = next((r for r, row in enumerate(everyone) if row[key] != value), None)
        if key in mine and other is not None:
            here, there = everyone[0]["host"], everyone[other]["host"]
            problems.append(
                f"{key} is {value} on rank 0 ({here}), but {everyone[other][key]} on rank {other} ({there})"
            )
    if problems:
        problems.append("use one environment, one checkout and one recipe on all nodes")
    shown = [k for k in mine if k not in ("recipe", "store", "plan")]
    return Check(
        "versions", ", ".join(f"{k} {mine[k]}" for k in shown), "; ".join(problems), numbers={"ranks": everyone}
    )


def code_commit() -> str:
    """Return the commit of the checkout that mffm runs from, with ``-dirty`` for local changes; ``none`` outside."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return "none"
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "none"
    return done.stdout.strip() or "none"


def all_reduce(n_parameters: int, ranks: distributed.Ranks, device: torch.device) -> Check:
    """Sum 16 MB over all ranks: the value must be right; its time tells that of a step's gradient."""
    if ranks.world_size == 1:
        return Check("all-reduce", "one rank")
    expected = ranks.world_size * (ranks.world_size + 1) // 2
    times, wrong = [], 0
    for _ in range(3):  # the first connects
        summed = torch.full((ALL_REDUCE_BYTES // 4,), float(ranks.rank + 1), device=device)
        distributed.barrier()
        started = time.perf_counter()
        dist.all_reduce(summed)
        wrong += int((summed != expected).sum())  # waits for the device
        times.append(time.perf_counter() - started)
    wrong_ranks = [str(r) for r, n in enumerate(_gather(wrong, ranks)) if n]
    seconds = max(_gather(min(times), ranks))
    rate = ALL_REDUCE_BYTES / seconds
    gradient = 4 * n_parameters / rate
    problem = ""
    if wrong_ranks:
        problem = (
            f"the sum is wrong on rank(s) {', '.join(wrong_ranks)}: broken memory or network; leave out their nodes, "
            "or choose another interface (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)"
        )
    numbers = {"bytes_per_second": rate, "gradient_bytes": 4 * n_parameters, "gradient_seconds": gradient}
    value = f"{_bytes(rate)}/s, {_seconds(gradient)} for a step's gradient of {_bytes(4 * n_parameters)}"
    return Check("all-reduce", value, problem, numbers=numbers)


def disk(run: Path, setup: Setup, n_parameters: int, ranks: distributed.Ranks) -> Check:
    """Write and sync a file as large as a checkpoint where the run will be, and compare the free space."""
    place = run.absolute()
    while not place.is_dir():
        place = place.parent
    train, size = setup.recipe.train, CHECKPOINT_BYTES * n_parameters + state_bytes(setup)
    n_weights = 3 + len(setup.fidelities.names)  # best, of each fidelity, last, raw
    need = (train.keep + 1) * size + 4 * n_parameters * n_weights
    probe = Path(_from_main(str(place / f".mffm-preflight-{os.getpid()}"), ranks))
    rate, free, problem = 0.0, 0, ""
    if ranks.is_main:
        try:
            rate = _write_speed(probe, min(max(size, DISK_BYTES[0]), DISK_BYTES[1]))
            free = shutil.disk_usage(place).free + sum(_size(run / name) for name in ("checkpoints", "weights"))
        except OSError as error:
            problem = f"{place}: cannot write: {error.strerror}; give another folder with run=..."
    try:
        rate, free, problem = _from_main((rate, free, problem), ranks)
        unseen = [str(r) for r, seen in enumerate(_gather(problem != "" or _appears(probe), ranks)) if not seen]
    finally:
        if ranks.is_main:
            probe.unlink(missing_ok=True)
    if problem:
        return Check("disk", "not writable", problem)
    if unseen:
        problem = (
            f"{place}: rank(s) {', '.join(unseen)} do not see the file that rank 0 wrote there; the run's folder must "
            "be on a file system that all nodes share: give another with run=..."
        )
    elif need > free:
        problem = (
            f"{place}: {_bytes(free)} free, but {train.keep + 1} checkpoints of {_bytes(size)} and the weights need "
            f"{_bytes(need)}; make room, lower train.keep (now {train.keep}), or give another folder with run=..."
        )
    numbers = {"bytes_per_second": rate, "free_bytes": free, "needed_bytes": need, "checkpoint_bytes": size}
    value = (
        f"{_bytes(rate)}/s, {_seconds(size / rate)} to write a checkpoint of {_bytes(size)}; {_bytes(need)} needed, "
        f"{_bytes(free)} free"
    )
    return Check("disk", value, problem, numbers=numbers)


def memory(setup: Setup, trainee: Trainee, cursor: Cursor, ranks: distributed.Ranks, device: torch.device) -> Check:
    """Run the largest microbatch of the next steps on every rank; compare its peak with the memory that is there."""
    step, items, n_scanned = _from_main(largest(setup, cursor, ranks) if ranks.is_main else None, ranks)
    edges, atoms = int(step.n_edges[items].sum()), int(step.n_atoms[items].sum())
    failed = try_batch(setup, trainee, step, items, device)
    resident = RESIDENT_BYTES * setup.potential.n_parameters + state_bytes(setup)
    mine = {"host": node_name(), "peak": peak_bytes(device), "there": memory_bytes(device), "failed": failed}
    everyone = _gather(mine, ranks)
    what = f"the largest microbatch of the next {n_scanned} steps (step {step.step}: {edges:,} edges, {atoms:,} atoms)"
    remedy = f"lower data.plan.edges_per_microbatch (now {setup.recipe.data.plan.edges_per_microbatch})"
    problem = ""
    for rank, row in enumerate(everyone):
        where = f"rank {rank} on {row['host']}"
        sharing = [o for o in everyone if o["host"] == row["host"]] if device.type == "cpu" else [row]
        need = sum(o["peak"] + resident for o in sharing)
        if row["failed"]:
            problem = f"{what} does not fit the memory of {where}, {_bytes(row['there'])}: {row['failed']}; {remedy}"
        elif need > row["there"]:
            problem = (
                f"{what} and the optimiser need {_bytes(need)} on {where}"
                f"{f' for its {len(sharing)} ranks' if len(sharing) > 1 else ''}, which has {_bytes(row['there'])}; "
                f"{remedy}"
            )
        if problem:
            break
    worst = max(everyone, key=lambda row: row["peak"] / row["there"])
    value = (
        f"{edges:,} edges and {atoms:,} atoms in the largest microbatch of {n_scanned} steps, peak "
        f"{_bytes(worst['peak'])} of {_bytes(worst['there'])}"
    )
    numbers = {"step": step.step, "edges": edges, "atoms": atoms, "steps": n_scanned, "ranks": everyone}
    return Check("memory", value, problem, numbers=numbers)


def state_bytes(setup: Setup) -> int:
    """Return the size of the optimiser's state, unsharded."""
    return 4 * sum(math.prod(shape) for shape in state_shapes(setup.potential, setup.recipe.optim).values())


def largest(setup: Setup, cursor: Cursor, ranks: distributed.Ranks) -> tuple[StepPlan, np.ndarray, int]:
    """Return the microbatch with most edges and atoms of the next steps, as (step, its systems), and the steps seen."""
    plan, last = setup.plan, setup.recipe.train.steps
    n_microbatches = plan.n_microbatches(ranks.world_size)
    best: tuple[int, StepPlan, np.ndarray] | None = None
    n, deadline = 0, time.perf_counter() + SCAN_SECONDS
    while best is None or (n < SCAN_STEPS and cursor.step < last and time.perf_counter() < deadline):
        step, cursor = plan.step(cursor)
        n += 1
        size = step.n_edges + step.n_atoms
        if best is not None and int(size.sum()) <= best[0]:
            continue
        for bins in step.partition(ranks.world_size, n_microbatches):
            for items in bins:
                if best is None or int(size[items].sum()) > best[0]:
                    best = (int(size[items].sum()), step, items)
    return best[1], best[2], n


def try_batch(setup: Setup, trainee: Trainee, step: StepPlan, items: np.ndarray, device: torch.device) -> str:
    """Do forward and double backward of a microbatch and leave no trace; return why there was no memory, or nothing."""
    recipe = setup.recipe
    bare = recipe.data.neighbors == "device"
    batch = microbatch(setup.store, step, items, setup.fidelities, recipe.model.backbone.cutoff, bare=bare)
    divisors = setup.loss.divisors(step.counts, setup.plan.expected_counts(step.step)).to(device)
    was_training = trainee.training
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            trainee.train()(batch.to(device), divisors)[0].backward()
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            # torch's allocator for CPUs says it with a RuntimeError.
            if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(
                error
            ):
                raise
            failed = (str(error).strip().splitlines() or ["out of memory"])[0]
        else:
            failed = ""
    trainee.zero_grad(set_to_none=True)
    trainee.train(was_training)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return failed


def peak_bytes(device: torch.device) -> int:
    """Return the most memory that this rank has used: of its GPU since the last reset, else of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def memory_bytes(device: torch.device) -> int:
    """Return the memory that is there: free or ours on the GPU, else of the host or of the job's cgroup."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            group = Path("/sys/fs/cgroup") / line.rpartition(":")[2].lstrip("/")
            for folder in (group, *group.parents):
                limit = folder / "memory.max"
                if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                    limits.append(int(text))
    return min(limits)


# Parts


def _gather(value: Any, ranks: distributed.Ranks) -> list[Any]:
    if ranks.world_size == 1:
        return [value]
    values: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


def _from_main(value: Any, ranks: distributed.Ranks) -> Any:
    if ranks.world_size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _write_speed(path: Path, size: int) -> float:
    """Return bytes per second of writing and syncing a file, which stays."""
    block = os.urandom(min(size, 1 << 20))  # a file system that compresses gains nothing
    started = time.perf_counter()
    with path.open("wb") as file:
        written = 0
        while written < size:
            written += file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return written / (time.perf_counter() - started)


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if path.name in os.listdir(path.parent):  # on NFS this refreshes what the node remembers
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def _seconds(s: float) -> str:
    return f"{s:.2g} s" if s >= 1 else f"{1000 * s:.2g} ms"
