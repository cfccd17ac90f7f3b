"""Cost of a potential in edge form, as it is, exported and compiled, beside the same with its padded neighbor list.

    python tools/bench_export.py [--size S] [--atoms 216] [--dtype float32] [--no-compile]

Energy and derivatives of a LiCl crystal, on one thread, of a potential of a named size with fresh weights, without
making neighbor lists. CPU seconds, the least of several calls, so that other work on the machine counts little.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from ase.build import bulk

from mffm.config.base import validate
from mffm.config.model import ModelConfig
from mffm.data.neighbors import neighbor_list
from mffm.data.references import ElementReferences
from mffm.deploy.at_fidelity import AtFidelity, geometry
from mffm.deploy.edges import compile_export, export, load, of_release
from mffm.fidelity import Fidelity, FidelityTable
from mffm.release import Loaded, PotentialSpec


def least(call: Callable[[], object], repeats: int = 7) -> float:
    """Return the least CPU time of a call, s."""
    call()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S")
    parser.add_argument("--atoms", type=int, default=216)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--no-compile", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = validate(ModelConfig, {"backbone": {"size": given.size}}, "bench_export")
    references = ElementReferences.from_dict({"references": {"pbe": {"Li": -1.0, "Cl": -2.0}}})
    spec = PotentialSpec(model, FidelityTable([Fidelity("pbe", "PBE")]), references, avg_neighbors=30.0, scale=1.0)
    loaded = Loaded(spec, spec.build(), Path(f"fresh-{given.size}"), "best", "")
    repeats = max(1, round((given.atoms / 8) ** (1 / 3)))
    atoms = bulk("LiCl", "rocksalt", a=5.13, cubic=True).repeat(repeats)
    atoms.rattle(0.05, seed=0)

    at = AtFidelity(loaded, "pbe", given.dtype)
    batch = at.pack([geometry(atoms)])
    numbers, positions, cell, pbc = geometry(atoms)
    receivers, senders, shifts = neighbor_list(positions, cell, pbc, at.cutoff)
    edges = (
        torch.as_tensor(positions[senders] - positions[receivers] + shifts @ cell, dtype=at.dtype),
        torch.as_tensor(numbers), torch.as_tensor(np.stack([receivers, senders])), torch.ones(len(atoms)).bool(),
    )  # fmt: skip
    found: dict[str, object] = {"size": given.size, "dtype": given.dtype, "atoms": len(atoms), "edges": len(senders)}
    seconds = {"potential": least(lambda: at.potential(batch, forces=True, stress=True))}
    as_it_is = of_release(loaded, "pbe", given.dtype)
    seconds["edge form"] = least(lambda: as_it_is(*edges))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bench.pt2"
        start = time.process_time(), time.perf_counter()
        model_of_file = export(loaded, path, "pbe", given.dtype)
        wall = time.perf_counter() - start[1]
        found["export: CPU and wall s"] = [round(time.process_time() - start[0], 1), round(wall, 1)]
        seconds["exported"] = least(lambda: model_of_file(*edges))
        if not given.no_compile:
            start = time.process_time(), time.perf_counter()
            compiled = compile_export(path, Path(folder) / "compiled.pt2")
            found["compile: wall s"] = round(time.perf_counter() - start[1], 1)
            seconds["compiled"] = least(lambda: compiled(*edges))
            start = time.process_time(), time.perf_counter()
            load(Path(folder) / "compiled.pt2")
            found["load of the compiled: CPU s"] = round(time.process_time() - start[0], 1)
    found["CPU ms"] = {name: round(1e3 * value, 1) for name, value in seconds.items()}
    found["relative"] = {name: round(value / seconds["potential"], 2) for name, value in seconds.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
