"""What a run is made of before its first step: data, element references, potential, DeepSpeed's JSON."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mffm.batch import Batch, reference_energy
from mffm.config.model import EscnConfig
from mffm.config.recipe import Recipe, TrainSection
from mffm.data.plan import Plan, Pool, build_pools
from mffm.data.store import Store
from mffm.distributed import Ranks
from mffm.errors import InputError
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY, FORCES, Property
from mffm.loss import Loss
from mffm.models.adapter import merged
from mffm.models.potential import Potential
from mffm.release import Loaded, PotentialSpec, code_version, load
from mffm.training import baselines, finetune, modes, predicted, step_zero
from mffm.training.compiled import CompiledStep, require_compiler


@dataclass
class Setup:
    """Everything that the loop needs, the same on every rank."""

    recipe: Recipe
    store: Store
    fidelities: FidelityTable
    plan: Plan
    loss: Loss
    spec: PotentialSpec
    potential: Potential
    used: dict[tuple[int, Property], int]
    dropped: list[str] = field(default_factory=list)  # tensors of the base's direct heads
    start: finetune.Start | None = None  # of a fine-tuning that begins
    n_parameters: int = field(init=False)  # of the potential, which holds empty tensors once ZeRO 3 has sharded it

    def __post_init__(self) -> None:
        self.n_parameters = self.potential.n_parameters


def prepare(recipe: Recipe, saved: PotentialSpec | None = None) -> Setup:
    """Build a run from its recipe. The setup's recipe pins layers and fingerprint of the store, for a resume.

    Args:
        saved: of a run that is resumed; its element references and scales are kept, not fitted again.

    Raises:
        InputError: the store, the recipe and the base do not fit each other.
    """
    store = Store(recipe.data.store, recipe.data.layers)
    if recipe.data.fingerprint not in (None, store.fingerprint):
        raise InputError(
            f"{store.path}: fingerprint {store.fingerprint}, but the recipe pins data.fingerprint "
            f"{recipe.data.fingerprint}; "
            "use the store that the recipe was written for, or change the pin"
        )
    pins = {
        "store": str(store.path.resolve()),  # a resume may come from another working directory
        "layers": [layer.name for layer in store.layers],
        "fingerprint": store.fingerprint,
    }
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update=pins)})
    base = load(recipe.start_from) if recipe.start_from and saved is None else None
    start: finetune.Start | None = None
    if recipe.fine_tune is not None and base is not None:
        recipe, start, store = finetune.resolved(recipe, base, store)
        base = start.base
    elif recipe.fine_tune is not None and recipe.fine_tune.replay == "predictions":
        replay = saved.provenance.get("start_from", {}).get("replay", {}) if saved else {}
        store = predicted.opened(store, Path(recipe.run_folder) / predicted.FOLDER, replay.get("fingerprint"))
    known_ones = next((x.fidelities for x in (saved, base) if x is not None), store.fidelities)
    fidelities = finetune.fidelities_of(recipe, store, known_ones)
    for other, path, init_from in (
        (base.spec if base else None, recipe.start_from, recipe.model.init_from),
        (saved, recipe.run_folder, {}),
    ):
        if other is not None:
            _require_same_backbone(recipe, other, str(path))
            _require_same_d3(recipe, other, str(path), init_from)
    cutoff = recipe.model.backbone.cutoff
    pools = build_pools(store, recipe.data.plan, fidelities, cutoff)
    plan = Plan(pools, recipe.data.plan, recipe.seed, recipe.train.steps)
    used = live_labels(pools)
    loss = Loss(recipe.loss, fidelities.names, used)
    torch.manual_seed(recipe.seed)
    if saved is not None:
        potential = saved.build()
        modes.freeze(potential, recipe)
        return Setup(recipe, store, fidelities, plan, loss, saved, potential, used)
    if start is not None:
        start = finetune.with_elements(recipe, start, store, pools)
        recipe, start = finetune.with_parents(recipe, start, store, pools)
        base = start.base
        _require_same_d3(recipe, base.spec, str(recipe.start_from), recipe.model.init_from)
    rows = {name: _energy_rows(pools, name) for name in fidelities.names}
    counts: dict[str, dict[str, int]] = {
        name: {prop: n for (f, prop), n in used.items() if f == i} for i, name in enumerate(fidelities.names)
    }
    spec = PotentialSpec(
        model=recipe.model,
        fidelities=fidelities,
        references=baselines.fit_references(recipe, store, fidelities, rows, base),
        avg_neighbors=base.spec.avg_neighbors if base else average_neighbors(pools),
        scale=base.spec.scale if base else force_scale(store, pools),
        label_counts=counts if start is None else finetune.kept_counts(start.base, counts, recipe),
        provenance=provenance(recipe, store, plan, base),
    )
    potential = spec.build()
    if isinstance(recipe.model.backbone, EscnConfig) and recipe.model.backbone.weights and base is None:
        from mffm.models.escn import load_checkpoint

        load_checkpoint(potential.learned.backbone, recipe.model.backbone.weights)
    dropped: list[str] = []
    if base is not None:
        dropped = potential.load_weights(base.potential.state_dict(), base.fidelities.names, recipe.model.init_from)
        spec.provenance["start_from"]["dropped"] = dropped
    setup = Setup(recipe, store, fidelities, plan, loss, spec, potential, used, dropped, start)
    if start is not None:
        step_zero.require(setup, start.base)
        modes.freeze(potential, recipe)
        setup.n_parameters = potential.n_parameters
    return setup


def _require_same_backbone(recipe: Recipe, other: PotentialSpec, path: str) -> None:
    """Shapes of weights do not tell a cutoff or an envelope; weights mean nothing under another one.

    Raises:
        InputError: with every key that differs and both values.
    """
    mine, theirs = (m.backbone.model_dump(exclude={"weights", "size"}) for m in (recipe.model, other.model))
    keys = sorted(set(mine) | set(theirs))
    differing = [f"{k}: {mine.get(k)} here, {theirs.get(k)} there" for k in keys if mine.get(k) != theirs.get(k)]
    if differing:
        raise InputError(
            f"model.backbone differs from that of the weights in {path} ({'; '.join(differing)}); set the same values"
        )


def _require_same_d3(recipe: Recipe, other: PotentialSpec, path: str, init_from: Mapping[str, str]) -> None:
    """Weights and references that learned the rest of DFT-D3 mean something with the same DFT-D3 alone.

    Raises:
        InputError: with the fidelity and both settings.
    """
    for name in recipe.fidelities:
        source = init_from.get(name, name)
        mine, theirs = recipe.model.d3.get(name), other.model.d3.get(source)
        if source in other.fidelities and mine != theirs:
            shown = [c.model_dump(mode="json") if c else "none" for c in (mine, theirs)]
            raise InputError(
                f"model.d3.{name} is {shown[0]}, but the weights in {path} were trained with {shown[1]} "
                f"at {source!r}: set the same"
            )


def _energy_rows(pools: list[Pool], fidelity: str) -> np.ndarray:
    """Return the rows whose energies the recipe trains: references are fitted on no other label. [n] int64"""
    rows = [p.rows for p in pools if p.fidelity == fidelity and ENERGY in p.properties]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *rows]))


def live_labels(pools: list[Pool]) -> dict[tuple[int, Property], int]:
    """Return (fidelity index, property) → frames whose label the pools train, 0 where a pool asks for what it lacks."""
    counts: dict[tuple[int, Property], int] = {}
    for pool in pools:
        for prop, n in pool.label_counts.items():
            counts[pool.fidelity_idx, prop] = counts.get((pool.fidelity_idx, prop), 0) + n
    return counts


def average_neighbors(pools: list[Pool]) -> float:
    """Return edges per atom over the pools; the backbone's density is divided by its root."""
    n_edges = sum(float(pool.n_edges.sum()) for pool in pools)
    n_atoms = sum(float(pool.n_atoms.sum()) for pool in pools)
    return max(n_edges / n_atoms, 1.0)


