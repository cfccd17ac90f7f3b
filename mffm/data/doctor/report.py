"""What the doctor says: doctor.md for people, doctor.json for machines, plots."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mffm import plots
from mffm.data import records
from mffm.data.checks import Finding, Severity
from mffm.data.doctor.coverage import Coverage
from mffm.data.doctor.outliers import residuals
from mffm.data.doctor.scan import Columns
from mffm.keys import PROPERTIES

ORDER: tuple[Severity, ...] = ("error", "warning", "note")
VERSION = 1  # of doctor.json


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What was examined and found; findings by severity.

    Attributes:
        inputs, against: paths as given.
        elements: atomic numbers that occur.
    """

    inputs: list[str]
    against: list[str]
    n_frames: int
    n_rejected: int
    fidelities: list[str]
    coverage: Coverage
    elements: list[str]
    findings: list[Finding]

    def count(self, severity: Severity) -> int:
        """Return how many findings have a severity."""
        return sum(f.severity == severity for f in self.findings)


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return what doctor.json holds."""
    content = dataclasses.asdict(diagnosis)
    for finding in content["findings"]:
        finding["evidence"] = [{"place": place, "found": found} for place, found in finding["evidence"]]
    counts = {severity: diagnosis.count(severity) for severity in ORDER}
    return {"version": VERSION, "counts": counts, **content}


def markdown(diagnosis: Diagnosis, drawn: Sequence[str]) -> str:
    """Return doctor.md; ``drawn`` are the files of the plots."""
    lines = [f"# Doctor: {', '.join(f'`{path}`' for path in diagnosis.inputs)}", ""]
    found = ", ".join(_plural(diagnosis.count(severity), severity) for severity in ORDER)
    lines += [
        f"{diagnosis.n_frames} frames, {diagnosis.n_rejected} more that an ingest leaves out, "
        f"{len(diagnosis.elements)} elements ({' '.join(diagnosis.elements)}). {found}.",
        "",
    ]
    if diagnosis.against:
        lines += [f"Compared with {', '.join(f'`{path}`' for path in diagnosis.against)}.", ""]
    for severity in ORDER:
        chosen = [f for f in diagnosis.findings if f.severity == severity]
        if chosen:
            lines += [f"## {severity.capitalize()}s", ""]
        for finding in chosen:
            lines += [
                f"### {finding.check}{f' ({finding.fidelity})' if finding.fidelity else ''}",
                "",
                finding.message + ".",
            ]
            lines += ["", f"Remedy: {finding.remedy}."] if finding.remedy else []
            if finding.evidence:
                lines += ["", "| where | what |", "|---|---|"]
                lines += [f"| {_cell(place)} | {_cell(what)} |" for place, what in finding.evidence]
            lines.append("")
    lines += [
        "## Labels",
        "",
        "| source | frames | fidelity | " + " | ".join(PROPERTIES) + " |",
        "|---|---|---|---|---|---|",
    ]
    for source, n in diagnosis.coverage.frames.items():
        for fidelity, counts in diagnosis.coverage.labels.get(source, {"": {}}).items():
            cells = [str(counts.get(p, 0)) for p in PROPERTIES]
            lines.append(f"| {_cell(source)} | {n} | {fidelity} | " + " | ".join(cells) + " |")
    lines.append("")
    for name in drawn:
        lines += [f"![{name.removesuffix('.png')}]({name})", ""]
    return "\n".join(lines)


def _plural(n: int, word: str) -> str:
    return f"{n} {word}{'' if n == 1 else 's'}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def draw(columns: Columns, folder: Path) -> list[str]:
    """Draw what the data look like; return the names of the files.

    Raises:
        InputError: matplotlib is not installed.
    """
    energies, forces = {}, {}
    for k, fidelity in enumerate(columns.fidelities):
        _, residual = residuals(columns, k)
        if len(residual):
            energies[fidelity] = residual - np.median(residual)
        largest = columns.largest_force[k]
        largest = largest[np.isfinite(largest) & (largest > 0)]
        if len(largest):
            forces[fidelity] = largest
    drawn = []
    for name, panels in (
        ("energies.png", [("energy from the element fit, eV/atom", energies, False)]),
        ("forces.png", [("largest force of a frame, eV/Å", forces, True)]),
        (
            "structures.png",
            [
                ("atoms", {"": columns.n_atoms.astype(np.float64)}, True),
                ("mean number of neighbors within 5 Å", {"": columns.neighbors}, False),
            ],
        ),
    ):
        shown = [panel for panel in panels if panel[1]]
        if shown and columns.n:
            plots.histograms(folder / name, shown, "frames")
            drawn.append(name)
    return drawn


def write(diagnosis: Diagnosis, columns: Columns, folder: Path, with_plots: bool = True) -> list[Path]:
    """Write doctor.md, doctor.json and the plots; return the paths.

    Raises:
        InputError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = draw(columns, folder) if with_plots else []
    records.write_json(folder / "doctor.json", as_json(diagnosis))
    temporary = folder / "doctor.md.tmp"
    temporary.write_text(markdown(diagnosis, drawn), encoding="utf-8")
    records.publish(temporary, folder / "doctor.md")
    return [folder / name for name in ("doctor.md", "doctor.json", *drawn)]
