"""The training loop: build → restore → step, validate, save → final save. One loop, top to bottom."""

import json
import logging
import math
import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mffm import distributed
from mffm.batch import Batch
from mffm.config.base import dump, load
from mffm.config.recipe import Recipe
from mffm.data.loader import Loader
from mffm.data.plan import Cursor, StepPlan
from mffm.errors import InputError, known
from mffm.models.adapter import merged
from mffm.optim import MovingAverage, learning_rate, make_optimizer
from mffm.release import PotentialSpec, code_version, write_json, write_text, write_weights
from mffm.training import checkpoint, forgetting, modes, preflight, sharding
from mffm.training.faults import Faults
from mffm.training.log import RunLog, run_facts
from mffm.training.quarantine import LossWatch, SickStepError, write_bundle
from mffm.training.setup import Setup, Trainee, deepspeed_config, prepare, trainee_of
from mffm.training.state import TrainState
from mffm.training.validate import Validator


@dataclass(frozen=True)
class Outcome:
    """How a run ended: ``finished``, ``stopped_early`` (patience) or ``interrupted`` (saved, to be resumed)."""

    run: Path
    step: int
    ended: str
    best: dict[str, dict[str, float]]


def train(recipe: Recipe) -> Outcome:
    """Start a run in a folder of its own.

    Raises:
        InputError: the folder holds a run already, or the recipe does not fit the store.
    """
    run = Path(recipe.run_folder)
    if (run / "checkpoints" / "latest").exists():
        raise InputError(
            f"{run}: holds a run already; go on with `mffm resume {run}`, or give another folder with run=..."
        )
    return _run(recipe, run, resume=False)


def resume(run: Path | str) -> Outcome:
    """Go on with a run from its newest checkpoint; nothing but the folder is needed."""
    run = Path(run)
    if not (run / "recipe.yaml").is_file():
        raise InputError(f"{run}: no recipe.yaml; not the folder of a run")
    return _run(load(Recipe, run / "recipe.yaml"), run, resume=True)


def _run(recipe: Recipe, run: Path, resume: bool) -> Outcome:
    distributed.tune_allocator()
    if recipe.train.threads:
        torch.set_num_threads(recipe.train.threads)
    ranks = distributed.ranks_from_environment()
    with Faults(run, ranks) as faults:
        return _run_as_rank(recipe, run, resume, ranks, faults)


