"""Energies, forces and stresses of a file's structures by a package in its environment: CPU seconds, as JSON.

    python predict.py KIND FRAMES

KIND: sevennet or mace. ``batched``: graphs and one forward of all; ``one_by_one``: a graph and a forward each. float32,
one thread, the second of two turns.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from clock import prepare
from speed import mace, sevennet

OPTIONS: dict[str, dict[str, Any]] = {
    "sevennet": {"checkpoint": "7net-0"},
    "mace": {"hidden_irreps": "128x0e + 128x1o"},
}


def runners(kind: str, frames: str) -> tuple[Callable[[list], Any], list]:
    """Return what predicts some structures in one batch, and the structures."""
    import ase.io

    atoms = ase.io.read(frames, ":")
    if kind == "sevennet":
        from sevenn.atom_graph_data import AtomGraphData
        from sevenn.train.dataload import unlabeled_atoms_to_graph
        from torch_geometric.data import Batch

        model, _, _ = sevennet(OPTIONS[kind], frames)
        model.eval()

        def predict(some: list) -> Any:
            graphs = [AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(a, 5.0)) for a in some]
            return model(Batch.from_data_list(graphs))

        return predict, atoms
    from mace import data
    from mace.tools import AtomicNumberTable, torch_geometric

    model, _, _ = mace(OPTIONS[kind], frames)
    model.eval()
    table = AtomicNumberTable(sorted({int(z) for a in atoms for z in a.numbers}))

    def predict(some: list) -> Any:
        items = [data.AtomicData.from_config(data.config_from_atoms(a), z_table=table, cutoff=5.0) for a in some]
        batch = next(iter(torch_geometric.dataloader.DataLoader(items, batch_size=len(items))))
        return model(batch.to_dict(), compute_force=True, compute_stress=True)

    return predict, atoms


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what packages print is no answer
    prepare()
    torch.set_num_threads(1)
    predict, atoms = runners(*sys.argv[1:])
    found = {}
    for name, parts in (("batched", [atoms]), ("one_by_one", [[a] for a in atoms])):
        for _ in range(2):
            started = time.process_time()
            for part in parts:
                predict(part)
            found[name] = time.process_time() - started
    print(json.dumps(found), file=answers, flush=True)


if __name__ == "__main__":
    main()