def force_scale(store: Store, pools: list[Pool]) -> float:
    """Return the RMS force component over all fidelities, eV/Å; 1 where no pool trains forces.

    One scale for all fidelities (SevenNet's preset), so that one loss weight means the same for each.
    """
    square, count = 0.0, 0
    for pool in pools:
        if FORCES not in pool.properties:
            continue
        stride = max(len(pool.rows) // baselines.STATISTICS_FRAMES, 1)
        for row in pool.rows[::stride]:
            forces = store.labels(int(row), pool.fidelity).get(FORCES)
            if forces is not None:
                square += float(np.square(forces, dtype=np.float64).sum())
                count += forces.size
    return max((square / count) ** 0.5, 1e-3) if count else 1.0


def provenance(recipe: Recipe, store: Store, plan: Plan, base: Loaded | None) -> dict[str, Any]:
    """Return where a potential comes from: code, data with licences, recipe, base."""
    record: dict[str, Any] = {
        **code_version(),
        "store": store.path.name,
        "store_fingerprint": store.fingerprint,
        "plan_fingerprint": plan.fingerprint,
        "sources": [dict(s) for s in store.sources],
        "recipe": recipe.model_dump(mode="json"),
    }
    if base is not None:
        record["start_from"] = {"path": str(recipe.start_from), "provenance": base.spec.provenance}
        if store.beside is not None:
            record["start_from"]["replay"] = {"fingerprint": store.layers[0].fingerprint}
    return record


def trainee_of(setup: Setup, device: torch.device) -> "Trainee":
    """Return the module to train of a run, with the recipe's precision, checkpointing and compilation.

    Raises:
        InputError: the recipe wants compilation, and there is no compiler.
    """
    config = setup.recipe.train
    use_precision(setup.potential, config)
    compiled = None
    if config.compile:
        require_compiler()
        compiled = CompiledStep(setup.potential, setup.loss, setup.spec.avg_neighbors)
    return Trainee(setup.potential.to(device), setup.loss, setup.spec.reference_table(device), compiled)


def use_precision(potential: Potential, config: TrainSection) -> None:
    """Set precision and activation checkpointing of the potential's training. tf32 holds for the whole process."""
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    backbone = potential.learned.backbone
    backbone.multiply_in(torch.bfloat16 if config.precision == "bfloat16" else None)
    backbone.recompute = config.activation_checkpointing


class _Together(torch.autograd.Function):
    """The identity of parameters, whose backward waits for the gradients of all; the anchor's, a zero, comes last."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(anchor)
        return tuple(p.view_as(p) for p in parameters)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return torch.zeros_like(ctx.saved_tensors[0]), *gradients


class Trainee(nn.Module):
    """The module given to DeepSpeed: energy, its derivatives and the loss in one forward.

    Derivatives outside of the engine's forward would run through its output hooks and fail or go wrong silently.

    ZeRO 3 frees the weights of a module when the gradients of the module's inputs are there. An inner derivative would
    set that off too early, so there the whole trainee is one leaf module, whose only input with a gradient is an anchor
    that gets it after all parameters have theirs.
    """

    def __init__(self, potential: Potential, loss: Loss, reference_table: Tensor, compiled: CompiledStep | None = None):
        super().__init__()
        self.potential = potential
        self.loss = loss
        self.reference_table = reference_table  # a plain attribute: a float64 that no engine casts
        self.compiled = compiled

    def forward(self, batch: Batch, divisors: Tensor, anchor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return this microbatch's share of the global loss and its parts per (property, fidelity).

        Args:
            anchor: at ZeRO 3 a scalar that requires grad.
        """
        names, parameters = zip(*self.potential.named_parameters(), strict=True)
        if anchor is not None:
            trained = [i for i, p in enumerate(parameters) if p.requires_grad]
            together = _Together.apply(anchor, *(parameters[i] for i in trained))
            at = dict(zip(trained, together, strict=True))
            parameters = tuple(at.get(i, p) for i, p in enumerate(parameters))
        reference = torch.nan_to_num(reference_energy(batch, self.reference_table))
        plain = merged(dict(zip(names, parameters, strict=True)))
        if self.compiled is not None:
            return self.compiled(tuple(plain.values()), batch, reference, divisors)
        wanted = {"forces": self.loss.needs_forces, "stress": self.loss.needs_stress}
        if anchor is None and len(plain) == len(names):
            prediction = self.potential(batch, **wanted)
        else:
            prediction = torch.func.functional_call(self.potential, plain, (batch,), wanted)
        loss, parts = self.loss(prediction, batch, reference, divisors)
        # 0 × energy: a loss of forces alone must reach the heads' last biases too, the same parameters on every rank.
        return loss + 0.0 * prediction.energy.sum(), parts


def deepspeed_config(recipe: Recipe, ranks: Ranks, n_microbatches: int) -> dict[str, Any]:
    """Return DeepSpeed's JSON: generated from the recipe, with the recipe's overrides merged over it."""
    _refuse_overrides(recipe.deepspeed.overrides)
    zero: dict[str, Any] = {"stage": recipe.deepspeed.zero_stage, "overlap_comm": False}
    if recipe.deepspeed.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if recipe.deepspeed.offload == "optimizer_and_parameters":
        zero["offload_param"] = {"device": "cpu"}
    generated = {
        "train_micro_batch_size_per_gpu": 1,  # a microbatch is one packed Batch
        "gradient_accumulation_steps": n_microbatches,
        "train_batch_size": n_microbatches * ranks.world_size,
        "gradient_clipping": recipe.optim.clip,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own AdamW for offloading needs a C++ compiler; torch's is exact
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
    return _merged(generated, recipe.deepspeed.overrides)


# What decides the numbers has a key of its own in the recipe; DeepSpeed's would change them behind its back.
RECIPE_KEYS = {
    "train_batch_size": "data.plan.edge_budget",
    "train_micro_batch_size_per_gpu": "data.plan.edge_budget",
    "gradient_accumulation_steps": "data.plan.edges_per_microbatch",
    "gradient_clipping": "optim.clip",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_force_ds_cpu_optimizer": "deepspeed.offload",
    "optimizer": "optim",
    "scheduler": "optim",
    # DeepSpeed casts all weights, and so the functions of distance: no smooth energies. Autocast breaks our Functions.
    "bf16": "train.precision",
    "torch_autocast": "train.precision",
    "fp16": "train.precision, which has no float16: its range is too small for forces and their gradients",
}


def _refuse_overrides(overrides: Mapping[str, Any]) -> None:
    zero = overrides.get("zero_optimization", {})
    if not isinstance(zero, Mapping):
        raise InputError(
            f"deepspeed.overrides.zero_optimization: {zero!r}; expected keys and values, which are merged over the "
            "generated ones; the stage is the recipe's deepspeed.zero_stage"
        )
    given = [*overrides, *(f"zero_optimization.{k}" for k in zero)]
    for key in given:
        if key in RECIPE_KEYS:
            raise InputError(f"deepspeed.overrides.{key}: not to be overridden; the recipe's key is {RECIPE_KEYS[key]}")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = _merged(result[key], value) if both else value
    return result
