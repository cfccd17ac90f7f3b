"""One model on one batch of frames, in the environment of its package: inference or a training step at each word.

    python speed.py KIND OPTIONS FRAMES

KIND: mffm, mace, sevennet or nequip; OPTIONS: JSON; FRAMES: extxyz (for mffm: a store and row numbers, JSON). It
answers with a line of JSON: first what it is, then for each line read, ``infer``, ``train`` or ``peak`` (a training
step), the CPU seconds or the peak of the resident size above its start, KiB. A training step is energy, forces and
stress, and the gradient of a sum of their mean squares; no optimiser. float32, one thread, cutoff 5 Å.
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clock import prepare

CUTOFF = 5.0
Step = Callable[[bool], tuple[torch.Tensor, ...]]  # training → energy, forces, stress


def mffm(options: dict[str, Any], frames: str) -> tuple[torch.nn.Module, Step, dict[str, int]]:
    from mffm.config.model import ModelConfig
    from mffm.data.loader import collate
    from mffm.data.store import Store
    from mffm.keys import PROPERTIES
    from mffm.models.potential import Potential

    given, options = json.loads(frames), dict(options)
    compiled = options.pop("compiled", False)
    store, rows, fidelity = Store(given["store"]), given["rows"], given["fidelity"]
    backbone = {"cutoff": CUTOFF, "layers": 2, **options}
    torch.manual_seed(0)
    config = ModelConfig.model_validate({"backbone": backbone})
    potential = Potential(config, [fidelity], avg_neighbors=45.0, scale=1.0)
    n, table = len(rows), store.fidelities
    batch = collate(store, rows, [table.index(fidelity)] * n, table, [PROPERTIES] * n, CUTOFF)
    batch = batch.with_fidelity(torch.zeros(n, dtype=torch.int64))

    loss = compiled_loss(potential, batch, fidelity) if compiled else None

    def step(training: bool) -> tuple[torch.Tensor, ...]:
        if training and loss is not None:
            return (loss(),)
        p = potential(batch, forces=True, stress=True)
        return p.energy, p.forces, p.stress

    return potential, step, {"n_edges": batch.n_edges, "n_atoms": len(batch.atomic_numbers), "layers": 2}


def compiled_loss(potential: Any, batch: Any, fidelity: str) -> Callable[[], torch.Tensor]:
    """Return ``train.compile``'s loss of the batch: mean squares of energy, forces and stress."""
    from mffm.config.recipe import LossConfig, TermConfig
    from mffm.keys import PROPERTIES
    from mffm.loss import Loss
    from mffm.training.compiled import CompiledStep

    term, n = TermConfig(form="mse"), batch.n_systems
    batch.masks = {p: torch.ones(n, dtype=torch.bool) for p in PROPERTIES}
    loss = Loss(LossConfig(energy=term, forces=term, stress=term), [fidelity], {(0, p): 1 for p in PROPERTIES})
    divisors = loss.divisors({(0, p): float(n) for p in PROPERTIES}, {})
    reference = torch.zeros(n, dtype=torch.float64)
    step = CompiledStep(potential, loss, batch.n_edges / len(batch.atomic_numbers))
    return lambda: step(list(potential.parameters()), batch, reference, divisors)[0]


def mace(options: dict[str, Any], frames: str) -> tuple[torch.nn.Module, Step, dict[str, int]]:
    import ase.io
    import numpy as np
    from e3nn import o3
    from mace import data, modules
    from mace.tools import AtomicNumberTable, torch_geometric

    atoms = ase.io.read(frames, ":")
    zs = sorted({int(z) for a in atoms for z in a.numbers})
    torch.manual_seed(0)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    model = modules.ScaleShiftMACE(
        r_max=CUTOFF, num_bessel=8, num_polynomial_cutoff=5, max_ell=3, interaction_cls=block,
        interaction_cls_first=block, num_interactions=2, num_elements=len(zs),
        hidden_irreps=o3.Irreps(options["hidden_irreps"]), MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.zeros(len(zs)), avg_num_neighbors=45.0, atomic_numbers=zs, correlation=3,
        gate=torch.nn.functional.silu, radial_type="bessel", radial_MLP=[64, 64, 64], atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )  # fmt: skip
    table = AtomicNumberTable(zs)
    items = [data.AtomicData.from_config(data.config_from_atoms(a), z_table=table, cutoff=CUTOFF) for a in atoms]
    batch = next(iter(torch_geometric.dataloader.DataLoader(items, batch_size=len(items)))).to_dict()

    def step(training: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        fresh = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}  # it writes into it
        out = model(fresh, training=training, compute_force=True, compute_stress=True)
        return out["energy"], out["forces"], out["stress"]

    return model, step, {"n_edges": batch["edge_index"].shape[1], "n_atoms": len(batch["positions"]), "layers": 2}


