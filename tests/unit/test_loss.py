"""The loss: masks, forms, normalisations, and one gradient for every way of dealing out a global batch."""

from dataclasses import dataclass

import pytest
import torch

from mffm.batch import Batch
from mffm.config.recipe import LossConfig, TermConfig
from mffm.errors import InputError
from mffm.keys import ENERGY, FORCES, STRESS
from mffm.loss import ErrorSums, Loss, penalty, system_sums


@dataclass
class Predicted:
    energy: torch.Tensor
    forces: torch.Tensor | None = None
    stress: torch.Tensor | None = None


def make_batch(n_atoms, fidelity, energy_mask, force_mask, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n, total = len(n_atoms), sum(n_atoms)
    rand = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    index = torch.zeros(total, dtype=torch.long)
    return Batch(
        atomic_numbers=torch.ones(total, dtype=torch.long), positions=rand(total, 3),
        cell=torch.zeros(n, 3, 3),
        neighbors=index, receivers=index, neighbor_mask=index.bool(), edge_vectors=rand(total, 3), reverse=index,
        groups=((total, 1),), row_of_atom=index, atom_of_row=index,
        system_idx=torch.repeat_interleave(torch.arange(n), torch.tensor(n_atoms)), fidelity_idx=torch.tensor(fidelity),
        n_atoms=torch.tensor(n_atoms),
        pbc=torch.zeros(n, 3) > 0, volume=torch.zeros(n), charge=torch.zeros(n), spin_multiplicity=torch.zeros(n),
        labels={ENERGY: rand(n), FORCES: rand(total, 3), STRESS: rand(n, 3, 3)},
        masks={ENERGY: torch.tensor(energy_mask), FORCES: torch.tensor(force_mask), STRESS: torch.zeros(n) > 0},
        weights={p: torch.ones(n, dtype=torch.float64) for p in (ENERGY, FORCES, STRESS)}, rows=torch.arange(n),
    )  # fmt: skip


def zero_prediction(batch):
    return Predicted(torch.zeros(batch.n_systems, dtype=torch.float64), torch.zeros_like(batch.labels[FORCES]))


USED = {(0, ENERGY): 5, (0, FORCES): 5, (1, ENERGY): 5}


def test_pooled_value_by_hand():
    config = LossConfig(
        energy=TermConfig(form="mae", weight=2.0),
        forces=TermConfig(form="mae", weight=3.0),
        weights={"hf": {"energy": 10.0}},
    )
    loss = Loss(config, ["lf", "hf"], USED)
    batch = make_batch([2, 3, 4], [0, 1, 0], [True, True, False], [True, False, True])
    counts = {(0, ENERGY): 1, (1, ENERGY): 1, (0, FORCES): 18}
    value, parts = loss(zero_prediction(batch), batch, torch.zeros(3, dtype=torch.float64), loss.divisors(counts, {}))
    e, f = batch.labels[ENERGY].abs(), batch.labels[FORCES].abs().sum(1)
    expected = 2.0 * (e[0] / 2 + 10 * e[1] / 3) / 2 + 3.0 * (f[:2].sum() + f[5:].sum()) / 18
    assert torch.isclose(value, expected)
    assert torch.isclose(parts.sum(), expected)
    assert parts[0, 1] == 2.0 * 10 * e[1] / 3 / 2


def test_per_fidelity_and_expected_divide_by_their_own_counts():
    counts, expected = (
        {(0, ENERGY): 8, (1, ENERGY): 2, (0, FORCES): 30},
        {(0, ENERGY): 7.5, (1, ENERGY): 2.5, (0, FORCES): 33.0},
    )
    rows = {
        n: Loss(LossConfig(normalisation=n), ["lf", "hf"], USED).divisors(counts, expected)
        for n in ("pooled", "per_fidelity", "expected")
    }
    torch.testing.assert_close(rows["pooled"], torch.tensor([[0.1, 0.1], [1 / 30, 1 / 30]], dtype=torch.float64))
    torch.testing.assert_close(rows["per_fidelity"], torch.tensor([[1 / 8, 1 / 2], [1 / 30, 0.0]], dtype=torch.float64))
    torch.testing.assert_close(rows["expected"], torch.tensor([[1 / 7.5, 1 / 2.5], [1 / 33, 0.0]], dtype=torch.float64))


def test_masked_label_has_no_value_and_no_gradient_even_if_it_is_infinite():
    loss = Loss(LossConfig(), ["lf", "hf"], USED)
    batch = make_batch([2, 2], [0, 1], [True, False], [True, False])
    batch.labels[ENERGY][1] = 1e30
    prediction = Predicted(
        torch.zeros(2, dtype=torch.float64, requires_grad=True),
        torch.zeros(4, 3, dtype=torch.float64, requires_grad=True),
    )
    value, _ = loss(
        prediction, batch, torch.zeros(2, dtype=torch.float64), loss.divisors({(0, ENERGY): 1, (0, FORCES): 6}, {})
    )
    value.backward()
    assert torch.isfinite(value)
    assert prediction.energy.grad[1] == 0
    assert (prediction.forces.grad[2:] == 0).all()
    assert (prediction.forces.grad[:2] != 0).all()


def test_l2norm_is_rotation_invariant_and_smooth_at_zero():
    batch = make_batch([3], [0], [True], [True])
    term = TermConfig(form="l2norm")
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    reference = torch.zeros(1, dtype=torch.float64)
    before = system_sums(zero_prediction(batch), batch, reference, FORCES, term)
    expected = 3 * batch.labels[FORCES].norm(dim=1).sum()
    batch.labels[FORCES] = batch.labels[FORCES] @ rotation.T
    torch.testing.assert_close(system_sums(zero_prediction(batch), batch, reference, FORCES, term), before)
    assert torch.isclose(before[0], expected)
    exact = batch.labels[FORCES].clone().requires_grad_(True)
    system_sums(Predicted(torch.zeros(1, dtype=torch.float64), exact), batch, reference, FORCES, term).sum().backward()
    assert (exact.grad == 0).all()


def test_huber_is_mae_far_out_and_quadratic_close_in():
    term = TermConfig(form="huber", delta=0.1)
    assert torch.isclose(penalty(torch.tensor(5.0), term), torch.tensor(5.0 - 0.05))
    assert torch.isclose(penalty(torch.tensor(0.01), term), torch.tensor(0.01**2 / 2 / 0.1))


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 4), (2, 2), (4, 1), (1, 1), (1, 3)])
@pytest.mark.parametrize("normalisation", ["pooled", "per_fidelity", "expected"])
def test_gradient_does_not_depend_on_the_partition(ranks, microbatches, normalisation):
    """fp64, 1e-12: sums divided once by global counts. Bins are unequal, one has no label of a fidelity."""
    n_atoms, fidelity = [2, 3, 4, 2, 5, 3, 2], [0, 1, 0, 0, 1, 0, 1]
    energy_mask, force_mask = (
        [True, True, False, True, True, True, False],
        [True, False, True, True, False, False, False],
    )
    whole = make_batch(n_atoms, fidelity, energy_mask, force_mask)
    loss = Loss(LossConfig(normalisation=normalisation), ["lf", "hf"], USED)
    counts = {(0, ENERGY): 3, (1, ENERGY): 2, (0, FORCES): 24}
    divisors = loss.divisors(counts, {(0, ENERGY): 2.5, (1, ENERGY): 2.0, (0, FORCES): 20.0})
    starts = torch.tensor([0, *n_atoms]).cumsum(0)

    def gradient(bins):
        parameter = torch.tensor([0.3, -0.7], dtype=torch.float64, requires_grad=True)
        for systems in bins:
            atoms = (
                torch.cat([torch.arange(int(starts[s]), int(starts[s + 1])) for s in systems])
                if systems
                else torch.arange(0)
            )
            part = make_batch(
                [n_atoms[s] for s in systems] or [1],
                [fidelity[s] for s in systems] or [0],
                [False] * max(len(systems), 1),
                [False] * max(len(systems), 1),
            )
            if systems:
                index = torch.tensor(systems)
                part.labels = {
                    ENERGY: whole.labels[ENERGY][index],
                    FORCES: whole.labels[FORCES][atoms],
                    STRESS: whole.labels[STRESS][index],
                }
                part.masks = {k: v[index] for k, v in whole.masks.items()}
            prediction = Predicted(
                parameter[0] * part.n_atoms.double() ** 2, parameter[1] * part.labels[FORCES].square()
            )
            value, _ = loss(prediction, part, torch.zeros(part.n_systems, dtype=torch.float64), divisors)
            value.backward()
        return parameter.grad

    bins = [list(range(7))[i :: ranks * microbatches] for i in range(ranks * microbatches)]
    torch.testing.assert_close(gradient(bins), gradient([list(range(7))]), rtol=1e-12, atol=0)


