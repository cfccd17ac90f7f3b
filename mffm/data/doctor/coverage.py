"""What is there: labels per fidelity and property, frames that cannot be used, files whose labels were not found."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mffm.data.checks import Finding
from mffm.data.doctor.duplicates import EXAMPLES
from mffm.data.doctor.inputs import Frames
from mffm.data.doctor.scan import Columns
from mffm.keys import ENERGY, FORCES, PROPERTIES, STRESS


@dataclass(frozen=True)
class Coverage:
    """Frames with a label: source → fidelity → property → frames; and frames a source."""

    labels: dict[str, dict[str, dict[str, int]]]
    frames: dict[str, int]


def coverage(columns: Columns) -> Coverage:
    """Count the labels of each source."""
    of = {ENERGY: columns.energy, FORCES: columns.largest_force, STRESS: columns.mean_stress}
    labels: dict[str, dict[str, dict[str, int]]] = {}
    for s, name in enumerate(columns.source_names):
        mine = columns.source == s
        for k, fidelity in enumerate(columns.fidelities):
            counts: dict[str, int] = {p: int((np.isfinite(of[p][k]) & mine).sum()) for p in PROPERTIES}
            if any(counts.values()):
                labels.setdefault(name, {})[fidelity] = counts
    frames = {name: int((columns.source == s).sum()) for s, name in enumerate(columns.source_names)}
    return Coverage(labels, frames)


def check_coverage(frames: Frames, columns: Columns, counted: Coverage) -> list[Finding]:
    """Return the findings on missing labels and on frames that an ingest leaves out."""
    findings = []
    for part in frames.parts:
        for kind, n in part.rejected.counts.items():
            conflict = "contradicts" in kind
            findings.append(
                Finding(
                    "conflict" if conflict else "rejected", "", f"{n} frames are left out by an ingest: {kind}",
                    "error" if conflict else "warning", tuple(part.rejected.examples[kind][:EXAMPLES]),
                    "find out which label is right" if conflict else "mend them where they were made, or do without",
                )
            )  # fmt: skip
        findings += [
            Finding("keys", "", f"{part.source(0) if part.n else part}: {note}", "note") for note in part.notes
        ]
    for source, n in counted.frames.items():
        if source not in counted.labels:
            findings.append(
                Finding("missing_labels", "", f"{source}: none of its {n} frames has a label", "warning", remedy="name the keys: --energy, --forces, --stress, or a data YAML")  # noqa: E501
            )  # fmt: skip
    for fidelity in columns.fidelities:
        findings += _partial(frames, columns, fidelity)
    return findings


def _partial(frames: Frames, columns: Columns, fidelity: str) -> list[Finding]:
    """Note properties that some of a fidelity's frames of several atoms have and others have not."""
    k = columns.fidelities.index(fidelity)
    has: dict[str, Any] = {
        ENERGY: np.isfinite(columns.energy[k]),
        FORCES: np.isfinite(columns.largest_force[k]),
        STRESS: np.isfinite(columns.mean_stress[k]),
    }
    of_fidelity = np.logical_or.reduce(list(has.values())) & ~columns.isolated
    total = int(of_fidelity.sum())
    findings = []
    for prop, there in has.items():
        expected = of_fidelity if prop != STRESS else of_fidelity & (columns.volume > 0)
        missing = np.flatnonzero(expected & ~there)
        if there.any() and len(missing):
            findings.append(
                Finding(
                    "missing_labels", fidelity, f"{len(missing)} of {total} labelled frames have no {prop}", "note",
                    tuple((frames.place(int(row)), f"no {prop}") for row in missing[:3]),
                    "partial labels are fine; see whether these are meant to be missing",
                )
            )  # fmt: skip
    return findings
