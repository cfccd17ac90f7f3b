"""Does the engine on these ranks learn what one process learns? ZeRO stages × models × ways to deal out a batch.

    torchrun --nproc-per-node 2 -m mffm.selftest.parity STORE OUT.json [--stages 0,1,2,3] [--optimizers soap]

Every combination does 5 steps through the DeepSpeed engine with the product's own ``train_step`` and is compared with
plain torch in this process: the same module, the whole global batch at once, the same optimiser, clipping and lr.
``gradient_error``: max |difference| / max |reference| of each parameter's gradient in the first step, the largest of
them (gradients below 1e-3 of the largest count as that), or the relative error of the norm in the log, if larger.
``parameter_error``: max |difference| / max |reference| over all parameters after the last step. ``update_error``: the
same difference by the longest way that a parameter went (about 0.01, where weights go up to 4: float32 resolves 1e-5
of it); 100 times the bound passes, 300 times with SOAP, whose basis lets rounding choose where a gradient has no
component (1.1e-3 on an AMD EPYC, 2e-4 on an Intel Xeon).
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mffm import distributed
from mffm.batch import Batch
from mffm.config.recipe import DeepSpeedSection
from mffm.distributed import Ranks
from mffm.errors import InputError
from mffm.keys import ENERGY
from mffm.optim import make_optimizer
from mffm.selftest.trial import (
    EPS,
    MODELS,
    System,
    engine_of,
    largest,
    largest_difference,
    over_ranks,
    packed,
    small_rows,
    step_plan,
    trial,
    with_weights,
)
from mffm.training import sharding
from mffm.training.loop import train_step
from mffm.training.quarantine import LossWatch
from mffm.training.setup import Setup, Trainee

UPDATE_BOUND = {"adamw": 100, "soap": 300}  # of the bound

STEPS = 5
LR = 2e-3
NEVER = 1e6  # a clip that no gradient reaches

Deal = Callable[[int, int, int, int], list[int]]  # rank, microbatch, ranks, microbatches → fidelities of its systems


def _both(rank: int, microbatch: int, n_ranks: int, n_microbatches: int) -> list[int]:
    return [0, 1] + [0] * ((rank + microbatch) % 2)  # of different sizes


def _last_rank_without(rank: int, microbatch: int, n_ranks: int, n_microbatches: int) -> list[int]:
    return [0, 0] if rank == n_ranks - 1 else [0, 1, 1]


def _one_each(rank: int, microbatch: int, n_ranks: int, n_microbatches: int) -> list[int]:
    return [rank % 2] * 2


def _last_empty(rank: int, microbatch: int, n_ranks: int, n_microbatches: int) -> list[int]:
    last = rank == n_ranks - 1 and microbatch == n_microbatches - 1
    return [] if last else _both(rank, microbatch, n_ranks, n_microbatches)


CASES: dict[str, Deal] = {
    "plain": _both,
    "a rank without labels of one fidelity": _last_rank_without,
    "ranks with different fidelities": _one_each,
    "an empty microbatch": _last_empty,
    "clipped": _both,
    "activation checkpointing": _both,
}


@dataclass(frozen=True)
class Reference:
    """What one process does with the whole batch: gradients of the first step, norms of all, parameters at the end."""

    gradients: dict[str, Tensor]
    norms: list[float]
    parameters: dict[str, Tensor]


def deal(setup: Setup, case: str, n_ranks: int, n_microbatches: int) -> list[list[list[System]]]:
    """Return the systems of each rank and microbatch of a case; every frame of a fidelity is used once where there are
    enough."""
    bins = [[CASES[case](r, m, n_ranks, n_microbatches) for m in range(n_microbatches)] for r in range(n_ranks)]
    needed = [sum(b.count(f) for row in bins for b in row) for f in (0, 1)]
    rows = [iter(small_rows(setup, f, n)) for f, n in enumerate(needed)]
    # the second fidelity without forces where ranks differ: their losses have different terms, too
    properties = {f: (ENERGY,) if case.startswith("ranks with") and f else System(0, 0).properties for f in (0, 1)}
    return [[[System(next(rows[f]), f, properties[f]) for f in b] for b in row] for row in bins]


def check_case(case: str, batches: list[list[Batch]]) -> None:
    """Assert that the batches of [rank][microbatch] are what the case says."""

    def labelled(rank: list[Batch]) -> set[int]:
        return {int(f) for b in rank for mask in b.masks.values() for f in b.fidelity_idx[mask]}

    live = [labelled(rank) for rank in batches]
    assert set().union(*live) == {0, 1}, "both fidelities have labels in the step"
    if case == "a rank without labels of one fidelity":
        assert live[-1] == {0}
        assert all(1 in own for own in live[:-1])
        assert all(bool((b.fidelity_idx == 0).all()) for b in batches[-1])
    elif case == "ranks with different fidelities":
        assert all(own == {r % 2} for r, own in enumerate(live))
    elif case == "an empty microbatch":
        assert batches[-1][-1].rows.tolist() == [-1]
        assert not any(bool(mask.any()) for mask in batches[-1][-1].masks.values())
    else:
        assert all(set(b.fidelity_idx.tolist()) == {0, 1} for rank in batches for b in rank)


def one_process(setup: Setup, systems: list[System], clip: float, device: torch.device) -> Reference:
    """Return what plain torch does with all systems in one batch."""
    potential = setup.potential
    trainee = Trainee(potential, setup.loss, setup.spec.reference_table(device)).train()
    optimizer = make_optimizer(potential, setup.recipe.optim)
    batch = packed(setup, systems).to(device)
    divisors = setup.loss.divisors(step_plan(setup, systems).counts, setup.plan.expected_counts(0)).to(device)
    gradients: dict[str, Tensor] = {}
    norms = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        trainee(batch, divisors)[0].backward()
        if not gradients:
            gradients = {n: p.grad.clone() for n, p in potential.named_parameters() if p.grad is not None}
            assert len(gradients) == len(list(potential.parameters())), "the loss reaches every parameter"
        norms.append(float(torch.nn.utils.clip_grad_norm_(potential.parameters(), clip)))
        optimizer.step()
    return Reference(gradients, norms, {n: p.detach().clone() for n, p in potential.named_parameters()})


def through_engine(
    setup: Setup, plan: Any, batches: list[Batch], ranks: Ranks
) -> tuple[dict[str, Tensor], float, dict[str, Tensor]]:
    """Return gradients and norm of the first step, and the parameters after the last, from the product's own step."""
    from deepspeed.utils import safe_get_full_grad

    engine = engine_of(setup, ranks, len(batches))
    gradients: dict[str, Tensor] = {}
    step, calls = engine.step, []

    def step_and_keep() -> None:
        calls.append(1)
        if len(calls) == len(batches):  # after the last backward, before the optimiser takes the gradients
            gradients.update({n: safe_get_full_grad(p).clone() for n, p in setup.potential.named_parameters()})
        step()

    engine.step = step_and_keep
    norms = [train_step(engine, setup, plan, batches, ranks, LR, LossWatch(None))[1] for _ in range(STEPS)]
    parameters = sharding.master_weights(engine, setup.potential)
    engine.destroy()
    return gradients, norms[0], parameters