def _run_as_rank(recipe: Recipe, run: Path, resume: bool, ranks: distributed.Ranks, faults: Faults) -> Outcome:
    started = time.perf_counter()
    device = distributed.start(ranks, recipe.train.collective_timeout_seconds)
    rendezvous_seconds = time.perf_counter() - started
    faults.joined()
    saved = _newest(run / "checkpoints", ranks) if resume else None
    setup = prepare(recipe, PotentialSpec.read(run / "potential") if saved else None)
    recipe = setup.recipe
    n_microbatches = setup.plan.n_microbatches(ranks.world_size)
    ds_config = deepspeed_config(recipe, ranks, n_microbatches)
    table = setup.spec.reference_table(device)
    trainee = trainee_of(setup, device)
    checks = []
    if recipe.train.preflight:
        cursor = Cursor.from_dict(saved[1].cursor) if saved else setup.plan.start()
        checks = preflight.check(run, setup, trainee, cursor, ranks, device, rendezvous_seconds)
        preflight.require(checks)
    if ranks.is_main:
        _write_run_folder(run, setup, ds_config)
    engine = _engine(trainee, recipe, ds_config)
    module = setup.potential
    evaluated = setup.spec.build().to(device).requires_grad_(False)
    ema = MovingAverage(sharding.own_weights(module).items(), recipe.optim.ema_decay)
    state = TrainState(0, setup.plan.start().to_dict(), setup.plan.fingerprint, ranks.world_size)
    if saved is not None:
        state = _restore(saved[0], saved[1], setup, engine, ema, ranks.world_size)
    validator = _validator(setup, table, ranks)
    loader = _loader(setup, Cursor.from_dict(state.cursor), ranks, device)
    log = _open_log(run, setup, state, ranks)
    faults.step = lambda: state.step
    with log, loader, _interrupt_flag() as interrupted, faults:
        state.wandb_id = log.wandb_id
        _say_start(log, setup, ranks, n_microbatches)
        if saved is not None:
            _say_resumed(log, *saved, ranks)
        if checks:
            log.say(preflight.summary(checks))
        if recipe.fine_tune is not None:
            log.say(modes.summary(module, recipe))
        if trainee.compiled is not None:
            log.say(trainee.compiled.summary())
        if recipe.start_from and saved is None:  # where it starts is a candidate for the best, too
            evaluated.load_state_dict(merged(sharding.whole(module, ema.weights)))
            if setup.start is not None:
                for line in forgetting.begin(run, setup, evaluated, ranks):
                    log.say(line)
            _keep_best(run, validator(evaluated), state, evaluated, setup, log, ranks)
        watch = LossWatch(recipe.train.spike_factor)
        begin = recipe.heads_first_steps if modes.trained_ahead(module, recipe) else 0
        ended = "stopped_early" if _out_of_patience(state, recipe) else "finished"
        while state.step < recipe.train.steps and ended == "finished":
            started = time.perf_counter()
            plan, batches, cursor = next(loader)
            lr, late_lr = (
                learning_rate(state.step, recipe.train.steps, recipe.optim, b, setup.plan.finish_start)
                for b in (0, begin)
            )
            try:
                parts, norm = train_step(engine, setup, plan, batches, ranks, lr, watch, late_lr)
            except SickStepError as sick:
                weights = merged(sharding.master_weights(engine, module))
                raise write_bundle(run, setup, plan, state.step, str(sick), ranks, weights) from sick
            ema.update(sharding.own_weights(module).items())
            _advance(state, setup, plan, cursor, ema)
            last = state.step == recipe.train.steps
            stop = distributed.any_rank(interrupted(), device)
            if state.step % recipe.train.log_every == 0 or last:
                seconds = time.perf_counter() - started
                _log_step(log, setup, plan, state.step, parts, lr, norm, seconds)
            if state.step % recipe.train.validate_every == 0 or last or state.step == setup.plan.finish_start:
                evaluated.load_state_dict(merged(sharding.whole(module, ema.weights)))
                _keep_best(run, validator(evaluated), state, evaluated, setup, log, ranks)
                if _out_of_patience(state, recipe):
                    ended = "stopped_early"
            if state.step % recipe.train.save_every == 0 or last or stop or ended != "finished":
                checkpoint.save(run / "checkpoints", engine, module, ema, state, recipe.train.keep)
            if stop and not last and ended == "finished":
                ended = "interrupted"
        average, raw = merged(sharding.whole(module, ema.weights)), merged(sharding.master_weights(engine, module))
        if ranks.is_main:
            write_weights(run / "weights" / "last.safetensors", average)
            write_weights(run / "weights" / "raw.safetensors", raw)
        if ended != "interrupted" and recipe.fine_tune is not None:
            distributed.barrier()  # rank 0 writes the weights
            for line in forgetting.finish(run, setup, evaluated, ranks):
                log.say(line)
        if ended != "interrupted" and validator.draw(
            run / "plots" / "validation.png", f"{recipe.name}, validation at step {state.step}, averaged weights"
        ):
            log.image("validation/parity", run / "plots" / "validation.png")
        log.ended(ended)
        log.say(f"{ended} at step {state.step}")
    distributed.barrier()
    return Outcome(run, state.step, ended, state.best)


def _newest(folder: Path, ranks: distributed.Ranks) -> tuple[Path, TrainState, list[str]] | None:
    """Return rank 0's choice of a checkpoint on every rank: file systems of several nodes may not show the same."""
    saved = checkpoint.newest_whole(folder) if ranks.is_main else None
    name = distributed.named_by_main(ranks, "mffm/checkpoint", saved[0].name if saved else "")
    if name and not ranks.is_main:
        saved = folder / name, checkpoint.read_state(folder / name), []
    return saved


def _loader(setup: Setup, cursor: Cursor, ranks: distributed.Ranks, device: torch.device) -> Loader:
    recipe = setup.recipe
    return Loader(
        setup.store, setup.plan, setup.fidelities, recipe.model.backbone.cutoff, cursor,
        rank=ranks.rank, world_size=ranks.world_size, last_step=recipe.train.steps,
        threads=loader_threads(recipe.data.loader_threads, device), pinned=device.type == "cuda",
        bare=recipe.data.neighbors == "device",
    )  # fmt: skip


