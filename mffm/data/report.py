"""What an ingest says: ``ingest.md`` for people, ``ingest.json`` with the same for the command line."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mffm.config.data import DataConfig
from mffm.data import records
from mffm.data.checks import SAMPLE, check_store, element_fit
from mffm.data.store import Store
from mffm.keys import ENERGY, FORCES, PROPERTIES, STRESS


@dataclasses.dataclass
class IngestReport:
    """What an ingest did; ``ingest.md`` in the store says the same for people."""

    store: str
    fingerprint: str
    n_frames: int
    n_rejected: int
    n_merged: int  # frames that were a structure seen before
    seconds: float
    label_counts: dict[str, dict[str, dict[str, int]]]  # split ("all" too) → fidelity → property → frames
    split_frames: dict[str, int]
    elements: dict[str, int] = dataclasses.field(default_factory=dict)  # symbol → frames that have it
    statistics: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)  # fidelity → number
    reasons: dict[str, int] = dataclasses.field(default_factory=dict)  # kind of reason → frames rejected for it
    rejected_examples: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    already_complete: bool = False

    @property
    def path(self) -> Path:
        return Path(self.store) / "ingest.md"


def finish_report(
    store: Store, config: DataConfig, state: dict[str, Any], rejected: list[dict[str, Any]], seconds: float
) -> IngestReport:
    """Check the finished store, write ingest.md and ingest.json, return the same."""
    report = IngestReport(
        store=str(store.path),
        fingerprint=store.fingerprint,
        n_frames=store.n_frames,
        n_rejected=state["n_rejected"],
        n_merged=state["n_merged"],
        seconds=round(seconds, 1),
        label_counts={"all": store.label_counts(), **{s: store.label_counts(s) for s in store.split_names}},
        split_frames={s: int((store.split == i).sum()) for i, s in enumerate(store.split_names)},
        elements=_elements(store),
        statistics=_statistics(store),
        reasons=dict(state["reasons"]),
        rejected_examples=[f"{r['file']}:{r['index']}: {r['reason']}" for r in rejected],
        warnings=_bookkeeping(store, config, state) + [str(finding) for finding in check_store(store)],
    )
    records.write_json(store.path / "ingest.json", dataclasses.asdict(report))
    temporary = store.path / "ingest.md.tmp"
    temporary.write_text(markdown(report, store))
    records.publish(temporary, store.path / "ingest.md")
    return report


def saved_report(store: Store) -> IngestReport:
    """Return the report that a complete store holds."""
    content = json.loads((store.path / "ingest.json").read_text())
    return IngestReport(**{**content, "store": str(store.path), "already_complete": True})


def _elements(store: Store) -> dict[str, int]:
    from ase.data import chemical_symbols

    frames = np.zeros(256, np.int64)
    for start in range(0, len(store.element), 1 << 24):  # one entry per (frame, element)
        frames += np.bincount(store.element[start : start + (1 << 24)], minlength=256)
    return {chemical_symbols[z]: int(frames[z]) for z in np.flatnonzero(frames)}


def _statistics(store: Store) -> dict[str, dict[str, float]]:
    """Return per fidelity: energies per atom and their scatter after the element fit, size of forces and stress (of
    a sample).
    """
    statistics: dict[str, dict[str, float]] = {}
    for fidelity in store.fidelities.names:
        numbers: dict[str, float] = {}
        rows = np.flatnonzero(store.has(fidelity, ENERGY))
        rows = rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE]
        if len(rows):
            counts, energies = store.composition(rows), store.energies(fidelity, rows)
            per_atom = energies / counts.sum(1)
            _, residual = element_fit(counts, energies)
            numbers |= {
                "energy per atom, mean, eV": float(per_atom.mean()),
                "energy per atom, least, eV": float(per_atom.min()),
                "energy per atom, most, eV": float(per_atom.max()),
                "energy per atom after element fit, rms, eV": float(np.sqrt((residual**2).mean())),
            }
        rows = np.flatnonzero(store.has(fidelity, FORCES) | store.has(fidelity, STRESS))
        rows = rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE]
        if len(rows):
            packed = store.read(rows, fidelity)
            forces = packed.forces[np.repeat(packed.has_forces, packed.n_atoms)]
            if len(forces):
                numbers["forces, rms, eV/Å"] = float(np.sqrt((forces.astype(np.float64) ** 2).mean()))
                numbers["forces, largest, eV/Å"] = float(np.abs(forces).max())
            stress = packed.stress[packed.has_stress]
            if len(stress):
                numbers["stress, rms, eV/Å³"] = float(np.sqrt((stress**2).mean()))
        if numbers:
            statistics[fidelity] = numbers
    return statistics


def _bookkeeping(store: Store, config: DataConfig, state: dict[str, Any]) -> list[str]:
    """Return what went through but should be known."""
    warnings = []
    if state["split_moves_count"]:
        warnings.append(
            f"leak in the source: {state['split_moves_count']} frames are the same structure as one in another split "
            f"and stay in the first one's split: {'; '.join(state['split_moves'][:5])}"
        )
    if state["empty_group"]:
        warnings.append(
            f"{state['empty_group']} structures have no group (group_key absent); they form one group together"
        )
    unlabelled = [name for name in store.fidelities.names if not any(store.has(name, p).any() for p in PROPERTIES)]
    if unlabelled:
        warnings.append(f"no frame has a label of fidelity {', '.join(unlabelled)}, which the data YAML declares")
    labelled = [np.logical_or.reduce([store.has(name, p) for p in PROPERTIES]) for name in store.fidelities.names]
    if sum(bool(has.any()) for has in labelled) > 1 and not (np.sum(labelled, 0) > 1).any():
        warnings.append(
            "no structure has labels of two fidelities: if the files hold the same structures, give a frame_key in one "
            "source, or positions that agree to 1e-3 Å; else the same structure may be in two splits"
        )
    for name, share in config.splits.fractions.items():
        if share > 0 and not (store.split == store.split_names.index(name)).any():
            warnings.append(f"split {name!r} is empty; it should hold {share:.0%}")
    share = state["n_rejected"] / max(1, state["n_rejected"] + store.n_frames + state["n_merged"])
    if share > 0.01:
        kind, n = max(state["reasons"].items(), key=lambda item: item[1])
        warnings.append(
            f"{share:.1%} of the frames were rejected, {n} of them for: {kind}; every one is in rejected.jsonl"
        )
    return warnings


def kind_of(reason: str) -> str:
    """Return a reason with … for its numbers, for counting."""
    words = ["…" if any(c.isdigit() for c in word) else word for word in reason.split()]
    kind = " ".join(word for k, word in enumerate(words) if k == 0 or (word, words[k - 1]) != ("…", "…"))
    return kind if len(kind) <= 100 else kind[:99] + "…"


def count_reason(reasons: dict[str, int], reason: str) -> None:
    kind = kind_of(reason)
    if kind in reasons or len(reasons) < 50:
        reasons[kind] = reasons.get(kind, 0) + 1
    else:
        reasons["other"] = reasons.get("other", 0) + 1


def markdown(report: IngestReport, store: Store) -> str:
    """Return ingest.md."""
    lines = [f"# Store `{store.name}`", ""]
    lines += [
        f"{report.n_frames} structures, {report.n_merged} frames merged into them, {report.n_rejected} rejected; "
        f"{report.seconds:.0f} s. Fingerprint `{report.fingerprint}`.",
        "",
    ]
    lines += ["Sources: " + "; ".join(f"{s['name']} ({s['licence']})" for s in store.sources), ""]
    lines += ["## Warnings", "", *([f"- {w}" for w in report.warnings] or ["None."]), "", "## Labels", ""]
    splits = list(report.split_frames)
    lines += ["| fidelity | property | all | " + " | ".join(splits) + " |", "|---|---|" + "---|" * (len(splits) + 1)]
    lines.append(
        f"| (structures) | | {report.n_frames} | " + " | ".join(str(report.split_frames[s]) for s in splits) + " |"
    )
    for fidelity, counts in report.label_counts["all"].items():
        for prop in PROPERTIES:
            if prop in counts:
                cells = [str(report.label_counts[s].get(fidelity, {}).get(prop, 0)) for s in splits]
                lines.append(f"| {fidelity} | {prop} | {counts[prop]} | " + " | ".join(cells) + " |")
    lines += ["", "## Elements (structures)", "", ", ".join(f"{s} {n}" for s, n in report.elements.items()), ""]
    lines += [
        "## Labels, how large",
        "",
        f"Of at most {SAMPLE} structures a fidelity.",
        "",
        "| fidelity | what | value |",
        "|---|---|---|",
    ]
    for fidelity, numbers in report.statistics.items():
        lines += [f"| {fidelity} | {what} | {value:.5g} |" for what, value in numbers.items()]
    lines += ["", "## Rejected", ""]
    if report.n_rejected:
        kinds = Counter(report.reasons).most_common()
        lines += ["| reason | frames |", "|---|---|", *[f"| {kind} | {n} |" for kind, n in kinds], ""]
        lines += [
            "All of them are in rejected.jsonl; the first:",
            "",
            *[f"- {line}" for line in report.rejected_examples],
        ]
    else:
        lines.append("None.")
    return "\n".join(lines) + "\n"
