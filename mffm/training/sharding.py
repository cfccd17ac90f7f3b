"""Weights and the optimiser's state where DeepSpeed keeps them, and whole, whatever the ZeRO stage.

Stages 0 to 2 keep every weight on every rank. Stage 3 gives each rank a shard: the flat parameter, padded to a multiple
of the ranks, cut into equal parts. Optimiser state is sharded from stage 1 on.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from mffm.optim import trained

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's state of a parameter, the only one from stage 1 on


def _is_sharded(parameter: Any) -> bool:
    return hasattr(parameter, "ds_id")


def own_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the float32 weights that this rank holds: all of each, or at stage 3 its shard [numel / ranks]."""
    return {n: _own_shard(p) if _is_sharded(p) else p for n, p in module.named_parameters()}


def _own_shard(parameter: Any) -> Tensor:
    if parameter.requires_grad:
        return safe_get_local_fp32_param(parameter)
    return parameter.ds_tensor.to(parameter.device)  # frozen: no optimiser has a master of it


def shards(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return of full tensors what this rank holds, in the shapes of ``own_weights`` and on the module's device."""
    return {n: _shard(p, values[n].to(p.device)) for n, p in module.named_parameters()}


def _shard(parameter: Any, value: Tensor) -> Tensor:
    if not _is_sharded(parameter):
        return value
    n, rank, world = parameter.ds_tensor.ds_numel, dist.get_rank(), dist.get_world_size()
    return torch.nn.functional.pad(value.flatten(), (0, n * world - value.numel()))[rank * n : (rank + 1) * n]


def whole(module: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the full tensors of what ranks hold in the shapes of ``own_weights``. Collective at stage 3."""
    return {n: _whole(p, values[n]) for n, p in module.named_parameters()}


def _whole(parameter: Any, value: Tensor) -> Tensor:
    if not _is_sharded(parameter):
        return value
    gathered = value.new_empty(dist.get_world_size() * value.numel())
    dist.all_gather(list(gathered.chunk(dist.get_world_size())), value.contiguous())
    return gathered[: parameter.ds_numel].view(parameter.ds_shape)


def master_weights(engine: Any, module: nn.Module) -> dict[str, Tensor]:
    """Return the full float32 weights by name, on CPU. Every rank must call this."""
    # up to stage 2 a float32 weight is its master, and needs no communication
    here = engine.zero_optimization_stage() < 3
    full: dict[str, Tensor] = {}
    for n, p in module.named_parameters():
        if here and p.dtype == torch.float32:
            full[n] = p
        else:
            full[n] = safe_get_full_fp32_param(p) if p.requires_grad else _whole(p, _own_shard(p))
    return {n: value.detach().to("cpu", torch.float32, copy=True) for n, value in full.items()}


def moments(engine: Any, module: nn.Module) -> dict[str, Tensor]:
    """Return the optimiser's whole state but for the number of steps, as <key>/<parameter>, on CPU.

    Every rank must call this, after a first step.
    """
    stage = engine.zero_optimization_stage()
    if stage in (1, 2):
        _link_states(engine)
    values = {}
    for name, p in trained(module):
        for key in MOMENTS if stage > 0 else [k for k in engine.optimizer.state[p] if k != "step"]:
            value = engine.optimizer.state[p][key] if stage == 0 else safe_get_full_optimizer_state(p, key)
            values[f"{key}/{name}"] = value.detach().to("cpu", copy=True)
    return values


def set_weights(engine: Any, module: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Set weights and float32 masters from full tensors. Every rank must call this."""
    stage, parameters = engine.zero_optimization_stage(), list(module.parameters())
    gathered = GatheredParameters(parameters, modifier_rank=0) if stage == 3 else nullcontext()
    with torch.no_grad(), gathered:  # at stage 3 the other ranks get what rank 0 sets
        if stage < 3 or dist.get_rank() == 0:
            for name, p in module.named_parameters():
                p.copy_(values[name])
    for name, p in trained(module):
        if stage == 3:
            safe_set_local_fp32_param(p, _shard(p, values[name].to(p.device)))
        elif stage > 0:
            safe_set_full_fp32_param(p, values[name].to(p.device))


def set_moments(engine: Any, module: nn.Module, values: Mapping[str, Tensor], step: int) -> None:
    """Set the optimiser's state from full tensors <key>/<parameter>, and its number of steps."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        parameters = dict(trained(module))
        for p in parameters.values():
            engine.optimizer.state[p] = {"step": torch.tensor(float(step))}
        for full, value in values.items():
            key, _, name = full.partition("/")
            engine.optimizer.state[parameters[name]][key] = value.to(parameters[name].device, copy=True)
        return
    inner = engine.optimizer.optimizer
    if stage == 3:  # its optimiser has no parameters but during a step
        held = engine.optimizer.fp32_partitioned_groups_flat
    else:
        held = [p for group in inner.param_groups for p in group["params"]]
    for p in held:  # what AdamW makes at its first step
        inner.state[p] = {"step": torch.tensor(float(step)), **{k: torch.zeros_like(p) for k in MOMENTS}}
    if stage in (1, 2):
        _link_states(engine)
    for name, p in trained(module):
        for key in MOMENTS:
            value = values[f"{key}/{name}"].to(p.device)
            if stage < 3:
                safe_set_full_optimizer_state(p, value, key)
            else:
                safe_set_local_optimizer_state(p, _shard(p, value), key)


def _link_states(engine: Any) -> None:
    """Let ``safe_get_full_optimizer_state`` find the state of every parameter group.

    DeepSpeed 0.19.8 links once, after the step of the *first* group, when the others have no state yet.
    """
    optimizer = engine.optimizer
    for parameters, flat in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.optimizer.state)
