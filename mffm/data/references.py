"""Element references: the baseline energy per element of each fidelity, fitted on its training labels.

A fidelity's energies are known only up to a sum over its atoms, and two fidelities may differ by 1e4 eV per atom
(valence against all-electron). Whatever is linear in the composition must leave the labels before anything is learnt:
adding such a term to one fidelity's labels changes its references by the same term and nothing else.

The fit is least squares on energies per atom. Normal equations are summed in chunks in float64, with columns scaled to
unit length; directions of composition that never vary get the solution of smallest norm (the limit of a ridge → 0), so
they stay bounded and the others carry no ridge bias. Two rounds of refinement on the streamed residual remove what
float64 loses on total energies of 1e6 eV.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import atomic_numbers as ase_atomic_numbers
from ase.data import chemical_symbols

from mffm.config.recipe import ReferencesConfig
from mffm.errors import InputError, known
from mffm.keys import ENERGY, N_ELEMENTS

if TYPE_CHECKING:
    from mffm.data.store import Store

_CHUNK = 8192  # rows at a time: 8 MB of compositions
_RANK_TOLERANCE = 1e-11  # eigenvalues of the scaled normal matrix; rounding leaves about 1e-14 (1e-13 for 1e8 rows)
_REFINEMENTS = 2  # the first takes the weakest directions from 3 meV/atom to 1e-10, the second measures the residual

# (compositions [n, N_ELEMENTS + 1], energies [n]) in chunks; called once per pass over the data.
Stream = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]


@dataclass
class ElementReferences:
    """Reference energies in eV per atom.

    Attributes:
        table: fidelity → float64 [N_ELEMENTS + 1] by atomic number, NaN where the fidelity has no reference.
        report: fidelity → how its references came about, JSON-able: ``method`` (fit, paired, given or none),
            ``reason``, ``n_labels``, ``n_pairs``, ``anchor``, ``rank``, ``n_free``, ``condition_number``,
            ``rmse_per_atom`` (eV), ``elements``, ``unknown`` (elements that other fidelities have), ``confounded``
            (groups), ``warnings``.
    """

    table: dict[str, np.ndarray]
    report: dict[str, dict[str, Any]] = field(default_factory=dict)

    def elements(self, fidelity: str) -> list[str]:
        """Return the symbols that have a reference at this fidelity, by atomic number."""
        return [chemical_symbols[z] for z in np.flatnonzero(~np.isnan(self._of(fidelity)))]

    def value(self, fidelity: str, element: str) -> float | None:
        """Return the reference of an element symbol in eV, None where there is none."""
        value = float(self._of(fidelity)[ase_atomic_numbers[element]])
        return None if math.isnan(value) else value

    def covers(self, fidelity: str, compositions: np.ndarray) -> np.ndarray:
        """Return a bool [n]: which compositions [n, N_ELEMENTS + 1] have a reference for every element."""
        unknown = np.isnan(self._of(fidelity))
        return np.asarray(~(np.asarray(compositions)[:, unknown] > 0).any(axis=1))

    def energies(self, fidelity: str, compositions: np.ndarray) -> np.ndarray:
        """Return the reference energies [n] of compositions [n, N_ELEMENTS + 1], eV.

        Raises:
            InputError: an element without a reference, or a fidelity without any.
        """
        values = self._of(fidelity)
        compositions = np.asarray(compositions, np.float64)
        missing = np.isnan(values) & (compositions > 0).any(axis=0)
        if missing.any():
            have = self.elements(fidelity)
            names = ", ".join(chemical_symbols[z] for z in np.flatnonzero(missing))
            if not have:
                raise InputError(
                    f"fidelity {fidelity!r} has no element references, because it has no energy label; "
                    f"its energies are not trained: ask for another fidelity, or give references.given.{fidelity}"
                )
            raise InputError(
                f"fidelity {fidelity!r} has no element reference for {names}; known: {', '.join(have)}; "
                f"add training labels with these elements, or give references.given.{fidelity}"
            )
        return compositions @ np.where(np.isnan(values), 0.0, values)

    def array(self, fidelities: Sequence[str]) -> np.ndarray:
        """Return the references [n_fidelities, N_ELEMENTS + 1], NaN where there is none."""
        return np.stack([self._of(f) for f in fidelities])

    def _of(self, fidelity: str) -> np.ndarray:
        if fidelity not in self.table:
            raise InputError(f"no element references of fidelity {fidelity!r}; there are: {known(self.table)}")
        return self.table[fidelity]

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict: references by symbol, and the report."""
        references = {
            f: {chemical_symbols[z]: float(values[z]) for z in np.flatnonzero(~np.isnan(values))}
            for f, values in self.table.items()
        }
        return {"references": references, "report": self.report}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ElementReferences:
        """Return what ``to_dict`` wrote.

        Raises:
            InputError: unknown element symbol or not a reference table.
        """
        if not isinstance(content.get("references"), Mapping):
            raise InputError("element references: expected a mapping with the keys references and report")
        table = {f: _from_symbols(values, f"references.{f}") for f, values in content["references"].items()}
        return cls(table, dict(content.get("report", {})))

    def report_markdown(self) -> str:
        """Return the report for people."""
        lines = ["# Element references", ""]
        lines += ["| fidelity | method | labels | pairs | rank | condition | residual meV/atom | elements | unknown |"]
        lines += ["|---|---|---|---|---|---|---|---|---|"]
        for f, entry in self.report.items():
            rank = "" if entry["rank"] is None else f"{entry['rank']} of {entry['n_free']}"
            condition = "" if entry["condition_number"] is None else f"{entry['condition_number']:.3g}"
            rmse = "" if entry["rmse_per_atom"] is None else f"{1e3 * entry['rmse_per_atom']:.1f}"
            pairs = "" if entry["n_pairs"] is None else f"{entry['n_pairs']} with {entry['anchor']}"
            cells = [f, entry["method"], entry["n_labels"], pairs, rank, condition, rmse, len(entry["elements"])]
            lines.append("| " + " | ".join(str(c) for c in [*cells, " ".join(entry["unknown"]) or "none"]) + " |")
        for f, entry in self.report.items():
            lines += ["", f"## {f}", "", f"{entry['method']}: {entry['reason']}."]
            lines += ["", *(f"- warning: {w}" for w in entry["warnings"])] if entry["warnings"] else []
            if entry["elements"]:
                lines += ["", "| element | eV/atom |", "|---|---|"]
                values = self.table[f]
                lines += [f"| {s} | {values[ase_atomic_numbers[s]]:.6f} |" for s in entry["elements"]]
        return "\n".join(lines) + "\n"


