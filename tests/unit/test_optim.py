import math
from itertools import pairwise

import torch
from torch import nn

from mffm.config.recipe import OptimConfig
from mffm.optim import MovingAverage, adamw, learning_rate


def test_schedule_warms_up_peaks_and_ends_at_its_fraction():
    config = OptimConfig(lr=1.0, warmup_steps=10, final_lr_fraction=0.1)
    rates = [learning_rate(s, 100, config) for s in range(101)]
    assert rates[0] == 0.1
    assert rates[9] == 1.0
    assert max(rates) == 1.0
    assert math.isclose(rates[100], 0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))


def test_only_matrices_decay():
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    decay = {
        id(p): g["weight_decay"] for g in adamw(module, OptimConfig(weight_decay=0.5)).param_groups for p in g["params"]
    }
    assert {name: decay[id(p)] for name, p in module.named_parameters()} == {
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


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
