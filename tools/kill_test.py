"""Kill a training of two ranks over and over, resume it every time, and compare the end with an uninterrupted run.

    OMP_NUM_THREADS=1 python tools/kill_test.py --kills 50

Half of the kills (SIGKILL) come at random moments, half inside the phases of a save. The weights, the moving average,
the optimiser state, the run's state, the kept weights and the metrics without the clock's must be equal bit for bit;
exit code 1 where anything differs. About ten seconds a kill on two cores.

The product has no hooks for this. The tool starts itself under torchrun as `worker`, and the worker wraps functions of
mffm.training.checkpoint before it starts the training.
"""

import os
import sys
from pathlib import Path

if len(sys.argv) > 2 and sys.argv[1] == "worker":  # before the imports, which take seconds: a rank can be killed early
    (Path(sys.argv[2]) / f"rank-{os.environ['RANK']}.pid").write_text(str(os.getpid()))

import argparse
import json
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PHASES = {
    "before": "before the save",
    "files": "between its files",
    "rename": "before the rename",
    "latest": "before `latest` moves",
    "clean": "before old ones are removed",
}
STARTING, TRAINING = "random, before the first step", "random, in training"
CLOCK = ("atoms_per_s", "edges_per_s", "seconds", "time", "cpu_s")  # metrics that two equal runs do not share
LIFE_SECONDS = 180.0


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        phase: of a save, or empty: at a random moment.
        save: which save of this start, from 1.
        after_files: phase ``files``: after how many of the four files.
        victim: ``0`` or ``1`` (that rank) or ``all`` (torchrun and both ranks at once).
        starting: at a random moment of the first seconds, not of the training.
        delay: seconds after the start, or after the first step of this start.
    """

    phase: str
    save: int
    after_files: int
    victim: str
    starting: bool
    delay: float


@dataclass
class Tally:
    """What the kills of one kind did."""

    kills: int = 0
    victims: Counter[str] = field(default_factory=Counter)
    resumed: Counter[str] = field(default_factory=Counter)
    lost: int = 0


def plan_kills(n: int, n_random: int, save_every: int, rng: random.Random) -> list[Kill]:
    """Return the kills in random order: the phases in turn, and a quarter of the random ones while the ranks start."""
    kills = []
    for i in range(n - n_random):
        victim = "0" if i % 2 else "all"  # rank 0 writes
        kills.append(Kill(list(PHASES)[i % len(PHASES)], rng.randint(1, 3), rng.randint(1, 3), victim, False, 0.0))
    for i in range(n_random):
        starting = i % 4 == 3
        victim = rng.choice(["0", "1", "all"])
        kills.append(Kill("", 0, 0, victim, starting, rng.uniform(0.0, 6.0 if starting else 0.1 * save_every)))
    rng.shuffle(kills)
    return kills


def make_recipe(folder: Path, store: Path, steps: int, save_every: int) -> Path:
    """Write a recipe of two fidelities and ZeRO 1 on a store made by the ordinary ingest."""
    recipe = {
        "name": "kill-test",
        "data": {
            "store": str(store),
            "plan": {
                "pools": [
                    {"fidelity": "gfn2", "properties": ["energy", "forces"]},
                    {"fidelity": "pbe", "properties": ["energy"], "max_frames": 40},
                ],
                "edge_budget": 600,
                "edges_per_microbatch": 150,
            },
            "validation_max_frames": 8,
        },
        "model": {
            "backbone": {
                "cutoff": 4.0, "lmax": 2, "l_message": 1, "layers": 1, "channels": 8, "edge_channels": 8,
                "n_radial": 4, "radial_hidden": 8, "ff_expansion": 1,
            },
            "conditioning": {"kind": "onehot"},
            "heads": {"kind": "delta", "base": "gfn2", "hidden": [8]},
        },
        "train": {
            "steps": steps, "validate_every": 2 * save_every, "save_every": save_every, "log_every": 1, "threads": 1,
            "keep": 2,
        },
        "optim": {"warmup_steps": 10},
        "deepspeed": {"zero_stage": 1},
        "log": {"wandb": "disabled"},
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def make_store(folder: Path) -> Path:
    from mffm.config.base import load
    from mffm.config.data import DataConfig
    from mffm.data.ingest import ingest

    data = ROOT / "configs" / "data" / "molecules.yaml"
    ingest(load(DataConfig, data, ["cutoffs=[4.0]"]), data.parent, folder / "store", progress=False)
    return folder / "store"


# The worker: one rank


def worker(folder: Path, recipe: Path, run: Path) -> None:
    """Train or resume as one rank; be killed where kill.json says."""
    from mffm import distributed
    from mffm.config.base import load
    from mffm.config.recipe import Recipe
    from mffm.training import checkpoint, loop

    if distributed.ranks_from_environment().is_main and (folder / "kill.json").exists():
        inject(checkpoint, Kill(**json.loads((folder / "kill.json").read_text())), folder)
    if (run / "checkpoints" / "latest").exists():
        loop.resume(run)
    else:
        loop.train(load(Recipe, recipe, [f"run={run}"]))
    distributed.stop()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed now and then aborts at interpreter exit, after all work is done


def inject(checkpoint: Any, kill: Kill, folder: Path) -> None:
    """Wrap the functions of a save: those that the phase lies before or behind kill this process there."""
    counts: Counter[str] = Counter()
    saving: list[int] = []

    def wrap(name: str, before: Callable[[], bool], after: Callable[[], bool]) -> None:
        function = getattr(checkpoint, name)

        def wrapped(*arguments: Any, **named: Any) -> Any:
            counts[name] += 1
            if name == "save":
                for inner in ("write_weights", "write_json", "_sync_folder", "_point_latest"):
                    counts[inner] = 0
                saving[:] = [int(arguments[4].step)]
            if counts["save"] == kill.save and before():
                die(folder, kill, saving[0])
            result = function(*arguments, **named)
            if counts["save"] == kill.save and after():
                die(folder, kill, saving[0])
            return result

        setattr(checkpoint, name, wrapped)

    never = lambda: False  # noqa: E731
    wrap("save", lambda: kill.phase == "before", never)
    wrap("write_weights", never, lambda: kill.phase == "files" and counts["write_weights"] == kill.after_files)
    # The first call is of the folder that is still aside, the second of its parent after the rename.
    wrap("_sync_folder", never, lambda: kill.phase == "rename" and counts["_sync_folder"] == 1)
    wrap("_point_latest", lambda: kill.phase == "latest", lambda: kill.phase == "clean")


def die(folder: Path, kill: Kill, step: int) -> None:
    (folder / "hit.json").write_text(json.dumps({"phase": kill.phase, "step": step}))
    if kill.victim == "all":
        for pid in (os.getppid(), int((folder / "rank-1.pid").read_text())):
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


# The tool: starts, kills, compares


@dataclass(frozen=True)
class Life:
    """One start of the two ranks: its end, and what its part of the log says.

    Attributes:
        resumed: step of the checkpoint that it resumed from, 0 for none; None where it did not come so far.
        steps: the steps that it finished.
        takedown_seconds: from a kill at a random moment until no process was left.
    """

    returncode: int
    resumed: int | None
    steps: list[int]
    takedown_seconds: float


def processes(torchrun: int, folder: Path) -> list[int]:
    """Return torchrun and the ranks that live, ranks without a pid file included."""
    found = [torchrun]
    for path in Path(f"/proc/{torchrun}/task").glob("*/children"):
        found += [int(word) for word in path.read_text().split()]
    found += [int(path.read_text() or 0) for path in folder.glob("rank-*.pid")]
    return [pid for pid in dict.fromkeys(found) if pid and is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def told(log: Path, offset: int) -> tuple[int | None, list[int]]:
    """Return from what step a start resumed and which steps it finished, by its part of the log."""
    with log.open("rb") as file:
        file.seek(offset)
        text = file.read().decode(errors="replace")
    steps = [int(word) for word in re.findall(r"^step (\d+)/", text, re.MULTILINE)]
    resumed = re.search(r"^resumed from step-(\d+)", text, re.MULTILINE)
    return int(resumed[1]) if resumed else 0 if steps[:1] == [1] else None, steps


def saved_step(run: Path) -> int:
    try:
        return int((run / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    except OSError:
        return 0


def live(folder: Path, recipe: Path, run: Path, kill: Kill | None) -> Life:
    """Start the ranks, kill them as told (None: let them end), wait until no process is left."""
    for path in [*folder.glob("rank-*.pid"), folder / "kill.json", folder / "hit.json"]:
        path.unlink(missing_ok=True)
    if kill is not None and kill.phase:
        (folder / "kill.json").write_text(json.dumps(asdict(kill)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(Path(__file__).resolve()), "worker", str(folder), str(recipe), str(run)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    with (folder / "log").open("ab") as log:
        offset = log.tell()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder)
    pids: set[int] = set()
    killed_at = None
    try:
        if kill is not None and not kill.phase:
            wait_for_moment(process, folder / "log", offset, kill)
            pids = strike(process.pid, folder, kill.victim)
            killed_at = time.monotonic()
        returncode = process.wait(timeout=LIFE_SECONDS)
        pids |= {int(path.read_text() or 0) for path in folder.glob("rank-*.pid")} - {0}
        while any(is_running(pid) for pid in pids):
            time.sleep(0.02)
    finally:
        for pid in processes(process.pid, folder):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    takedown = 0.0 if killed_at is None else time.monotonic() - killed_at
    return Life(returncode, *told(folder / "log", offset), takedown)


def wait_for_moment(process: "subprocess.Popen[bytes]", log: Path, offset: int, kill: Kill) -> None:
    begun = time.monotonic()
    while not kill.starting and process.poll() is None and time.monotonic() - begun < LIFE_SECONDS:
        if told(log, offset)[1]:
            break
        time.sleep(0.02)
    time.sleep(kill.delay)


def strike(torchrun: int, folder: Path, victim: str) -> set[int]:
    """Send SIGKILL; return the processes that must be gone before the next start."""
    try:
        os.kill(torchrun, signal.SIGSTOP)  # so that it starts no rank in between
    except ProcessLookupError:
        return set()
    pids = processes(torchrun, folder)
    path = folder / f"rank-{victim}.pid"
    if victim != "all" and path.exists() and path.read_text():
        target = int(path.read_text())
        if is_running(target):
            os.kill(target, signal.SIGKILL)
        os.kill(torchrun, signal.SIGCONT)
    else:
        for pid in reversed(pids):
            os.kill(pid, signal.SIGKILL)
    return set(pids)


def rows(run: Path) -> list[dict[str, float]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(CLOCK)} for line in lines]


def differences(run: Path, reference: Path, steps: int) -> list[str]:
    """Return what differs between the ends of two runs."""
    folder = Path("checkpoints") / f"step-{steps:08d}"
    names = [folder / p.name for p in sorted((reference / folder).iterdir())]
    assert len(names) >= 4, names
    names += [Path("weights") / p.name for p in sorted((reference / "weights").iterdir())]

    def content(path: Path) -> bytes | None:
        return path.read_bytes() if path.is_file() else None

    found = [str(name) for name in names if content(run / name) != content(reference / name)]
    if rows(run) != rows(reference):
        found.append("metrics.jsonl")
    parts = ("checkpoints", "weights")
    here, there = ([sorted(p.name for p in (r / part).iterdir()) for part in parts] for r in (run, reference))
    if here != there:
        found.append("the names of the files")
    return found


class Session:
    """The kills of one call; a run that comes to its end is compared, and the next one begins."""

    def __init__(self, folder: Path, recipe: Path, steps: int, save_every: int):
        self.folder, self.recipe, self.steps, self.save_every = folder, recipe, steps, save_every
        self.reference = folder / "uninterrupted"
        self.tallies: dict[str, Tally] = {}
        self.compared, self.late, self.takedown = 0, 0, 0.0
        self.faults: list[str] = []
        self.waiting: list[tuple[Tally, int | None, bool]] = []

    @property
    def run(self) -> Path:
        return self.folder / f"run-{self.compared}"

    def straight(self) -> None:
        """Make the uninterrupted run."""
        if live(self.folder, self.recipe, self.reference, None).returncode != 0:
            raise SystemExit(f"the uninterrupted run failed:\n{(self.folder / 'log').read_text()[-3000:]}")

    def kill(self, kill: Kill) -> None:
        """Start the run and kill it; begin a new one where the end comes first."""
        for _ in range(3):
            saves_left = (self.steps - saved_step(self.run)) // self.save_every
            if saves_left < kill.save:
                self.finish()
            life = live(self.folder, self.recipe, self.run, kill)
            self.resumed(life)
            if life.returncode != 0:
                return self.count(kill, life)
            self.late += 1
            self.compare()
        raise SystemExit(f"three runs came to their end before the kill: {kill}")

    def count(self, kill: Kill, life: Life) -> None:
        hit = self.folder / "hit.json"
        if kill.phase and not hit.exists():
            raise SystemExit(f"died before the kill {kill}:\n{(self.folder / 'log').read_text()[-3000:]}")
        name = f"save: {PHASES[kill.phase]}" if kill.phase else TRAINING if life.steps else STARTING
        tally = self.tallies.setdefault(name, Tally())
        tally.kills += 1
        tally.victims["all" if kill.victim == "all" else f"rank {kill.victim}"] += 1
        reached = json.loads(hit.read_text())["step"] if kill.phase else max(life.steps, default=life.resumed)
        self.waiting.append((tally, reached, bool(kill.phase)))
        self.takedown = max(self.takedown, life.takedown_seconds)
        print(f"  {name}, {kill.victim}: at step {reached}", file=sys.stderr, flush=True)

    def resumed(self, life: Life) -> None:
        """Say of the kills before this start what they cost."""
        if life.resumed is None:
            return
        for tally, reached, in_save in self.waiting:
            tally.lost = max(tally.lost, (reached or life.resumed) - life.resumed)
            if in_save:
                tally.resumed["the one being written" if life.resumed == reached else "the one before"] += 1
            else:
                tally.resumed["the newest" if life.resumed else "none, from the start"] += 1
        self.waiting.clear()

    def finish(self) -> None:
        """Let the run go to its end and compare it."""
        life = live(self.folder, self.recipe, self.run, None)
        self.resumed(life)
        if life.returncode != 0:
            raise SystemExit(f"a resumed run failed:\n{(self.folder / 'log').read_text()[-3000:]}")
        self.compare()

    def compare(self) -> None:
        found = differences(self.run, self.reference, self.steps)
        self.faults += [f"{self.run.name}: {name}" for name in found]
        if not found:
            shutil.rmtree(self.run)
        self.compared += 1

    def table(self) -> str:
        lines = ["| killed | kills | whom | resumed from | steps lost, at most |", "|---|---|---|---|---|"]
        order = [STARTING, TRAINING, *(f"save: {text}" for text in PHASES.values())]
        for name in order:
            if (t := self.tallies.get(name)) is not None:
                whom, resumed = (", ".join(f"{k} {n}×" for k, n in sorted(c.items())) for c in (t.victims, t.resumed))
                lines.append(f"| {name} | {t.kills} | {whom} | {resumed} | {t.lost} |")
        return "\n".join(lines)


def main() -> int:
    if sys.argv[1:2] == ["worker"]:
        worker(*(Path(word) for word in sys.argv[2:5]))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--random", type=int, help="how many of them at random moments; half where not given")
    parser.add_argument("--steps", type=int, default=200, help="of one run; kills that are left go to the next run")
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--folder", type=Path, help="kept; a temporary one where not given")
    options = parser.parse_args()
    n_random = options.kills // 2 if options.random is None else options.random
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mffm-kill-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        recipe = make_recipe(folder, make_store(folder), options.steps, options.save_every)
        session = Session(folder, recipe, options.steps, options.save_every)
        session.straight()
        kills = plan_kills(options.kills, n_random, options.save_every, random.Random(options.seed))
        for number, kill in enumerate(kills, 1):
            print(f"kill {number}/{len(kills)}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            session.kill(kill)
        session.finish()
    print(session.table())
    ended = f"{session.compared} runs of {options.steps} steps, a save every {options.save_every}"
    print(
        f"\n{sum(t.kills for t in session.tallies.values())} kills in {ended}, {time.monotonic() - began:.0f} s. ",
        end="",
    )
    print(f"The other rank and torchrun were gone after {session.takedown:.1f} s at most.")
    if session.late:
        print(f"{session.late} kills came after the end of a run and were repeated.")
    for fault in session.faults:
        print(f"DIFFERS: {fault}")
    if not session.faults:
        print("All ends equal the uninterrupted run bit for bit: checkpoint, kept weights, metrics.")
    return 1 if session.faults else 0


if __name__ == "__main__":
    sys.exit(main())
