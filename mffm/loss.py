"""The loss over partial labels: masked sums per system, divided once by global label counts. And error sums.

Every function here returns *sums*. The divisors are counts over all ranks and microbatches of the step, known from the
plan, so that a gradient does not depend on how a global batch is dealt out.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mffm.batch import Batch
from mffm.config.recipe import LossConfig, TermConfig
from mffm.errors import InputError
from mffm.keys import ENERGY, FORCES, PROPERTIES, STRESS, Property

Counts = Mapping[tuple[int, Property], float]


class Prediction(Protocol):
    """What a potential returns: energy without element references, and its derivatives where they were asked for."""

    energy: Tensor
    forces: Tensor | None
    stress: Tensor | None


def penalty(error: Tensor, term: TermConfig) -> Tensor:
    """Return the elementwise penalty: |e|, e², or Huber with its slope scaled to 1 far out (huber(e)/delta).

    The scaled form keeps the weight of a term comparable between mae and huber: both are |e| + const for large errors.
    """
    if term.form == "mae":
        return error.abs()
    if term.form == "mse":
        return error.square()
    assert term.form == "huber"
    return (
        torch.nn.functional.huber_loss(error, torch.zeros_like(error), reduction="none", delta=term.delta) / term.delta
    )


def system_sums(prediction: Prediction, batch: Batch, reference: Tensor, prop: Property, term: TermConfig) -> Tensor:
    """Return the penalty of one property, summed over the entries of each system. [n_systems]

    Energy counts once a system, as energy per atom; forces 3 × n_atoms times; stress 9 times.

    Args:
        reference: [n_systems] float64, energy of the element references, eV.
    """
    if prop == ENERGY:
        label = (batch.labels[ENERGY] - reference).to(prediction.energy.dtype)
        return penalty((prediction.energy - label) / batch.n_atoms.to(label.dtype), term)
    if prop == STRESS:
        assert prediction.stress is not None
        return penalty(prediction.stress - batch.labels[STRESS], term).sum((1, 2))
    assert prediction.forces is not None
    error = prediction.forces - batch.labels[FORCES]
    if term.form == "l2norm":
        # The square root has no gradient at 0: the double where keeps a perfect atom at zero value and zero gradient.
        square = error.square().sum(1)
        zero = square == 0
        per_atom = 3 * torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())
    else:
        per_atom = penalty(error, term).sum(1)
    return batch.system_sums(per_atom)


class Loss:
    """Σ over properties of weight × Σ over live labels of factor × penalty / N; the recipe says which N."""

    def __init__(self, config: LossConfig, fidelities: Sequence[str], used: Mapping[tuple[int, Property], int]):
        """Args:
        used: (fidelity index, property) → live labels that the pools hold; a term without any is an error.
        """
        self.config = config
        self.fidelities = tuple(fidelities)
        self.properties: list[Property] = [
            p
            for p in PROPERTIES
            if getattr(config, p).weight > 0 and any(prop == p and n > 0 for (_, prop), n in used.items())
        ]
        for (fidelity, prop), n in used.items():
            if n == 0:
                raise InputError(
                    f"the recipe trains {prop} of {self.fidelities[fidelity]!r}, but its pools hold no such label; "
                    f"take {prop} out of the pool's properties or ingest the labels"
                )
        for name, factors in config.weights.items():
            for prop in factors:
                if not used.get((self.fidelities.index(name), prop)):
                    raise InputError(
                        f"loss.weights.{name}.{prop} is given, but no pool of {name!r} trains {prop}; remove it "
                        "or add the labels"
                    )
        if not self.properties:
            raise InputError("the loss has no term: every weight is 0 or no pool has a label of it")

    @property
    def needs_forces(self) -> bool:
        return FORCES in self.properties

    @property
    def needs_stress(self) -> bool:
        return STRESS in self.properties

    def factors(self, prop: Property) -> list[float]:
        """Return the recipe's factor on a property's labels, for each fidelity."""
        return [self.config.weights.get(name, {}).get(prop, 1.0) for name in self.fidelities]

    def divisors(self, counts: Counts, expected: Counts, normalisation: str | None = None) -> Tensor:
        """Return the factor on each (property, fidelity): weight × factor / N. [n_properties, n_fidelities] float64

        Args:
            counts: live labels of the step over all ranks and microbatches.
            expected: the plan's mean live labels of a step.
            normalisation: another one than the recipe's.
        """
        n = len(self.fidelities)
        normalisation = normalisation or self.config.normalisation
        rows = []
        for prop in self.properties:
            own = torch.tensor([float(counts.get((f, prop), 0)) for f in range(n)], dtype=torch.float64)
            if normalisation == "pooled":
                total = own.sum().expand(n)
            elif normalisation == "per_fidelity":
                total = own
            else:
                assert normalisation == "expected"
                total = torch.tensor([float(expected.get((f, prop), 0)) for f in range(n)], dtype=torch.float64)
            scale = torch.tensor(self.factors(prop), dtype=torch.float64) * getattr(self.config, prop).weight
            rows.append(torch.where(total > 0, scale / total.clamp_min(1e-300), torch.zeros_like(scale)))
        return torch.stack(rows)

    def __call__(
        self, prediction: Prediction, batch: Batch, reference: Tensor, divisors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return this microbatch's share of the global loss, a scalar, and its parts, [n_properties, n_fidelities].

        Both are float64; the parts are detached.
        """
        parts = []
        for row, prop in zip(divisors, self.properties, strict=True):
            # float64 from here on: a few numbers a system, and energies come in float64 already
            sums = system_sums(prediction, batch, reference, prop, getattr(self.config, prop)).double()
            factor = row.double()[batch.fidelity_idx] * batch.weights[prop].double()
            # where, not a product: a masked system's sum may be anything, and 0 × inf is not 0
            live = torch.where(batch.masks[prop], sums * factor, torch.zeros_like(sums))
            parts.append(batch.fidelity_sums(live, len(self.fidelities)))
        table = torch.stack(parts)
        return table.sum(), table.detach()


