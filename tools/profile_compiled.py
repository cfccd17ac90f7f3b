"""What the time of a compiled step goes into, as markdown: loops by kind, matrix products, and what lies between them.

    OMP_NUM_THREADS=1 python tools/profile_compiled.py [--backbone '{"size": "S"}'] [--edges 3000] [--rounds 25]

The step is that of bench_sizes.py. Each generated loop and each matrix product is timed (CPU time of the thread, the
median over the rounds); a loop is of the edges if it gathers, of the couplings if it couples and does not gather. What
lies between is the wrapper in Python, allocations, the blocks, and the clock of this tool. ``--list`` prints them all.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_sizes import FIDELITY, ROOT, compiled_loss, make
from torch._inductor.codecache import PyCodeCache

from mffm import distributed
from mffm.config.base import load
from mffm.config.data import DataConfig
from mffm.data.ingest import ingest


class Clock:
    """Times calls by name: ``times[name]`` has one entry a call."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = defaultdict(list)

    def timed(self, function: Callable[..., Any], name: str, shapes: bool = False) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.thread_time()
            result = function(*args, **kwargs)
            elapsed = time.thread_time() - started
            sizes = [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)][-2:] if shapes else []
            self.times[" ".join([name, *map(str, sizes)])].append(elapsed)
            return result

        return call


class Products:
    """Inductor's ``extern_kernels`` with a clock."""

    def __init__(self, kernels: Any, clock: Clock):
        self._kernels, self._clock = kernels, clock

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return self._clock.timed(getattr(self._kernels, name), name, shapes=True)


def attach(clock: Clock) -> None:
    """Put the clock into the compiled code that is loaded."""
    for module in PyCodeCache.modules:
        names = vars(module)
        for name in [n for n in names if n.startswith("cpp_fused")]:
            names[name] = clock.timed(names[name], name)
        if "extern_kernels" in names:
            names["extern_kernels"] = Products(names["extern_kernels"], clock)


def kind(name: str) -> str:
    if not name.startswith("cpp_fused"):
        return "matrix products"
    return "loops over edges" if "index_select" in name else "couplings" if "_couple" in name else "other loops"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backbone", type=json.loads, default={"size": "S"}, help="JSON")
    parser.add_argument("--edges", type=int, default=3000)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--list", action="store_true", help="each loop and product as well")
    args = parser.parse_args()
    torch.set_num_threads(1)
    distributed.tune_allocator()
    data = ROOT / "configs" / "data" / "crystals.yaml"
    with tempfile.TemporaryDirectory() as folder:
        ingest(load(DataConfig, data), data.parent, Path(folder) / "store", progress=False)
        potential, batch = make(args.backbone, Path(folder) / "store", args.edges)
    loss, clock, steps = compiled_loss(potential, batch, FIDELITY), Clock(), []
    loss()
    attach(clock)
    for i in range(args.rounds + 2):
        if i == 2:
            clock.times.clear()
        started = time.thread_time()
        loss().backward()
        steps.append(time.thread_time() - started)
    found: dict[str, float] = defaultdict(float)
    lines = []
    for name, times in clock.times.items():
        calls = len(times) // args.rounds
        seconds = sum(median(times[i::calls]) for i in range(calls))
        found[kind(name)] += seconds
        lines.append((seconds, f"{1e3 * seconds:8.3f} ms {calls:3d} x {name}"))
    step = median(steps[2:])
    found["between them"] = step - sum(found.values())
    print(f"{batch.n_edges:,} edges, {len(batch.atomic_numbers)} atoms; {1e3 * step:.1f} CPU ms a step\n")
    print("| part | ms | share |\n|---|---|---|")
    for name, seconds in sorted(found.items(), key=lambda item: -item[1]):
        print(f"| {name} | {1e3 * seconds:.1f} | {100 * seconds / step:.0f} % |")
    if args.list:
        print("", *(line for _, line in sorted(lines, reverse=True)), sep="\n")


if __name__ == "__main__":
    main()
