"""Does a checkpoint of any ZeRO stage go on at any other, and on another number of ranks?

    torchrun --nproc-per-node 2 -m mffm.selftest.resume STORE OUT.json [--stages 0,1,2,3]

3 steps at one stage, a checkpoint, 3 more; then from the checkpoint 3 steps at every stage. The same stage must give
the same bits in weights, moving average and AdamW's moments, another one the same up to rounding (``BOUND``).

    torchrun --nproc-per-node 2 -m mffm.selftest.resume STORE OUT.json --elastic FOLDER       # then 1 rank, then 2

One leg of a run on changing ranks, for every stage: the first call starts in the empty folder and also does all
``LEGS`` legs in one go, each later one goes on from the checkpoint of the one before; the last compares.
"""

import argparse
import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mffm import distributed
from mffm.data.loader import Loader
from mffm.data.plan import Cursor
from mffm.distributed import Ranks
from mffm.errors import InputError
from mffm.optim import MovingAverage
from mffm.release import read_json, read_weights, write_json
from mffm.selftest.trial import EPS, engine_of, largest, largest_difference, over_ranks, trial, with_weights
from mffm.training import checkpoint, sharding
from mffm.training.loop import train_step
from mffm.training.quarantine import LossWatch
from mffm.training.setup import Setup
from mffm.training.state import TrainState

LEG = 3  # steps
LEGS = 3
BOUND = 1e-5  # of max |difference| / max |value|
OPTIM = {"lr": 2e-3, "eps": EPS, "ema_decay": 0.9}
# Two microbatches on one rank, one on each of two: the same global batch.
PLAN = {"edge_budget": 600, "edges_per_microbatch": 300}


@dataclass
class Run:
    """A training of the self-test that can be saved, restored and compared."""

    setup: Setup
    engine: Any
    ema: MovingAverage
    state: TrainState
    ranks: Ranks
    batches: list[list[list[int]]]  # of each step done here, (row, fidelity) of every system

    @classmethod
    def start(cls, base: Setup, weights: dict[str, Tensor], stage: int, ranks: Ranks, device: torch.device) -> "Run":
        setup = with_weights(base, weights, device, deepspeed={"zero_stage": stage})
        engine = engine_of(setup, ranks, setup.plan.n_microbatches(ranks.world_size))
        ema = MovingAverage(sharding.own_weights(setup.potential).items(), setup.recipe.optim.ema_decay)
        state = TrainState(0, setup.plan.start().to_dict(), setup.plan.fingerprint, ranks.world_size)
        return cls(setup, engine, ema, state, ranks, [])

    def steps(self, n: int) -> None:
        setup, state = self.setup, self.state
        loader = Loader(
            setup.store, setup.plan, setup.fidelities, setup.recipe.model.backbone.cutoff,
            Cursor.from_dict(state.cursor), rank=self.ranks.rank, world_size=self.ranks.world_size,
            last_step=state.step + n,
        )  # fmt: skip
        with loader:
            for _ in range(n):
                plan, batches, cursor = next(loader)
                train_step(self.engine, setup, plan, batches, self.ranks, setup.recipe.optim.lr, LossWatch(None))
                self.ema.update(sharding.own_weights(setup.potential).items())
                state.step, state.cursor, state.ema_updates = state.step + 1, cursor.to_dict(), self.ema.updates
                self.batches.append([plan.rows.tolist(), plan.fidelity_idx.tolist()])

    def save(self, folder: Path) -> Path:
        return checkpoint.save(folder, self.engine, self.setup.potential, self.ema, self.state, keep=LEGS)

    def restore(self, path: Path) -> None:
        self.state = checkpoint.read_state(path)
        checkpoint.restore(path, self.engine, self.setup.potential, self.ema, self.state, self.setup.recipe.optim)

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the full weights, moving average and moments, on CPU."""
        module = self.setup.potential
        average = {k: v.detach().cpu().clone() for k, v in sharding.whole(module, self.ema.weights).items()}
        weights, moments = sharding.master_weights(self.engine, module), sharding.moments(self.engine, module)
        return {"weights": weights, "average": average, "moments": moments}


def differences(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> dict[str, float]:
    """Return max |difference| / max |value| of weights, average and moments."""
    return {kind: largest_difference(found[kind], wanted[kind]) / largest(wanted[kind]) for kind in wanted}


def stages_to_stages(
    begin: Callable[[int], Run], stages: list[int], folder: Path, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield one row for each pair of stages, the same on every rank."""
    for written in stages:
        run = begin(written)
        run.steps(LEG)
        path = run.save(folder / f"stage-{written}")
        run.steps(LEG)
        wanted = run.tensors()
        run.engine.destroy()
        for read in stages:
            run = begin(read)
            run.restore(path)
            run.steps(LEG)
            errors = differences(run.tensors(), wanted)
            run.engine.destroy()
            errors = dict(zip(errors, over_ranks(list(errors.values()), device), strict=True))
            worst = max(errors.values())
            yield {"from": written, "to": read, **errors, "passed": worst <= (0 if written == read else BOUND)}


