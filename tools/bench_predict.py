"""What `mffm predict` costs beside the forward alone, and one structure at a time, as markdown.

    OMP_NUM_THREADS=1 python tools/bench_predict.py [--structures 512] [--rounds 3] [--peers 32]

Structures: the shipped crystals' distorted cells repeated to 8 to 64 atoms. The potential is of size S without training
(weights do not matter for the time), float32; energy, forces and stress. CPU seconds of this process in turns, median
over the rounds; the forward alone has its batches ready. ASE's calculator takes a part of the structures, one by one.
``--peers N``: SevenNet (7net-0) and MACE (128x0e + 128x1o, without training) take N structures, in one batch with their
graphs and one by one, each in its environment (runs/peers/venvs, tools/peers/install.py).
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from ase import Atoms
from ase.io import read, write

from mffm.config.base import validate
from mffm.config.model import ModelConfig
from mffm.data.neighbors import neighbor_list
from mffm.data.references import ElementReferences
from mffm.deploy.ase import Calculator
from mffm.deploy.at_fidelity import AtFidelity, geometry
from mffm.deploy.predict import EDGE_BUDGET, predict, predict_file
from mffm.fidelity import Fidelity, FidelityTable
from mffm.release import Loaded, PotentialSpec

ROOT = Path(__file__).parents[1]
PEERS = {"sevennet": "SevenNet, 7net-0", "mace": "MACE, 128x0e + 128x1o"}
ALONE = 64  # structures for the calculator one by one


def structures(n: int) -> list[Atoms]:
    """Return cells of 8 to 64 atoms, sizes and compounds mixed."""
    cells = [Atoms(a.numbers, a.positions, cell=a.cell, pbc=True) for a in read(ROOT / "data/crystals.extxyz", ":")]
    rng = np.random.default_rng(0)
    found = []
    while len(found) < n:
        cell = cells[rng.integers(len(cells))]
        repeats = rng.permutation([(1, 1, 1), (2, 1, 1), (2, 2, 1), (2, 2, 2)][rng.integers(4)])
        atoms = cell.repeat(repeats.tolist())
        if 8 <= len(atoms) <= 64:
            atoms.rattle(0.02, seed=len(found))
            found.append(atoms)
    return found


def potential(elements: list[str]) -> Loaded:
    torch.manual_seed(0)
    config = validate(ModelConfig, {"backbone": {"size": "S", "cutoff": 5.0}}, "bench")
    references = ElementReferences.from_dict({"references": {"pbe": dict.fromkeys(elements, 0.0)}})
    spec = PotentialSpec(config, FidelityTable([Fidelity("pbe", "PBE")]), references, avg_neighbors=45.0, scale=1.0)
    return Loaded(spec, spec.build().eval(), Path("untrained"), "best", "")


def seconds(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return time.process_time() - started


def batches(at: AtFidelity, frames: list[Atoms]) -> list:
    """Return the batches of ``mffm predict``, ready."""
    found, part, lists, n_edges = [], [], [], 0
    for atoms in frames:
        _, positions, cell, pbc = geometry(atoms)
        edges = neighbor_list(positions, cell, pbc, at.cutoff)
        if n_edges and n_edges + len(edges[0]) > EDGE_BUDGET:
            found.append(at.pack([geometry(a) for a in part], None, lists))
            part, lists, n_edges = [], [], 0
        part.append(atoms)
        lists.append(edges)
        n_edges += len(edges[0])
    return [*found, at.pack([geometry(a) for a in part], None, lists)]


def own(frames: list[Atoms], rounds: int) -> None:
    at = AtFidelity(potential(sorted({s for a in frames for s in a.get_chemical_symbols()})), "pbe")
    calculator = Calculator(potential(sorted({s for a in frames for s in a.get_chemical_symbols()})), "pbe", skin=0.0)
    ready = batches(at, frames)
    n_atoms = sum(len(a) for a in frames)
    print(f"{len(frames)} structures, {n_atoms} atoms, {sum(b.n_edges for b in ready)} edges, {len(ready)} batches\n")
    alone = frames[:ALONE]
    share = n_atoms / sum(len(a) for a in alone)

    def one_by_one() -> None:
        for atoms in alone:
            calculator.calculate(atoms)

    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder) / "in.extxyz", Path(folder) / "out.extxyz"
        write(source, frames)

        def file() -> None:
            predict_file(at, source, output)
            output.unlink()

        runs: dict[str, Callable[[], object]] = {
            "forward alone": lambda: [at.potential(b, forces=True, stress=True) for b in ready],
            "batched, structures in memory": lambda: list(predict(at, frames)),
            "`mffm predict`: read, batched, written": file,
            f"ASE one by one ({len(alone)} structures, scaled)": one_by_one,
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds + 1):
            for name, run in runs.items():
                times[name].append(seconds(run) * (share if run is one_by_one else 1.0))
    middle = {name: median(values[1:]) for name, values in times.items()}  # the first round warms up
    print("| what | CPU s | µs/atom | of the forward |\n|---|---|---|---|")
    forward = middle["forward alone"]
    for name, value in middle.items():
        print(f"| {name} | {value:.2f} | {1e6 * value / n_atoms:.0f} | {value / forward:.2f} |")


def peers(frames: list[Atoms], environments: Path) -> None:
    n_atoms = sum(len(a) for a in frames)
    print(f"\n{len(frames)} structures, {n_atoms} atoms\n\n| package | batched, µs/atom | one by one, µs/atom |")
    print("|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.extxyz"
        write(source, frames)
        for kind, title in PEERS.items():
            python = environments / kind / "bin/python"
            if not python.is_file():
                print(f"| {title} | not installed: tools/peers/install.py {kind} | |")
                continue
            command = [str(python), str(ROOT / "tools/peers/predict.py"), kind, str(source)]
            environment = {**os.environ, "PYTHONPATH": ""}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode != 0:
                print(f"| {title} | failed: {done.stderr.strip().splitlines()[-1]} | |")
                continue
            found = json.loads(done.stdout.splitlines()[-1])
            shown = (f"{1e6 * found[key] / n_atoms:.0f}" for key in ("batched", "one_by_one"))
            print(f"| {title} | {' | '.join(shown)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--structures", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", type=int, default=0)
    parser.add_argument("--venvs", type=Path, default=ROOT / "runs/peers/venvs")
    given = parser.parse_args()
    torch.set_num_threads(1)
    frames = structures(given.structures)
    own(frames, given.rounds)
    if given.peers:
        peers(frames[: given.peers], given.venvs)


if __name__ == "__main__":
    main()
