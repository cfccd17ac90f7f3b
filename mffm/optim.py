"""Optimiser groups, the learning-rate schedule as a function of the step, and the moving average of the weights."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mffm.config.recipe import OptimConfig


def adamw(module: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over two groups: matrices decay; biases, norm gains and what a fidelity adds to them do not.

    Shapes do not tell: a bias with one row per fidelity is a matrix. Decaying it would pull each fidelity's offset to
    zero in one kind of heads and not in another.
    """
    decaying = [p for name, p in module.named_parameters() if decays(name, p)]
    others = [p for name, p in module.named_parameters() if not decays(name, p)]
    groups = [{"params": decaying, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.lr, betas=config.betas, eps=config.eps, foreach=True
    )


def decays(name: str, parameter: Tensor) -> bool:
    """Return whether a parameter of a potential gets weight decay."""
    apart = ("bias", "norm.", "conditioning.table")
    return parameter.ndim >= 2 and not any(part in name for part in apart)


def learning_rate(step: int, total: int, config: OptimConfig) -> float:
    """Return the learning rate of a step counted from 0: linear warm-up, then a cosine to ``final_lr_fraction``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(total - config.warmup_steps, 1)
    progress = min((step - config.warmup_steps) / span, 1.0)
    low = config.final_lr_fraction
    return config.lr * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


class MovingAverage:
    """Exponential moving average of the parameters, kept apart from the raw weights, in float32.

    The decay of update ``t`` (from 0) is min(decay, (1 + t) / (10 + t)), so that short runs do not average over the
    random start.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]], decay: float):
        self.decay = decay
        self.updates = 0
        self.weights = {name: p.detach().float().clone() for name, p in named_parameters}

    def update(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        current = dict(named_parameters)
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        names = list(self.weights)
        with torch.no_grad():
            torch._foreach_lerp_(
                [self.weights[n] for n in names], [current[n].detach().float() for n in names], 1 - decay
            )
        self.updates += 1

    def load(self, weights: Mapping[str, Tensor], updates: int) -> None:
        assert set(weights) == set(self.weights), "moving average of another potential"
        for name, value in weights.items():
            self.weights[name].copy_(value)
        self.updates = updates