def relative_by_tensor(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest of max |difference| / max |wanted| over the tensors; tiny ones are all rounding."""
    floor = 1e-3 * largest(wanted)
    ratios = [
        largest_difference({n: found[n]}, {n: value}) / max(largest({n: value}), floor) for n, value in wanted.items()
    ]
    return max(r if r == r else float("inf") for r in ratios)


def variants(stages: list[int], offloads: list[str]) -> list[dict[str, Any]]:
    """Return the DeepSpeed sections to try: every stage, and each kind of offloading where the schema allows it."""
    sections = [{"zero_stage": stage, "offload": "none"} for stage in stages]
    for stage, offload in product(stages, offloads):
        try:
            DeepSpeedSection.model_validate({"zero_stage": stage, "offload": offload})
        except ValueError:
            continue
        sections.append({"zero_stage": stage, "offload": offload})
    return sections


def matrix(
    store: str, sections: list[tuple[str, dict[str, Any]]], bound: float, ranks: Ranks, device: torch.device
) -> Iterator[dict[str, Any]]:
    """Yield one row for each combination, the same on every rank. Offloading and other optimisers than AdamW are tried
    where clipping is.

    Args:
        sections: kind of optimiser, section deepspeed of the recipe.
    """
    optim = {"lr": LR, "eps": EPS, "clip": NEVER}
    for model in MODELS:
        base = trial(store, model, "selftest", optim=optim)
        weights = {k: v.clone() for k, v in base.potential.state_dict().items()}
        for case, n_microbatches in product(CASES, (1, 3)):
            bins = deal(base, case, ranks.world_size, n_microbatches)
            systems = [s for rank in bins for b in rank for s in b]
            batches = [[packed(base, b) for b in rank] for rank in bins]
            check_case(case, batches)
            clip = NEVER
            reference = one_process(with_weights(base, weights, device), systems, clip, device)
            assert max(reference.norms) < clip
            if case == "clipped":
                clip = 0.3 * min(reference.norms)
                reference = one_process(with_weights(base, weights, device), systems, clip, device)
                assert min(reference.norms) > clip, "the clip bites at every step"
            adamw = reference
            for kind, section in sections:
                if (kind, section["offload"]) != ("adamw", "none") and case != "clipped":
                    continue
                started = time.perf_counter()
                optim_section = {"kind": kind, "clip": clip, "precondition_every": 2}
                reference = adamw
                if kind != "adamw":
                    own = with_weights(base, weights, device, optim=optim_section)
                    reference = one_process(own, systems, clip, device)
                way = largest_difference(reference.parameters, weights)
                setup = with_weights(base, weights, device, deepspeed=section, optim=optim_section)
                setup.potential.learned.backbone.recompute = case == "activation checkpointing"
                gradients, norm, parameters = through_engine(
                    setup, step_plan(base, systems), batches[ranks.rank], ranks
                )
                difference = largest_difference(parameters, reference.parameters)
                gradient = relative_by_tensor(gradients, reference.gradients)
                errors = [
                    max(gradient, abs(norm / reference.norms[0] - 1)),
                    difference / largest(reference.parameters),
                    difference / way,
                ]
                errors = over_ranks(errors, device)
                yield {
                    "stage": section["zero_stage"],
                    "offload": section["offload"],
                    "optimizer": kind,
                    "model": model,
                    "case": case,
                    "microbatches": n_microbatches,
                    "gradient_error": errors[0],
                    "parameter_error": errors[1],
                    "update_error": errors[2],
                    "passed": max(errors[:2]) <= bound and errors[2] <= UPDATE_BOUND[kind] * bound,
                    "seconds": round(time.perf_counter() - started, 3),
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store", help="a store with two fidelities that have energies and forces")
    parser.add_argument("output", type=Path, help="JSON: a list with one object for each combination")
    parser.add_argument("--stages", default="0,1,2,3", help="ZeRO stages")
    parser.add_argument("--offload", default="", help="kinds of deepspeed.offload to try besides, with commas")
    parser.add_argument("--optimizers", default="", help="kinds to try besides AdamW at stage 0, with commas")
    parser.add_argument("--bound", type=float, default=1e-5, help="largest relative error that passes")
    arguments = parser.parse_args()
    stages = [int(s) for s in arguments.stages.split(",")]
    ranks = distributed.ranks_from_environment()
    if ranks.world_size < 2:
        raise InputError("the parity of ranks needs two or more; start it with torchrun or srun")
    device = distributed.start(ranks)
    gc.freeze()  # DeepSpeed collects whenever an engine ends: half a second each for what the imports made
    sections = [("adamw", s) for s in variants(stages, [o for o in arguments.offload.split(",") if o])]
    sections += [(kind, {"zero_stage": 0, "offload": "none"}) for kind in arguments.optimizers.split(",") if kind]
    rows = []
    for row in matrix(arguments.store, sections, arguments.bound, ranks, device):
        rows.append(row)
        if ranks.is_main:
            offload = "" if row["offload"] == "none" else f", offload {row['offload']}"
            print(
                f"{'passed' if row['passed'] else 'FAILED'}  {row['optimizer']}, ZeRO {row['stage']}{offload}  "
                f"{row['model']}, {row['case']}, {row['microbatches']} microbatch(es): "
                f"gradient {row['gradient_error']:.1e}, "
                f"parameters {row['parameter_error']:.1e}, update {row['update_error']:.1e}, {row['seconds']:.2f} s",
                flush=True,
            )
    if ranks.is_main:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    distributed.barrier()
    distributed.stop()
    sys.stdout.flush()
    os._exit(0 if all(row["passed"] for row in rows) else 1)  # DeepSpeed now and then aborts at interpreter exit


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