class ErrorSums:
    """Sums of absolute and squared errors per (fidelity, property), to be added over batches and ranks.

    Energy errors are per atom.
    """

    def __init__(
        self, fidelities: Sequence[str], properties: Sequence[Property] = PROPERTIES, device: torch.device | str = "cpu"
    ):
        self.fidelities = tuple(fidelities)
        self.properties = tuple(properties)
        self.sums = torch.zeros(len(self.fidelities), len(self.properties), 3, dtype=torch.float64, device=device)

    def add(self, prediction: Prediction, batch: Batch, reference: Tensor) -> None:
        """Add the live labels of a batch."""
        for p, prop in enumerate(self.properties):
            if prop not in batch.labels or (prop != ENERGY and getattr(prediction, prop) is None):
                continue
            absolute = system_sums(prediction, batch, reference, prop, TermConfig(form="mae"))
            square = system_sums(prediction, batch, reference, prop, TermConfig(form="mse"))
            count = {
                ENERGY: torch.ones_like(batch.n_atoms),
                FORCES: 3 * batch.n_atoms,
                STRESS: torch.full_like(batch.n_atoms, 9),
            }[prop]
            mask = batch.masks[prop]
            rows = torch.stack([absolute.detach().double(), square.detach().double(), count.double()], dim=1)[mask]
            self.sums[:, p].index_add_(0, batch.fidelity_idx[mask], rows)

    def errors(self) -> dict[str, dict[Property, dict[str, float]]]:
        """Return fidelity → property → {mae, rmse, n} in internal units, energy per atom; only with labels."""
        table: dict[str, dict[Property, dict[str, float]]] = {}
        for f, name in enumerate(self.fidelities):
            for p, prop in enumerate(self.properties):
                absolute, square, n = self.sums[f, p].tolist()
                if n > 0:
                    table.setdefault(name, {})[prop] = {"mae": absolute / n, "rmse": (square / n) ** 0.5, "n": n}
        return table