def loader_threads(wanted: int | None, device: torch.device) -> int:
    """Return how many threads make batches: beside a GPU, up to four of this rank's cores; on a CPU one is plenty."""
    if wanted is not None or device.type != "cuda":
        return wanted or 1
    return max(1, min(4, len(os.sched_getaffinity(0)) // max(torch.cuda.device_count(), 1) - 1))


def _validator(setup: Setup, table: torch.Tensor, ranks: distributed.Ranks) -> Validator:
    recipe, plan = setup.recipe, setup.recipe.data.plan
    validator = Validator(
        setup.store, setup.fidelities, recipe.data.validation_split, recipe.data.validation_max_frames,
        recipe.model.backbone.cutoff, plan.edges_per_microbatch or plan.edge_budget, setup.loss, set(setup.used), table,
        ranks, setup.potential.has_stress,
    )  # fmt: skip
    if recipe.train.best not in validator.names:
        raise InputError(f"train.best: no metric {recipe.train.best!r}; this run measures: {known(validator.names)}")
    return validator


def _open_log(run: Path, setup: Setup, state: TrainState, ranks: distributed.Ranks) -> RunLog:
    recipe = setup.recipe
    versions = {"n_parameters": setup.n_parameters, "world_size": ranks.world_size}
    return RunLog(
        run, recipe.log, recipe.train.steps, state.step, recipe.name, recipe.model_dump(mode="json"), state.wandb_id,
        ranks.is_main, facts=run_facts(setup.spec, code_version(), **versions),
    )  # fmt: skip


def train_step(
    engine: Any,
    setup: Setup,
    plan: StepPlan,
    batches: list[Batch],
    ranks: distributed.Ranks,
    lr: float,
    watch: LossWatch,
    late_lr: float | None = None,
) -> tuple[torch.Tensor, float]:
    """Do one optimiser update.

    DeepSpeed averages gradients over ranks and divides by the accumulation steps, so it is handed world size ×
    microbatches × the local sum ÷ the global count.

    Args:
        late_lr: learning rate of the parameters that are not trained ahead of the others, if that is another one.

    Returns:
        the global loss by part, [n_properties, n_fidelities]; the gradient's norm before clipping.

    Raises:
        SickStepError: on all ranks alike, before the weights change. From ZeRO 1 on DeepSpeed tells that a gradient is
            not finite; it leaves the weights as they are then.
    """
    engine.train()
    for group in engine.optimizer.param_groups:
        group["lr"] = lr if late_lr is None or group["ahead"] else late_lr
    divisors = setup.loss.divisors(plan.counts, setup.plan.expected_counts(plan.step)).to(engine.device)
    stage = engine.zero_optimization_stage()
    parts, norm = torch.zeros_like(divisors), 0.0
    for i, batch in enumerate(batches):
        anchor = (torch.zeros((), device=engine.device, requires_grad=True),) if stage == 3 else ()
        loss, part = engine(batch.to(engine.device, non_blocking=True), divisors, *anchor)
        engine.backward(loss * (ranks.world_size * len(batches)))
        parts += part
        if i == len(batches) - 1:
            parts = distributed.sum_over_ranks(parts)
            if stage == 0:  # DeepSpeed keeps the norm of its own optimisers only
                gradients = [p.grad for p in setup.potential.parameters() if p.grad is not None]
                norm = float(torch.nn.utils.get_total_norm(gradients, foreach=True))
            watch.check(float(parts.sum()), norm)
        engine.step()
    if stage > 0:
        norm = float(engine.get_global_grad_norm() or 0.0)
        if not math.isfinite(norm):
            raise SickStepError("the gradient is not finite")
    return parts, norm


def _engine(trainee: Trainee, recipe: Recipe, ds_config: dict[str, Any]) -> Any:
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.ops import __compatible_ops__

    # Used by inference only, but compiled at every start on a CPU, where it needs a C++ compiler and half a minute.
    __compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # of DeepSpeed 0.19.8's own calls, at every step
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    ahead = modes.trained_ahead(trainee.potential, recipe)
    optimizer = make_optimizer(trainee.potential, recipe.optim, ahead)
    if recipe.deepspeed.zero_stage == 3:
        deepspeed.utils.set_z3_leaf_modules(trainee, [Trainee])
    return deepspeed.initialize(model=trainee, optimizer=optimizer, config=ds_config)[0]


def _out_of_patience(state: TrainState, recipe: Recipe) -> bool:
    return recipe.train.patience is not None and state.validations_since_best >= recipe.train.patience


def _restore(
    path: Path, state: TrainState, setup: Setup, engine: Any, ema: MovingAverage, world_size: int
) -> TrainState:
    if state.plan_fingerprint != setup.plan.fingerprint:
        raise InputError(
            f"{path}: was written on other data or another plan (fingerprint {state.plan_fingerprint[:12]}, now "
            f"{setup.plan.fingerprint[:12]}); "
            f"a resume needs the same; start a new run from these weights with start_from"
        )
    checkpoint.restore(path, engine, setup.potential, ema, state, setup.recipe.optim)
    return replace(state, world_size=world_size)


def _advance(state: TrainState, setup: Setup, plan: StepPlan, cursor: Cursor, ema: MovingAverage) -> None:
    state.step += 1
    state.cursor = cursor.to_dict()
    state.ema_updates = ema.updates
    for f, name in enumerate(setup.fidelities.names):
        state.systems_seen[name] = state.systems_seen.get(name, 0) + int((plan.fidelity_idx == f).sum())


def _keep_best(
    run: Path,
    metrics: dict[str, float],
    state: TrainState,
    evaluated: torch.nn.Module,
    setup: Setup,
    log: RunLog,
    ranks: distributed.Ranks,
) -> None:
    """Log a validation; keep the weights that are best by the recipe's metric, and by each fidelity's loss."""
    recipe, metric = setup.recipe, setup.recipe.train.best
    watched = {"best": metric} | {f"best-{n}": f"val/{n}/loss" for n in recipe.fidelities if f"val/{n}/loss" in metrics}
    state.note(metrics, metric, dict.fromkeys(watched.values()), setup.plan.finish_start)
    log.metrics(state.step, metrics | {"best": state.best[metric]["value"]} if metric in state.best else metrics)
    for name, key in watched.items():
        if key in state.best and state.best[key]["step"] == state.step and ranks.is_main:
            write_weights(run / "weights" / f"{name}.safetensors", evaluated.state_dict())
    shown = "  ".join(f"{k.removeprefix('val/')} {v:.1f}" for k, v in metrics.items() if k.endswith("_mae"))
    log.say(f"step {state.step} validation: loss {metrics['val/loss']:.4f}  {shown}")


def _log_step(
    log: RunLog, setup: Setup, plan: StepPlan, step: int, parts: torch.Tensor, lr: float, norm: float, seconds: float
) -> None:
    values = {"train/loss": float(parts.sum()), "lr": lr, "grad_norm": norm}
    for p, prop in enumerate(setup.loss.properties):
        for f, name in enumerate(setup.fidelities.names):
            if (f, prop) in setup.used:
                values[f"train/{name}/{prop}"] = float(parts[p, f])
                values[f"labels/{name}/{prop}"] = float(plan.counts.get((f, prop), 0))
    values["atoms_per_s"] = float(plan.n_atoms.sum()) / seconds
    values["edges_per_s"] = float(plan.n_edges.sum()) / seconds
    log.metrics(step, values)
    log.progress(step, f"loss {values['train/loss']:.4f}")


def _write_run_folder(run: Path, setup: Setup, ds_config: dict[str, Any]) -> None:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "weights").mkdir(exist_ok=True)
    write_text(run / "recipe.yaml", dump(setup.recipe))
    write_json(run / "deepspeed.json", ds_config)
    setup.spec.write(run / "potential")
    write_text(run / "references.md", setup.spec.references.report_markdown())


def _say_start(log: RunLog, setup: Setup, ranks: distributed.Ranks, n_microbatches: int) -> None:
    labels = "; ".join(
        f"{name}: " + ", ".join(f"{n:,} {p}" for p, n in counts.items())
        for name, counts in setup.spec.label_counts.items()
    )
    section = setup.recipe.deepspeed
    offload = "" if section.offload == "none" else f", offload {section.offload}"
    log.say(
        f"{setup.recipe.name}: {setup.n_parameters:,} parameters, {ranks.world_size} rank(s) × "
        f"{n_microbatches} microbatch(es), "
        f"ZeRO {section.zero_stage}{offload}; labels {labels}"
    )
    if not setup.potential.is_conservative:
        log.say(
            "forces are direct: not conservative; for pretraining, to be fine-tuned with model.forces: conservative"
        )
    if setup.dropped:
        log.say(
            f"start_from {setup.recipe.start_from}: its direct heads are left out, {len(setup.dropped)} tensors "
            "(potential/provenance.json names them)"
        )
    if section.overrides:
        log.say(f"merged over the generated deepspeed.json: {json.dumps(section.overrides)}")
    for name, n in setup.plan.oversize.items():
        if n:
            log.say(
                f"pool {name}: {n} frames are over the budget (data.plan.oversize: {setup.recipe.data.plan.oversize})"
            )


def _say_resumed(log: RunLog, path: Path, state: TrainState, warnings: list[str], ranks: distributed.Ranks) -> None:
    for warning in warnings:
        log.say(f"warning: passed over a damaged checkpoint: {warning}")
    log.say(f"resumed from {path.name}")
    if state.world_size != ranks.world_size:
        log.say(
            f"written by {state.world_size} rank(s), now {ranks.world_size}: the same global batches, not bit-identical"
        )


@contextmanager
def _interrupt_flag() -> Iterator[Any]:
    """Turn SIGINT, SIGTERM and SIGUSR2 into a flag that is read at a step boundary; a second SIGINT acts at once."""
    raised: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and raised:
            raise KeyboardInterrupt
        raised.append(number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    try:
        before = {s: signal.signal(s, handler) for s in signals}
    except ValueError:  # not the main thread: a library caller handles signals itself
        yield lambda: False
        return
    try:
        yield lambda: bool(raised)
    finally:
        for s, old in before.items():
            if signal.getsignal(s) is handler:  # a rank that failed ignores signals until it has said why
                signal.signal(s, old)
