import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from mffm.config.model import ConditioningConfig, DensityConfig, HeadsConfig, ModelConfig
from mffm.config.recipe import OptimConfig
from mffm.models.potential import Potential
from mffm.optim import (
    DAMPING,
    FIRST_TURNS,
    MovingAverage,
    by_matrix,
    decays,
    learning_rate,
    make_optimizer,
    state_shapes,
)


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
    groups = make_optimizer(potential, OptimConfig(weight_decay=0.5)).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert len(decay) == len(list(potential.parameters()))
    for name, p in potential.named_parameters():
        leaf = name.rpartition(".")[2] if not name.rpartition(".")[2].isdigit() else name.split(".")[-2]
        is_offset = leaf in ("bias", "biases", "trunk_bias", "table") or ".norm." in name
        assert decay[id(p)] == (0.0 if is_offset else 0.5), name


def test_norm_gains_of_escn_do_not_decay():
    gains = torch.ones(3, 64)  # of each degree
    assert not decays("terms.learned.backbone.escn.blocks.0.norm_1.affine_weight", gains)
    assert decays("terms.learned.backbone.escn.blocks.0.atom_wise.so3_linear_1.weight", gains)


def small(heads: str = "independent") -> Potential:
    torch.manual_seed(0)
    config = ModelConfig(
        backbone=DensityConfig(channels=8, edge_channels=4, layers=1), heads=HeadsConfig(kind=heads, hidden=[8, 6])
    )
    return Potential(config, ["a", "b"], avg_neighbors=4.0, scale=1.0)


def steps(potential: Potential, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        for p in potential.parameters():
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimizer.step()


def soap_of_one(weight: Tensor, gradients: list[Tensor], config: OptimConfig) -> Tensor:
    """Return a weight [m, n] after steps of SOAP, its momentum outside of the basis as in the paper."""

    def turned(gram: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        values = (basis.T @ gram @ basis).diagonal()
        order = values.argsort(descending=True)
        return torch.linalg.qr((gram / values.max() + DAMPING * torch.eye(len(gram))) @ basis[:, order])[0], order

    beta1, beta2, w = 0.95, 0.95, weight
    momentum, size = torch.zeros_like(w), torch.zeros_like(w)
    ql, qr = torch.eye(len(w)).to(w), torch.eye(w.shape[1]).to(w)
    left, right = torch.zeros_like(ql), torch.zeros_like(qr)
    for t, g in enumerate(gradients):
        if t:
            momentum = beta1 * momentum + (1 - beta1) * g
            size = beta2 * size + (1 - beta2) * (ql.T @ g @ qr) ** 2
            step = (ql.T @ momentum @ qr) / (1 - beta1**t) / ((size / (1 - beta2**t)).sqrt() + config.eps)
            w = w * (1 - config.lr * config.weight_decay) - config.lr * ql @ step @ qr.T
        left, right = beta2 * left + (1 - beta2) * g @ g.T, beta2 * right + (1 - beta2) * g.T @ g
        for _ in range(FIRST_TURNS if t == 0 else (t + 1) % config.precondition_every == 0):
            (ql, rows), (qr, columns) = turned(left, ql), turned(right, qr)
            size = size[rows][:, columns]
    return w


def test_soap_follows_the_paper_matrix_by_matrix():
    """Stacks of equal shapes and rows of fidelities against one matrix at a time; float64, as rounding grows."""
    potential, config = small().double(), OptimConfig(kind="soap", lr=0.01, precondition_every=3, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in potential.named_parameters()}
    steps(potential, make_optimizer(potential, config), 0, 8)
    gradients: dict[str, list[Tensor]] = {name: [] for name in before}
    for step in range(8):
        generator = torch.Generator().manual_seed(step)
        for name, p in potential.named_parameters():
            gradients[name].append(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    names = by_matrix(potential, config)
    assert "terms.learned.heads.mlp.weights.1" in names
    assert "terms.learned.backbone.elements.weight" not in names
    for name, p in potential.named_parameters():
        if name not in names:
            continue
        for row in range(len(p)) if p.ndim == 3 else [...]:
            wanted = soap_of_one(before[name][row], [g[row] for g in gradients[name]], config)
            torch.testing.assert_close(p[row], wanted, rtol=0, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


SOAP = {"kind": "soap", "precondition_every": 2}


@pytest.mark.parametrize("section", [{}, SOAP, {**SOAP, "max_precondition_dim": 7}])
def test_state_is_what_is_declared_and_goes_on_bit_for_bit(section: dict):
    config = OptimConfig(**section)
    whole, other = small(), small()
    optimizer = make_optimizer(whole, config)
    steps(whole, optimizer, 0, 3)
    state = {f"{k}/{n}": v for n, p in whole.named_parameters() for k, v in optimizer.state[p].items() if k != "step"}
    assert {name: tuple(v.shape) for name, v in state.items()} == state_shapes(whole, config)
    again = make_optimizer(other, config)
    steps(other, again, 0, 1)  # so that it has a state of its own that must go
    other.load_state_dict(whole.state_dict())
    for (name, p), (_, q) in zip(other.named_parameters(), whole.named_parameters(), strict=True):
        copied = {k: v.clone() for k, v in optimizer.state[q].items()}
        again.state[p] = copied
        assert all(f"{k}/{name}" in state for k in copied if k != "step")
    steps(whole, optimizer, 3, 7)
    steps(other, again, 3, 7)
    for p, q in zip(whole.parameters(), other.parameters(), strict=True):
        assert (p == q).all()


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
