"""A tiny training on frames of any store, and global batches built by hand: what the self-tests run on."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mffm.batch import Batch
from mffm.config.base import validate
from mffm.config.recipe import Recipe
from mffm.data.loader import collate
from mffm.data.plan import StepPlan
from mffm.data.pools import bit
from mffm.data.store import Store, edge_folders
from mffm.distributed import Ranks
from mffm.errors import InputError
from mffm.keys import ENERGY, FORCES, Property
from mffm.training.loop import _engine
from mffm.training.setup import Setup, Trainee, deepspeed_config, prepare

BACKBONE = {
    "lmax": 2, "l_message": 1, "layers": 2, "channels": 8, "edge_channels": 8,
    "n_radial": 4, "radial_hidden": 8, "ff_expansion": 1, "body_order": 3,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "independent": {"conditioning": {"kind": "none"}, "heads": {"kind": "independent", "hidden": [8]}},
    "conditioning": {"conditioning": {"kind": "onehot"}, "heads": {"kind": "shared", "hidden": [8]}},
}
# AdamW divides a gradient by its own size: at eps 1e-8 one that is only rounding moves its weight by a whole lr, in
# either direction, on any two machines. With 1e-3 (of gradients of the order of 1) the update is smooth there.
EPS = 1e-3
BOTH: tuple[Property, ...] = (ENERGY, FORCES)


def cutoff_of(store: Store) -> float:
    """Return the smallest cutoff, Å, that the store's edges were counted for."""
    names = [p.stem for f in edge_folders(store.path, store.geometry_fingerprint) for p in f.glob("cutoff-*.json")]
    if not names:
        raise InputError(f"{store.path}: no edges were counted; run `mffm edges {store.path} --cutoff 5`")
    return min(float(name.removeprefix("cutoff-")) for name in names)


def two_fidelities(store: Store) -> list[str]:
    """Return the first two fidelities with energies and forces in the training split."""
    counts = store.label_counts("train")
    names = [n for n in store.fidelities.names if {ENERGY, FORCES} <= set(counts.get(n, {}))]
    if len(names) < 2:
        raise InputError(
            f"{store.path}: {len(names)} fidelity with energies and forces in the training split; the self-test needs 2"
        )
    return names[:2]


def trial(store_path: str, model: str, run: str, plan: Mapping[str, Any] | None = None, **sections: Any) -> Setup:
    """Return a tiny run on two fidelities of a store, prepared like any other.

    Args:
        model: key of ``MODELS``.
        run: folder of the run; nothing is written there.
        plan: of the recipe's section of this name, merged over the trial's.
        sections: of the recipe, merged over the trial's.
    """
    store = Store(store_path)
    pools = [{"fidelity": name, "properties": list(BOTH), "max_frames": 100} for name in two_fidelities(store)]
    recipe: dict[str, Any] = {
        "name": "selftest",
        "run": run,
        "data": {
            "store": store_path,
            "plan": {"pools": pools, "edge_budget": 1000, "oversize": "single", **(plan or {})},
        },
        "model": {"backbone": {"cutoff": cutoff_of(store), **BACKBONE}, **MODELS[model]},
        "train": {"steps": 1000},
        "log": {"wandb": "disabled"},
    }
    for key, value in sections.items():
        recipe[key] = {**recipe.get(key, {}), **value}
    return prepare(validate(Recipe, recipe, "the self-test's recipe"))


def small_rows(setup: Setup, fidelity: int, n: int) -> list[int]:
    """Return ``n`` training rows with energy and forces of a fidelity, the smallest first; again from the first where
    there are fewer."""
    store, name = setup.store, setup.fidelities.names[fidelity]
    rows = store.rows(split="train", fidelity=name)
    rows = rows[store.has(name, ENERGY)[rows] & store.has(name, FORCES)[rows]]
    n_edges = store.n_edges(setup.recipe.model.backbone.cutoff)[rows]
    rows = rows[np.argsort(n_edges, kind="stable")]
    rows = rows[np.sort(n_edges) > 0] if (n_edges > 0).any() else rows
    return [int(rows[i % len(rows)]) for i in range(n)]


@dataclass(frozen=True)
class System:
    """One system of a global batch: a row of the store at a fidelity with the labels to use."""

    row: int
    fidelity: int
    properties: tuple[Property, ...] = BOTH


def packed(setup: Setup, systems: Sequence[System]) -> Batch:
    """Return systems as one batch; none: a dummy."""
    properties: list[Collection[Property]] = [s.properties for s in systems]
    return collate(
        setup.store, [s.row for s in systems], [s.fidelity for s in systems], setup.fidelities, properties,
        setup.recipe.model.backbone.cutoff,
    )  # fmt: skip


def step_plan(setup: Setup, systems: Sequence[System], step: int = 0) -> StepPlan:
    """Return the plan of a step of these systems, with the label counts of their collated batch."""
    batch = packed(setup, systems)
    counts: dict[tuple[int, Property], int] = {}
    for prop, mask in batch.masks.items():
        for f, live, n_atoms in zip(batch.fidelity_idx.tolist(), mask.tolist(), batch.n_atoms.tolist(), strict=True):
            if live:
                size = 1 if prop == ENERGY else 3 * n_atoms
                counts[f, prop] = counts.get((f, prop), 0) + size
    rows = np.array([s.row for s in systems], np.int64)
    fidelity_idx = np.array([s.fidelity for s in systems], np.int64)
    live_bits = np.array([sum(int(bit(p)) for p in s.properties) for s in systems], np.uint8)
    n_edges = setup.store.n_edges(setup.recipe.model.backbone.cutoff)[rows]
    return StepPlan(step, rows, fidelity_idx, fidelity_idx, batch.n_atoms.numpy(), n_edges, live_bits, counts)


def with_weights(setup: Setup, weights: Mapping[str, Tensor], device: torch.device, **sections: Any) -> Setup:
    """Return the setup with a potential of its own that starts from the weights, and sections of its recipe changed."""
    potential = setup.spec.build()
    potential.load_state_dict(weights)
    changed = {k: getattr(setup.recipe, k).model_copy(update=v) for k, v in sections.items()}
    return replace(setup, potential=potential.to(device), recipe=setup.recipe.model_copy(update=changed))


def engine_of(setup: Setup, ranks: Ranks, n_microbatches: int) -> Any:
    """Return the product's own DeepSpeed engine around a setup's potential."""
    device = next(setup.potential.parameters()).device
    trainee = Trainee(setup.potential, setup.loss, setup.spec.reference_table(device))
    return _engine(trainee, setup.recipe, deepspeed_config(setup.recipe, ranks, n_microbatches))


def largest_difference(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return max |a - b| over all entries of all tensors; NaN where there is one."""
    return largest({name: a[name].cpu() - b[name].cpu() for name in b})


def largest(a: Mapping[str, Tensor]) -> float:
    """Return max |a| over all entries of all tensors; NaN where there is one."""
    return float(torch.stack([value.detach().abs().max().cpu() for value in a.values()]).max())


def over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Return the largest of each value over the ranks; NaN wins."""
    table = torch.tensor([v if v == v else float("inf") for v in values], dtype=torch.float64, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return table.tolist()
