import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from mffm.config.model import ConditioningConfig, DensityConfig, HeadsConfig, ModelConfig
from mffm.config.recipe import OptimConfig
from mffm.models.potential import Potential
from mffm.optim import MovingAverage, adamw, learning_rate


def test_schedule_warms_up_peaks_and_ends_at_its_fraction():
    config = OptimConfig(lr=1.0, warmup_steps=10, final_lr_fraction=0.1)
    rates = [learning_rate(s, 100, config) for s in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == 1.0
    assert max(rates) == 1.0
    assert math.isclose(rates[100], 0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))


@pytest.mark.parametrize("heads", [{"kind": "shared"}, {"kind": "independent"}, {"kind": "delta", "base": "a"}])
@pytest.mark.parametrize("conditioning", ["none", "onehot", "embedding", "film"])
def test_biases_gains_and_fidelity_offsets_do_not_decay(heads, conditioning):
    """By name, on real potentials: a bias with one row per fidelity has the shape of a matrix."""
    config = ModelConfig(
        backbone=DensityConfig(channels=4, edge_channels=4),
        conditioning=ConditioningConfig(kind=conditioning),
        heads=HeadsConfig(**heads),
    )
    potential = Potential(config, ["a", "b"], avg_neighbors=4.0, scale=1.0)
    groups = adamw(potential, OptimConfig(weight_decay=0.5)).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(decay) == len(list(potential.parameters()))
    for name, p in potential.named_parameters():
        leaf = name.rpartition(".")[2] if not name.rpartition(".")[2].isdigit() else name.split(".")[-2]
        is_offset = leaf in ("bias", "biases", "trunk_bias", "table") or ".norm." in name
        assert decay[id(p)] == (0.0 if is_offset else 0.5), name


def test_moving_average_is_apart_and_follows_the_formula():
    p = nn.Parameter(torch.zeros(2))
    ema = MovingAverage([("p", p)], decay=0.5)
    expected = torch.zeros(2)
    for t in range(4):
        with torch.no_grad():
            p.add_(1.0)
        ema.update([("p", p)])
        decay = min(0.5, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * p.detach()
    torch.testing.assert_close(ema.weights["p"], expected)
    assert p[0] == 4
