"""Tensors trained beside frozen ones: what they stand for, and that nothing else moves."""

import pytest
import torch

from mffm.models.adapter import Adapter, is_adapted, merged


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"a.weights.0": torch.randn(6, 4), "a.table": torch.randn(3, 5), "b": torch.randn(2)}


def with_adapter(**arguments) -> tuple[dict[str, torch.Tensor], Adapter]:
    own = state()
    adapter = Adapter(own, **arguments)
    return {**own, **{f"adapter.{name}": p for name, p in adapter.named_parameters()}}, adapter


def test_at_first_the_merged_weights_are_the_frozen_ones():
    everything, _ = with_adapter(low_rank=["a.weights.0"], rank=2, rows={"a.table": [0, 2]})
    assert is_adapted(everything)
    assert not is_adapted(state())
    plain = merged(everything)
    assert list(plain) == list(state())
    assert all(torch.equal(plain[name], value) for name, value in state().items())


def test_an_update_has_its_rank_and_other_rows_stay():
    everything, adapter = with_adapter(low_rank=["a.weights.0"], rank=2, rows={"a.table": [1]})
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    plain = merged(everything)
    update = plain["a.weights.0"] - everything["a.weights.0"]
    assert torch.linalg.matrix_rank(update) == 2
    assert torch.equal(plain["a.table"][[0, 2]], everything["a.table"][[0, 2]])
    assert not torch.equal(plain["a.table"][1], everything["a.table"][1])
    assert torch.equal(everything["a.table"], state()["a.table"]), "changed in place"


def test_rank_is_at_most_the_shorter_side():
    _, adapter = with_adapter(low_rank=["a.weights.0"], rank=64)
    assert sorted(tuple(p.shape) for p in adapter.parameters()) == [(4, 4), (6, 4)]


@pytest.mark.parametrize("which", ["low_rank", "rows"])
def test_gradients_reach_what_is_trained(which: str):
    arguments = {"low_rank": ["a.weights.0"], "rank": 2} if which == "low_rank" else {"rows": {"a.table": [1]}}
    everything, adapter = with_adapter(**arguments)
    loss = sum((value * torch.arange(value.numel()).view(value.shape)).sum() for value in merged(everything).values())
    gradients = torch.autograd.grad(loss, list(adapter.parameters()))
    assert any(bool(g.any()) for g in gradients)
    if which == "rows":
        assert torch.equal(gradients[0], torch.arange(5.0, 10.0))