def test_term_without_labels_is_an_error():
    with pytest.raises(InputError, match="trains forces of 'hf', but its pools hold no such label"):
        Loss(LossConfig(), ["lf", "hf"], {(0, ENERGY): 3, (1, FORCES): 0})
    with pytest.raises(InputError, match=r"loss.weights.hf.forces is given"):
        Loss(LossConfig(weights={"hf": {"forces": 2.0}}), ["lf", "hf"], {(0, ENERGY): 3, (1, ENERGY): 2})
    with pytest.raises(InputError, match="no term"):
        Loss(LossConfig(energy=TermConfig(weight=0)), ["lf"], {(0, ENERGY): 3})


def test_error_sums_count_only_live_labels():
    batch = make_batch([2, 3], [0, 1], [True, True], [True, False])
    errors = ErrorSums(["lf", "hf"])
    errors.add(zero_prediction(batch), batch, torch.zeros(2, dtype=torch.float64))
    table = errors.errors()
    assert set(table["hf"]) == {"energy"}
    assert table["lf"]["forces"]["n"] == 6
    assert abs(table["hf"]["energy"]["mae"] - abs(float(batch.labels[ENERGY][1])) / 3) < 1e-12
    rmse = float(batch.labels[FORCES][:2].square().mean().sqrt())
    assert abs(table["lf"]["forces"]["rmse"] - rmse) < 1e-12
