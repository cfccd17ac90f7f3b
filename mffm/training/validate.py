"""Validation: errors per fidelity and property of the averaged weights, in physical units, on all ranks together."""

from pathlib import Path

import torch

from mffm import distributed, plots
from mffm.batch import Batch, reference_energy
from mffm.data.loader import evaluation_batches
from mffm.data.pools import choose
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY, FORCES, PROPERTIES, REPORT_UNITS, STRESS, Property
from mffm.loss import ErrorSums, Loss
from mffm.models.potential import Potential, Prediction

PLOTTED = 3000  # points of a parity panel; more are only darker


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
        predicts_stress: bool = True,
    ):
        self.fidelities, self.loss, self.table = fidelities, loss, table
        self.counts: dict[tuple[int, Property], float] = {}
        self.batches: list[Batch] = []
        self.has_stress = False
        self.names: set[str] = set()  # of the metrics that a validation gives
        index = 0
        for f, name in enumerate(fidelities.names):
            if name not in store.fidelities:  # of a release that is fine-tuned on data of others
                continue
            rows = choose(store, store.rows(split=split, fidelity=name), 0, max_frames)
            for prop in PROPERTIES:
                live = store.has(name, prop)[rows]
                n_atoms = store.n_atoms[rows][live].sum()
                n = {ENERGY: live.sum(), FORCES: 3 * n_atoms, STRESS: 9 * live.sum()}[prop]
                if prop == STRESS and not predicts_stress:
                    continue
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
        self._points = _Points(self.batches, len(fidelities), ranks)
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
        self._points.clear()
        for batch in self.batches:
            prediction = potential(batch, forces=True, stress=self.has_stress or self.loss.needs_stress)
            reference = torch.nan_to_num(reference_energy(batch, self.table))
            errors.add(prediction, batch, reference)
            self._points.add(prediction, batch, reference)
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

    def draw(self, path: Path, title: str) -> bool:
        """Write parity plots of the last validation, a sample of points of every rank; return whether there was one.

        Every rank calls this, rank 0 writes.
        """
        panels = self._points.panels(self.fidelities, self.table.device)
        if not panels or not distributed.ranks_from_environment().is_main:
            return bool(panels)
        path.parent.mkdir(exist_ok=True)
        plots.parity(path, panels, title)
        return True


class _Points:
    """Labels and predictions of evenly spaced validation points, so many of each (fidelity, property) at most.

    Energies are per atom, the element references subtracted from both.
    """

    def __init__(self, batches: list[Batch], n_fidelities: int, ranks: distributed.Ranks):
        self.ranks = ranks
        self.share = max(1, PLOTTED // ranks.world_size)
        self.totals = torch.zeros(n_fidelities, len(PROPERTIES), dtype=torch.float64)
        for batch in batches:
            f = int(batch.fidelity_idx[0])
            for p, prop in enumerate(PROPERTIES):
                size = {ENERGY: torch.ones_like(batch.n_atoms), FORCES: 3 * batch.n_atoms}.get(
                    prop, torch.full_like(batch.n_atoms, 9)
                )
                self.totals[f, p] += float(size[batch.masks[prop]].sum())
        self.clear()

    def clear(self) -> None:
        self.seen = torch.zeros_like(self.totals)
        self.parts: dict[tuple[int, int], list[torch.Tensor]] = {}

    def add(self, prediction: Prediction, batch: Batch, reference: torch.Tensor) -> None:
        """Keep every so-many-th point of a batch, which holds systems of one fidelity."""
        f = int(batch.fidelity_idx[0])
        for p, prop in enumerate(PROPERTIES):
            mask, value = batch.masks[prop], getattr(prediction, prop)
            if value is None or not mask.any():
                continue
            label = batch.labels[prop]
            if prop == ENERGY:
                value, label = value / batch.n_atoms, (label - reference) / batch.n_atoms
            entries = mask[batch.system_idx] if prop == FORCES else mask
            pairs = torch.stack([label[entries].double().flatten(), value.detach()[entries].double().flatten()])
            stride = -(-int(self.totals[f, p]) // self.share)
            first = -int(self.seen[f, p]) % stride
            self.parts.setdefault((f, p), []).append(pairs[:, first::stride].cpu())
            self.seen[f, p] += pairs.shape[1]

    def panels(self, fidelities: FidelityTable, device: torch.device) -> list[plots.Panel]:
        """Return the panels of all ranks' points; collective."""
        if not float(distributed.sum_over_ranks(self.seen.sum().to(device))):
            return []
        # Every rank has a slot of its own in the sum.
        slots = torch.zeros(*self.totals.shape, self.ranks.world_size, 3, self.share, dtype=torch.float64)
        for (f, p), parts in self.parts.items():
            pairs = torch.cat(parts, dim=1)
            slots[f, p, self.ranks.rank, 0, : pairs.shape[1]] = 1
            slots[f, p, self.ranks.rank, 1:, : pairs.shape[1]] = pairs
        slots = distributed.sum_over_ranks(slots.to(device)).cpu()
        totals = distributed.sum_over_ranks(self.totals.to(device)).cpu()
        units = {ENERGY: "eV/atom", FORCES: "eV/Å", STRESS: "eV/Å³"}
        panels: list[plots.Panel] = []
        for f, name in enumerate(fidelities.names):
            for p, prop in enumerate(PROPERTIES):
                live, label, value = (slots[f, p, :, i].flatten() for i in range(3))
                n, total = int(live.sum()), int(totals[f, p])
                if n:
                    part = "" if n == total else f", {n:,} of {total:,} points"
                    chosen = (live > 0) & value.isfinite()
                    panels.append((f"{name} {prop}{part}", units[prop], label[chosen].numpy(), value[chosen].numpy()))
        return panels
