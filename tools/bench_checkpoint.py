"""What a checkpoint costs, as markdown: seconds and bytes of save and restore, against the bare disk.

    python tools/bench_checkpoint.py                                            # S, M, L, XL at ZeRO 0 on one rank
    torchrun --nproc-per-node 2 tools/bench_checkpoint.py --sizes M --stage 1   # sharded, on two

The native backbone with independent heads of two fidelities; AdamW's moments are random numbers, so that no step has to
be computed. A row is the fastest of five, since neighbours on the machine share the disk. "Bare" is the same number of
bytes written to one file and fsynced, in the same folder just before each save. "Restore" includes the check of the
SHA-256 and reads from the page cache.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mffm import distributed
from mffm.config.base import validate
from mffm.config.recipe import LossConfig, Recipe
from mffm.loss import Loss
from mffm.models.potential import Potential
from mffm.optim import MovingAverage
from mffm.training import checkpoint, sharding
from mffm.training.loop import _engine
from mffm.training.setup import Trainee, deepspeed_config
from mffm.training.state import TrainState

SIZES = {
    "S": {"channels": 128, "edge_channels": 64, "layers": 2, "lmax": 2, "l_message": 1},
    "M": {"channels": 320, "edge_channels": 96, "layers": 3, "lmax": 3, "l_message": 1},
    "L": {"channels": 464, "edge_channels": 128, "layers": 4, "lmax": 3, "l_message": 2},
    "XL": {"channels": 752, "edge_channels": 192, "layers": 5, "lmax": 3, "l_message": 2},
}
REPEATS = 5
BLOCK = memoryview(os.urandom(1 << 24))


def seconds(action: Callable[[], object]) -> tuple[float, float]:
    """Return wall and CPU seconds of this rank."""
    distributed.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    action()
    distributed.barrier()
    return time.perf_counter() - wall, time.process_time() - cpu


def bare(folder: Path, n_bytes: int) -> None:
    with (folder / "bare").open("wb") as file:
        for start in range(0, n_bytes, len(BLOCK)):
            file.write(BLOCK[: n_bytes - start])
        file.flush()
        os.fsync(file.fileno())


def row(size: str, stage: int, ranks: distributed.Ranks, folder: Path) -> str:
    """Return a row of the table."""
    recipe = validate(
        Recipe,
        {
            "name": "bench",
            "data": {"store": "none", "plan": {"pools": [{"fidelity": "a"}, {"fidelity": "b"}], "edge_budget": 1}},
            "model": {"backbone": SIZES[size], "heads": {"kind": "independent"}},
            "train": {"steps": 1},
            "deepspeed": {"zero_stage": stage},
        },
        "bench_checkpoint",
    )
    potential = Potential(recipe.model, ["a", "b"], 30.0, 1.0)
    n_parameters = potential.n_parameters
    loss = Loss(LossConfig(), ["a", "b"], {(0, "energy"): 1, (1, "energy"): 1})
    engine = _engine(Trainee(potential, loss, torch.zeros(2, 119)), recipe, deepspeed_config(recipe, ranks, 1))
    ema = MovingAverage(sharding.own_weights(potential).items(), 0.99)
    weights = sharding.master_weights(engine, potential)
    moments = {f"{k}/{n}": torch.rand_like(v) for k in sharding.MOMENTS for n, v in weights.items()}
    sharding.set_moments(engine, potential, moments, 1)
    del weights, moments
    state = TrainState(1, {}, "none", ranks.world_size)
    saves, disks, restores, n_bytes = [], [], [], 16 * n_parameters
    for _ in range(REPEATS):
        disks.append(seconds(lambda: bare(folder, n_bytes) if ranks.is_main else None))  # noqa: B023
        saves.append(seconds(lambda: checkpoint.save(folder / "checkpoints", engine, potential, ema, state, keep=1)))
        path = folder / "checkpoints" / "step-00000001"
        n_bytes = sum(p.stat().st_size for p in path.iterdir())
        read = checkpoint.read_state(path)
        restores.append(seconds(lambda: checkpoint.restore(path, engine, potential, ema, read, recipe.optim)))  # noqa: B023
    (save, cpu), (disk, disk_cpu) = min(saves), min(disks)
    engine.destroy()
    return (
        f"| {size} | {n_parameters / 1e6:.2f} | {ranks.world_size} × ZeRO {stage} | {n_bytes / 1e6:.1f} | "
        f"{save:.2f} ({cpu:.2f}) | {disk:.2f} ({disk_cpu:.2f}) | {save / disk:.1f} | {min(restores)[0]:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES))
    parser.add_argument("--stage", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary one here")
    arguments = parser.parse_args()
    ranks = distributed.ranks_from_environment()
    distributed.start(ranks)
    distributed.tune_allocator()
    with TemporaryDirectory(dir=arguments.folder or Path.cwd()) as own:
        folder = [own]
        torch.distributed.broadcast_object_list(folder)
        if ranks.is_main:
            print("| size | M parameters | ranks | MB | save, s (CPU) | bare + fsync, s (CPU) | ratio | restore, s |")
            print("|---|---|---|---|---|---|---|---|")
        for size in arguments.sizes.split(","):
            line = row(size, arguments.stage, ranks, Path(folder[0]))
            if ranks.is_main:
                print(line, flush=True)
        distributed.barrier()
    distributed.stop()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed now and then aborts at interpreter exit


if __name__ == "__main__":
    main()