def fit(
    store: Store, fidelities: Sequence[str], rows_by_fidelity: Mapping[str, np.ndarray], config: ReferencesConfig
) -> ElementReferences:
    """Fit the references of every fidelity on the labels of its own training rows.

    ``auto`` fits a fidelity on its own labels, unless these are too few (fewer than max(20, 4 × elements)) or leave the
    fit rank deficient, and the anchor labels some of the same rows: then the references are the anchor's plus a fit of
    E - E(anchor) over the rows with both labels, if that leaves no more undetermined than the own fit. ``paired`` does
    so in any case, ``fit`` never. The anchor's own are always fitted, as are those of a fidelity with given values.
    Elements of the fidelity that no pair contains are fitted on its other labels, with the rest held fixed. An element
    that none of its labels contains is unknown: the anchor's reference says nothing about another level of theory.

    Args:
        store: where the labels are; nothing but the rows given is read.
        fidelities: in the run's order.
        rows_by_fidelity: training rows of each fidelity; rows without an energy label are passed over.
        config: method, anchor and given values (those are kept and the remaining elements fitted).

    Raises:
        InputError: unknown anchor, fidelity or element symbol; ``paired`` without pairs.
    """
    for name in config.given:
        if name not in fidelities:
            raise InputError(f"references.given names fidelity {name!r}; the run has: {known(fidelities)}")
    rows = {f: _labelled(store, f, rows_by_fidelity.get(f, np.zeros(0, np.int64))) for f in fidelities}
    anchor = config.anchor
    if anchor is None:
        anchor = max(fidelities, key=lambda f: len(rows[f]))  # the first of several with as many
    elif anchor not in fidelities:
        raise InputError(f"references.anchor: {anchor!r} is not a fidelity of the run; it has: {known(fidelities)}")
    result = ElementReferences({}, {})
    for f in sorted(fidelities, key=lambda f: f != anchor):
        given = _from_symbols(config.given.get(f, {}), f"references.given.{f}")
        if f == anchor or config.method == "fit" or config.given.get(f):
            outcome = _own(store, f, rows[f], given)
        else:
            outcome = _small(store, f, rows[f], anchor, result.table[anchor], config.method)
        result.table[f], result.report[f] = outcome
    result.table = {f: result.table[f] for f in fidelities}
    result.report = {f: result.report[f] for f in fidelities}
    _note_unknown(result)
    return result


