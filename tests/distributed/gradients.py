"""One global batch dealt out to the ranks of this job; rank 0 writes the gradient. Started by test_parity.py.

    gradients.py RECIPE OUTPUT engine|plain
engine: through DeepSpeed, float32. plain: autograd and one all-reduce, float64.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from mffm import distributed
from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.data.loader import Loader
from mffm.training.loop import _engine, train_step
from mffm.training.quarantine import LossWatch
from mffm.training.setup import Trainee, deepspeed_config, prepare


def plain(setup, batches, plan, table) -> dict[str, torch.Tensor]:
    trainee = Trainee(setup.potential.double(), setup.loss, table).train()
    divisors = setup.loss.divisors(plan.counts, setup.plan.expected_counts(plan.step))
    for batch in batches:
        trainee(batch, divisors)[0].backward()
    gradients = {}
    for name, p in setup.potential.named_parameters():
        assert p.grad is not None, f"{name}: no gradient; the graph must be the same on every rank"
        if dist.is_initialized():
            dist.all_reduce(p.grad)
        gradients[name] = p.grad
    return gradients


def through_engine(setup, batches, plan, table, recipe, ranks) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_grad

    engine = _engine(Trainee(setup.potential, setup.loss, table), recipe, deepspeed_config(recipe, ranks, len(batches)))
    gradients: dict[str, torch.Tensor] = {}

    def keep() -> None:
        gradients.update({n: safe_get_full_grad(p).clone() for n, p in setup.potential.named_parameters()})

    step, calls = engine.step, []

    def step_and_keep() -> None:
        calls.append(1)
        if len(calls) == len(batches):
            keep()  # after the last backward, before the optimiser takes the gradients
        step()

    engine.step = step_and_keep
    train_step(engine, setup, plan, batches, ranks, 1e-3, LossWatch(None))
    return gradients


def main() -> None:
    recipe = load(Recipe, sys.argv[1])
    ranks = distributed.ranks_from_environment()
    distributed.start(ranks)
    setup = prepare(recipe)
    table = setup.spec.reference_table()
    dtype = torch.float64 if sys.argv[3] == "plain" else torch.float32
    loader = Loader(
        setup.store,
        setup.plan,
        setup.fidelities,
        recipe.model.backbone.cutoff,
        rank=ranks.rank,
        world_size=ranks.world_size,
        dtype=dtype,
    )
    plan, batches, _ = next(loader)
    loader.close()
    if sys.argv[3] == "plain":
        gradients = plain(setup, batches, plan, table)
    else:
        gradients = through_engine(setup, batches, plan, table, recipe, ranks)
    if ranks.is_main:
        save_file({k: v.contiguous() for k, v in gradients.items()}, Path(sys.argv[2]))
    distributed.barrier()
    distributed.stop()
    sys.stdout.flush()
    os._exit(0)  # DeepSpeed now and then aborts at interpreter exit, after all work is done


if __name__ == "__main__":
    main()
