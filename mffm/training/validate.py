"""Validation: errors per fidelity and property of the averaged weights, in physical units, on all ranks together."""

import torch

from mffm import distributed
from mffm.batch import Batch, reference_energy
from mffm.data.loader import evaluation_batches
from mffm.data.pools import choose
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY, FORCES, PROPERTIES, REPORT_UNITS, STRESS, Property
from mffm.loss import ErrorSums, Loss
from mffm.models.potential import Potential


class Validator:
    """Holds the collated validation systems of this rank and measures a potential on them."""

    def __init__(
        self,
        store: Store,
        fidelities: FidelityTable,
        split: str,
        max_frames: int | None,
        cutoff: float,
        edge_budget: int,
        loss: Loss,
        used: set[tuple[int, Property]],
        table: torch.Tensor,
        ranks: distributed.Ranks,
    ):
        self.fidelities, self.loss, self.table = fidelities, loss, table
        self.counts: dict[tuple[int, Property], float] = {}
        self.batches: list[Batch] = []
        self.has_stress = False
        self.names: set[str] = set()  # of the metrics that a validation gives
        index = 0
        for f, name in enumerate(fidelities.names):
            rows = choose(store, store.rows(split=split, fidelity=name), 0, max_frames)
            for prop in PROPERTIES:
                live = store.has(name, prop)[rows]
                n_atoms = store.n_atoms[rows][live].sum()
                n = {ENERGY: live.sum(), FORCES: 3 * n_atoms, STRESS: 9 * live.sum()}[prop]
                self.has_stress |= prop == STRESS and n > 0
                if n and (f, prop) in used:
                    self.counts[f, prop] = float(n)
                if n and not (prop == ENERGY and bool(table[f].isnan().all())):
                    self.names |= {f"val/{name}/{prop}_mae", f"val/{name}/{prop}_rmse"}
            for batch in evaluation_batches(store, rows, name, fidelities, cutoff, edge_budget):
                batch = batch.to(table.device)
                self._mask_unreferenced(batch, store, trained=(f, ENERGY) in used)  # raises on all ranks alike
                if index % ranks.world_size == ranks.rank:
                    self.batches.append(batch)
                index += 1
        self.names |= {"val/loss"} | {f"val/{fidelities.names[f]}/loss" for f, _ in self.counts}
        if not self.counts:
            raise InputError(
                f"split {split!r} holds no label of {', '.join(fidelities.names)}; name another with "
                "data.validation_split"
            )

    def _mask_unreferenced(self, batch: Batch, store: Store, trained: bool) -> None:
        """Leave out energies of a fidelity trained without energies: it has no element references to compare them with.

        Raises:
            InputError: the fidelity's energies are trained, but a validation system has an element that training has
                not.
        """
        bad = reference_energy(batch, self.table).isnan() & batch.masks[ENERGY]
        if trained and bad.any():
            row = int(batch.rows[bad][0])
            name = self.fidelities.names[int(batch.fidelity_idx[bad][0])]
            elements = sorted(set(store.geometry(row)[0].tolist()))
            raise InputError(
                f"validation frame {row} (atomic numbers {elements}) has an element without references at {name!r}; "
                "give them with references.given, or validate on another split"
            )
        batch.masks[ENERGY] &= ~bad

    def __call__(self, potential: Potential) -> dict[str, float]:
        """Return the metrics of a potential: val/loss, val/<fidelity>/loss, val/<fidelity>/<property>_{mae,rmse}."""
        divisors = self.loss.divisors(self.counts, {}, "per_fidelity").to(self.table.device)
        errors = ErrorSums(self.fidelities.names, device=self.table.device)
        losses = torch.zeros(
            len(self.loss.properties), len(self.fidelities), dtype=torch.float64, device=self.table.device
        )
        potential.eval()
        for batch in self.batches:
            prediction = potential(batch, forces=True, stress=self.has_stress or self.loss.needs_stress)
            reference = torch.nan_to_num(reference_energy(batch, self.table))
            errors.add(prediction, batch, reference)
            losses += self.loss(prediction, batch, reference, divisors)[1]
        losses, errors.sums = distributed.sum_over_ranks(losses), distributed.sum_over_ranks(errors.sums)
        metrics: dict[str, float] = {}
        measured = [f for f in range(len(self.fidelities)) if any((f, p) in self.counts for p in self.loss.properties)]
        for f in measured:
            metrics[f"val/{self.fidelities.names[f]}/loss"] = float(losses[:, f].sum())
        metrics["val/loss"] = sum(metrics.values()) / len(metrics)
        for name, properties in errors.errors().items():
            for prop, error in properties.items():
                factor = REPORT_UNITS[prop][1]
                metrics[f"val/{name}/{prop}_mae"] = error["mae"] * factor
                metrics[f"val/{name}/{prop}_rmse"] = error["rmse"] * factor
        return metrics