def elastic(begin: Callable[[int], Run], stages: list[int], folder: Path) -> Iterator[dict[str, Any]]:
    """Do one leg for each stage; yield a row for each after the last."""
    whole = folder / "whole"
    if not whole.exists():
        run = begin(stages[0])
        run.steps(LEG * LEGS)
        run.save(whole)
        _record(run, whole)
        run.engine.destroy()
    for stage in stages:
        run, place = begin(stage), folder / f"stage-{stage}"
        newest = checkpoint.newest_whole(place)
        if newest is not None:
            run.restore(newest[0])
        run.steps(LEG)
        saved = run.save(place)
        _record(run, place)
        run.engine.destroy()
        if run.state.step == LEG * LEGS:
            mine, wanted = (
                {n: read_weights(p / n) for n in checkpoint.TENSOR_FILES} for p in (saved, whole / saved.name)
            )
            errors = {n.partition(".")[0]: value for n, value in differences(mine, wanted).items()}
            same = read_json(place / "batches.json")["steps"] == read_json(whole / "batches.json")["steps"]
            ranks = read_json(place / "batches.json")["ranks"]
            passed = same and max(errors.values()) <= BOUND
            yield {"stage": stage, "ranks": ranks, **errors, "same_batches": same, "passed": passed}


def _record(run: Run, place: Path) -> None:
    """Add what the run has read since it began, and on how many ranks, to the folder's list."""
    path = place / "batches.json"
    if run.ranks.is_main:
        before = read_json(path) if path.exists() else {"ranks": [], "steps": []}
        before["ranks"].append(run.ranks.world_size)
        write_json(path, {"ranks": before["ranks"], "steps": before["steps"] + run.batches})
    distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a store with two fidelities that have energies and forces")
    parser.add_argument("output", type=Path, help="JSON: a list with one object for each pair of stages, or stage")
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages")
    parser.add_argument(
        "--elastic", type=Path, help="folder of a run on changing ranks, on a disk that all ranks share"
    )
    arguments = parser.parse_args()
    stages = [int(s) for s in arguments.stages.split(",")]
    ranks = distributed.ranks_from_environment()
    if arguments.elastic is None and ranks.world_size < 2:
        raise InputError("sharding needs two or more ranks; start it with torchrun or srun")
    device = distributed.start(ranks)
    gc.freeze()  # DeepSpeed collects whenever an engine ends: half a second each for what the imports made
    base = trial(arguments.store, "independent", "selftest", optim=OPTIM, plan=PLAN)
    weights = {k: v.clone() for k, v in base.potential.state_dict().items()}

    def begin(stage: int) -> Run:
        return Run.start(base, weights, stage, ranks, device)

    if arguments.elastic is not None:
        rows = list(elastic(begin, stages, arguments.elastic))
    else:
        with TemporaryDirectory(dir=arguments.output.parent) as own:
            folder = [own]
            dist.broadcast_object_list(folder)  # rank 0's; ranks on other hosts read it, so it is beside the output
            rows = list(stages_to_stages(begin, stages, Path(folder[0]), device))
            distributed.barrier()
    if ranks.is_main:
        for row in rows:
            print(json.dumps(row), flush=True)
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    distributed.barrier()
    distributed.stop()
    sys.stdout.flush()
    os._exit(0 if all(row["passed"] for row in rows) else 1)  # DeepSpeed now and then aborts at interpreter exit


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