def sevennet(options: dict[str, Any], frames: str) -> tuple[torch.nn.Module, Step, dict[str, int]]:
    import ase.io
    import sevenn._keys as KEY
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.train.dataload import unlabeled_atoms_to_graph
    from sevenn.util import load_checkpoint
    from torch_geometric.data import Batch

    loaded = load_checkpoint(options["checkpoint"])
    model = loaded.build_model()
    model.set_is_batch_data(True)
    graphs = [unlabeled_atoms_to_graph(a, CUTOFF) for a in ase.io.read(frames, ":")]
    batch = Batch.from_data_list([AtomGraphData.from_numpy_dict(g) for g in graphs])

    def step(_: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = model(batch.clone())
        return out[KEY.PRED_TOTAL_ENERGY], out[KEY.PRED_FORCE], out[KEY.PRED_STRESS]

    layers = loaded.config[KEY.NUM_CONVOLUTION]
    return model, step, {"n_edges": batch[KEY.EDGE_IDX].shape[1], "n_atoms": batch.num_nodes, "layers": layers}


def nequip(options: dict[str, Any], frames: str) -> tuple[torch.nn.Module, Step, dict[str, int]]:
    import ase.io
    from nequip.data import AtomicDataDict, from_ase
    from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
    from nequip.model import NequIPGNNModel
    from nequip.utils.global_state import set_global_state

    set_global_state()
    atoms = ase.io.read(frames, ":")
    symbols = sorted({s for a in atoms for s in a.get_chemical_symbols()})
    layers = 4
    model = NequIPGNNModel(
        seed=0, model_dtype="float32", type_names=symbols, r_max=CUTOFF, num_layers=layers, parity=True,
        radial_mlp_depth=2, radial_mlp_width=64, avg_num_neighbors=45.0, compile_mode="eager", **options,
    )  # fmt: skip
    transforms = [ChemicalSpeciesToAtomTypeMapper(symbols), NeighborListTransform(CUTOFF)]
    items = []
    for a in atoms:
        item = from_ase(a)
        for transform in transforms:
            item = transform(item)
        items.append(item)
    batch = AtomicDataDict.batched_from_list(items)
    if hasattr(model, "sole_model"):
        model = model.sole_model

    def step(_: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        out = model(dict(batch))
        return out["total_energy"], out["forces"], out["stress"]

    return model, step, {"n_edges": batch["edge_index"].shape[1], "n_atoms": len(batch["pos"]), "layers": layers}


def resident(what: str, reset: bool = False) -> int:
    """Return VmRSS, the resident size, or VmHWM, its peak, in KiB; ``reset``: give back free memory and begin anew."""
    if reset:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what))


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what packages print is no answer
    prepare()
    kind, options, frames = sys.argv[1:]
    make = {"mffm": mffm, "mace": mace, "sevennet": sevennet, "nequip": nequip}[kind]
    given = Path(frames).read_text() if kind == "mffm" else frames
    model, step, facts = make(json.loads(options), given)
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(json.dumps({**facts, "n_parameters": n}), file=answers, flush=True)
    for line in sys.stdin:
        training = line.strip() != "infer"
        model.train(training)
        before = resident("VmRSS", reset=True) if line.strip() == "peak" else 0
        started = time.process_time()
        if training:
            model.zero_grad(set_to_none=True)
            sum(value.square().mean() for value in step(True)).backward()
        else:
            step(False)
        seconds = time.process_time() - started
        grown = resident("VmHWM") - before
        print(json.dumps(grown if line.strip() == "peak" else seconds), file=answers, flush=True)


if __name__ == "__main__":
    main()
