"""One job that measures a machine: versions on every rank, all-reduce, loader, disk.

``torchrun ... -m mffm.selftest.bandwidth RECIPE OUT.json [--largest-mb 64] [--seconds 2] [--disk-mb 128]``
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mffm import distributed
from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.data.loader import Loader
from mffm.data.plan import Plan, build_pools
from mffm.data.store import Store
from mffm.distributed import Ranks
from mffm.fidelity import FidelityTable
from mffm.release import write_json, write_weights

PACKAGES = ("mffm", "torch", "deepspeed", "numpy", "submitit", "wandb")


def environment(ranks: Ranks, device: torch.device) -> dict[str, str]:
    """Return versions and devices of one rank."""
    host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    found = {"rank": str(ranks.rank), "host": host, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["backend"] = dist.get_backend()
    found["compiler"] = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), "none")
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["memory"] = f"{torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
    else:
        found["device"] = f"{platform.machine()}, {torch.get_num_threads()} thread(s)"
    return found


def gathered(value: Any, world_size: int) -> list[Any]:
    """Return the value of every rank, on every rank."""
    values: list[Any] = [None] * world_size
    dist.all_gather_object(values, value)
    return values


def all_reduce(n_bytes: int, device: torch.device, world_size: int, repeats: int) -> dict[str, float | bool]:
    """Time the sum of a float32 tensor over all ranks.

    Returns:
        bytes; seconds (median of the slowest rank); bus GB/s, 2 (n - 1) / n × bytes / seconds, what the slowest link
        carries in a ring; whether every sum was right.
    """
    tensor = torch.ones(max(1, n_bytes // 4), device=device)
    seconds, is_right = [], True
    for i in range(repeats + 2):
        tensor.fill_(1.0)
        _synchronize(device)
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        _synchronize(device)
        if i >= 2:  # the first ones set up connections
            seconds.append(time.perf_counter() - started)
        is_right &= bool((tensor == world_size).all())
    median = torch.tensor([statistics.median(seconds), float(not is_right)], device=device)
    dist.all_reduce(median, op=dist.ReduceOp.MAX)
    slowest = float(median[0])
    return {
        "bytes": n_bytes,
        "seconds": slowest,
        "gb_per_s": 2 * (world_size - 1) / world_size * n_bytes / slowest / 1e9,
        "right": float(median[1]) == 0.0,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def loader_rate(recipe: Recipe, ranks: Ranks, seconds: float) -> dict[str, float]:
    """Read batches as a training does, without training; return systems, atoms and edges per second of this rank."""
    store = Store(recipe.data.store, recipe.data.layers)
    fidelities = FidelityTable(store.fidelities[name] for name in recipe.fidelities)
    cutoff = recipe.model.backbone.cutoff
    plan = Plan(
        build_pools(store, recipe.data.plan, fidelities, cutoff), recipe.data.plan, recipe.seed, recipe.train.steps
    )
    counts = {"systems": 0, "atoms": 0, "edges": 0}
    with Loader(store, plan, fidelities, cutoff, rank=ranks.rank, world_size=ranks.world_size) as loader:
        for _ in range(3):  # what lies ready already
            next(loader)
        started = time.perf_counter()
        while time.perf_counter() - started < seconds:
            _, batches, _ = next(loader)
            for batch in batches:
                counts["systems"] += len(batch.n_atoms)
                counts["atoms"] += len(batch.atomic_numbers)
                counts["edges"] += int(batch.neighbor_mask.sum())
        elapsed = time.perf_counter() - started
    return {name: n / elapsed for name, n in counts.items()}


def disk_rate(folder: Path, megabytes: int) -> dict[str, float]:
    """Write one file as a checkpoint does, to the disk and not only to memory, and remove it."""
    path = folder / "disk.safetensors"
    tensors: dict[str, Tensor] = {str(i): torch.rand(250_000) for i in range(megabytes)}
    started = time.perf_counter()
    write_weights(path, tensors)
    seconds = time.perf_counter() - started
    path.unlink()
    return {"megabytes": megabytes, "seconds": seconds, "free_gb": shutil.disk_usage(folder).free / 1e9}


def main() -> None:
    """Measure everything; rank 0 writes the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipe", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--largest-mb", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--disk-mb", type=int, default=128)
    given = parser.parse_args()
    ranks = distributed.ranks_from_environment()
    device = distributed.start(ranks)
    result: dict[str, Any] = {"ranks": gathered(environment(ranks, device), ranks.world_size), "all_reduce": []}
    if ranks.world_size > 1:
        sizes = [4, 64 * 1024, 1_000_000, 16_000_000, 64_000_000, 256_000_000]
        for n_bytes in (n for n in sizes if n <= given.largest_mb * 1_000_000):
            repeats = 20 if n_bytes < 2_000_000 else 5
            result["all_reduce"].append(all_reduce(n_bytes, device, ranks.world_size, repeats))
    result["loader"] = gathered(loader_rate(load(Recipe, given.recipe), ranks, given.seconds), ranks.world_size)
    if ranks.is_main:
        result["disk"] = disk_rate(given.output.parent, given.disk_mb)
        write_json(given.output, result)
        print(json.dumps(result))
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()