def _own(store: Store, f: str, rows: np.ndarray, given: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Fit on the fidelity's own labels; given values are kept."""
    has_given = not np.isnan(given).all()
    if len(rows) == 0:
        reason = (
            "values of the recipe; no energy label" if has_given else "no energy label: its energies are not trained"
        )
        return given, _entry("given" if has_given else "none", reason, 0, given)
    values, solution = _fit_free(_energies(store, f, rows), given)
    reason = "least squares on its own labels"
    method = "fit"
    if has_given:
        method = "given"
        reason = "values of the recipe" + ("; the other elements by least squares" if solution.n_free else "")
    return values, _entry(method, reason, len(rows), values, solution)


def _small(
    store: Store, f: str, rows: np.ndarray, anchor: str, anchor_values: np.ndarray, method: str
) -> tuple[np.ndarray, dict[str, Any]]:
    """Decide between the own fit and the paired residual, and make it; see ``fit``."""
    nothing = np.full(N_ELEMENTS + 1, np.nan)
    if len(rows) == 0:
        return _own(store, f, rows, nothing)
    values, own = _fit_free(_energies(store, f, rows), nothing)
    enough = max(20, 4 * own.n_free)
    if method == "auto" and own.rank == own.n_free and len(rows) >= enough:
        return values, _entry("fit", "least squares on its own labels", len(rows), values, own)
    pairs = rows[store.has(anchor, ENERGY)[rows]]
    covered = [~(c[:, np.isnan(anchor_values)] > 0).any(axis=1) for c in _compositions(store, pairs)]
    pairs = pairs[np.concatenate(covered)] if covered else pairs
    why = f"{len(rows)} labels for {own.n_free} elements (enough: {enough}), rank {own.rank}"
    if len(pairs) == 0:
        if method == "paired":
            raise InputError(
                f"references.method is paired, but no training frame of {f!r} ({len(rows)} with an energy) has an "
                f"energy of the anchor {anchor!r} too; label some frames at both, name another references.anchor, "
                "or use method fit"
            )
        entry = _entry("fit", f"least squares on its own labels, although too few: {why}", len(rows), values, own)
        entry["warnings"].append(f"too few labels for a fit and no frame that the anchor {anchor} labels too: {why}")
        return values, entry

    def residuals() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for compositions, (chunk, energies) in zip(_compositions(store, pairs), _labels(store, f, pairs), strict=True):
            yield compositions, energies - store.energies(anchor, chunk)

    difference, solution = _fit_free(residuals, nothing)
    paired_values = anchor_values + difference  # NaN where no pair has the element
    uncovered = np.isnan(paired_values) & own.present
    warnings = []
    if uncovered.any():
        paired_values, rest = _fit_free(_energies(store, f, rows), paired_values)
        names = " ".join(chemical_symbols[z] for z in np.flatnonzero(uncovered))
        warnings.append(f"no pair contains {names}: fitted on the labels without partner (rank {rest.rank})")
        solution = solution.joined(rest)
    if method == "auto" and solution.rank < own.rank:
        reason = f"least squares on its own labels; the {len(pairs)} pairs with {anchor} tell less: {why}"
        return values, _entry("fit", reason, len(rows), values, own)
    reason = f"references of {anchor} plus a fit of the residual over {len(pairs)} pairs; {why}"
    entry = _entry("paired", reason, len(rows), paired_values, solution)
    entry.update(n_pairs=len(pairs), anchor=anchor, rmse_of_pairs_per_atom=solution.rmse_per_atom)
    entry["rmse_per_atom"] = _residual_sums(_energies(store, f, rows), np.nan_to_num(paired_values))[1] ** 0.5
    entry["warnings"] += warnings
    return paired_values, entry


def _labelled(store: Store, fidelity: str, rows: np.ndarray) -> np.ndarray:
    rows = np.unique(np.asarray(rows, np.int64))
    # A fidelity of a release that is fine-tuned may have no labels in the store at all.
    return rows[store.has(fidelity, ENERGY)[rows]] if fidelity in store.fidelities else rows[:0]


def _compositions(store: Store, rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), _CHUNK):
        yield store.composition(rows[start : start + _CHUNK])


def _labels(store: Store, fidelity: str, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        yield chunk, store.energies(fidelity, chunk)


def _energies(store: Store, fidelity: str, rows: np.ndarray) -> Stream:
    def stream() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for compositions, (_, energies) in zip(_compositions(store, rows), _labels(store, fidelity, rows), strict=True):
            yield compositions, energies

    return stream


@dataclass
class _Solution:
    """How well a fit was determined. ``present``: [N_ELEMENTS + 1] bool; ``condition``: of the scaled columns."""

    rank: int
    n_free: int
    condition: float | None
    rmse_per_atom: float | None
    confounded: list[list[str]]
    present: np.ndarray

    def joined(self, other: _Solution) -> _Solution:
        """Return the summary of two fits of different elements."""
        conditions = [c for c in (self.condition, other.condition) if c is not None]
        return _Solution(
            rank=self.rank + other.rank,
            n_free=self.n_free + other.n_free,
            condition=max(conditions, default=None),
            rmse_per_atom=self.rmse_per_atom,
            confounded=self.confounded + other.confounded,
            present=self.present | other.present,
        )


def _fit_free(stream: Stream, fixed: np.ndarray) -> tuple[np.ndarray, _Solution]:
    """Fit each element of the data that is NaN in ``fixed``; return all values (NaN: not in the data) and a summary."""
    gram = np.zeros((N_ELEMENTS + 1, N_ELEMENTS + 1))
    values = np.nan_to_num(fixed)
    gradient, mean_square = _residual_sums(stream, values, gram)
    present = np.diagonal(gram) > 0
    free = np.flatnonzero(present & np.isnan(fixed))
    if len(free) == 0:
        return fixed.copy(), _Solution(0, 0, None, mean_square**0.5, [], present)
    # Elements are compared by the correlation of their columns, whatever their abundance.
    norms = np.sqrt(np.diagonal(gram)[free])
    eigenvalues, vectors = np.linalg.eigh(gram[np.ix_(free, free)] / np.outer(norms, norms))
    kept = eigenvalues > _RANK_TOLERANCE * eigenvalues[-1]
    inverse = (vectors[:, kept] / eigenvalues[kept]) @ vectors[:, kept].T
    values[free] = inverse @ (gradient[free] / norms) / norms
    for _ in range(_REFINEMENTS):
        gradient, mean_square = _residual_sums(stream, values)
        values[free] += inverse @ (gradient[free] / norms) / norms
    confounded: list[list[str]] = []
    if not kept.all():
        undetermined = vectors[:, ~kept] / norms[:, None]  # changes of the values that no label sees
        weights = np.linalg.lstsq(undetermined, values[free], rcond=None)[0]
        values[free] -= undetermined @ weights
        confounded = _groups(vectors[:, ~kept] @ vectors[:, ~kept].T, free)
    condition = math.sqrt(float(eigenvalues[-1] / eigenvalues[kept][0]))
    values[~np.isin(np.arange(N_ELEMENTS + 1), free) & np.isnan(fixed)] = np.nan
    return values, _Solution(int(kept.sum()), len(free), condition, mean_square**0.5, confounded, present)


def _residual_sums(stream: Stream, values: np.ndarray, gram: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """Return the sums of (residual per atom × fractions) [N_ELEMENTS + 1] and its mean square, eV²; add to ``gram``."""
    gradient, total, n = np.zeros(N_ELEMENTS + 1), 0.0, 0
    for compositions, energies in stream():
        per_atom = 1 / compositions.sum(axis=1)
        residual = (energies - compositions @ values) * per_atom
        gradient += (residual * per_atom) @ compositions
        total, n = total + float(residual @ residual), n + len(energies)
        if gram is not None:
            fractions = compositions * per_atom[:, None]
            gram += fractions.T @ fractions
    return gradient, total / max(n, 1)


def _groups(projector: np.ndarray, free: np.ndarray) -> list[list[str]]:
    """Return the groups of elements that are linked by a direction that never varies."""
    linked = np.abs(projector) > 1e-6
    left = set(np.flatnonzero(np.diagonal(linked)).tolist())
    groups = []
    while left:
        group, new = set(), {min(left)}
        while new:
            group |= new
            new = {int(j) for i in new for j in np.flatnonzero(linked[i])} - group
        left -= group
        groups.append([chemical_symbols[free[i]] for i in sorted(group)])
    return groups


def _entry(
    method: str, reason: str, n_labels: int, values: np.ndarray, solution: _Solution | None = None
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "method": method,
        "reason": reason,
        "n_labels": n_labels,
        "n_pairs": None,
        "anchor": None,
        "rank": solution.rank if solution else None,
        "n_free": solution.n_free if solution else None,
        "condition_number": solution.condition if solution else None,
        "rmse_per_atom": solution.rmse_per_atom if solution else None,
        "elements": [chemical_symbols[z] for z in np.flatnonzero(~np.isnan(values))],
        "unknown": [],
        "confounded": solution.confounded if solution else [],
        "warnings": [],
    }
    for group in entry["confounded"]:
        entry["warnings"].append(
            f"{' '.join(group)} never vary independently: their sum is determined for the compositions of the training "
            "labels only, other compositions get an arbitrary reference"
        )
    return entry


def _note_unknown(result: ElementReferences) -> None:
    anywhere = ~np.isnan(np.stack(list(result.table.values()))).all(axis=0)
    for f, values in result.table.items():
        unknown = [chemical_symbols[z] for z in np.flatnonzero(anywhere & np.isnan(values))]
        entry = result.report[f]
        entry["unknown"] = unknown
        if unknown and entry["method"] != "none":
            entry["warnings"].append(
                f"no label of {f} contains {' '.join(unknown)}: unknown at this fidelity, an error where asked for; "
                f"add labels or give references.given.{f}"
            )


def _from_symbols(values: Mapping[str, float], place: str) -> np.ndarray:
    table = np.full(N_ELEMENTS + 1, np.nan)
    for symbol, value in values.items():
        number = ase_atomic_numbers.get(symbol, 0)
        if number == 0 or number > N_ELEMENTS:
            raise InputError(f"{place}: {symbol!r} is not an element symbol")
        table[number] = float(value)
    return table
