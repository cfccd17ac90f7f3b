"""The card of a release: Markdown for people, with the YAML front matter that model hubs read."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import yaml
from ase.data import atomic_numbers, chemical_symbols, covalent_radii

from mffm import __version__
from mffm.release.loading import NOT_CONSERVATIVE
from mffm.release.spec import PotentialSpec

# SPDX names as hubs spell them; anything else, or a mixture, is "other" with a name and a link.
HUB_LICENCES = {
    name: name
    for name in (
        "mit", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-2.0", "cc-by-3.0", "cc-by-4.0",
        "cc-by-sa-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "gpl-2.0", "gpl-3.0",
        "lgpl-3.0", "agpl-3.0", "odbl", "pddl", "unlicense",
    )
}  # fmt: skip


def card(name: str, path: str, spec: PotentialSpec, n_parameters: int, metrics: Mapping[str, Any]) -> str:
    """Return the card of a release as Markdown.

    Args:
        name: of the release.
        path: how the example names its folder or file.
    """
    provenance = spec.provenance
    folded = provenance.get("release", {}).get("folded")
    lines = [
        "---",
        yaml.safe_dump(front_matter(name, spec, metrics), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {name}",
        "",
        f"{_origin(provenance)} {n_parameters:,} parameters, cutoff {spec.model.backbone.cutoff:g} Å.",
        "",
        *([f"**{NOT_CONSERVATIVE.capitalize()}.**", ""] if spec.model.forces == "direct" else []),
        *(
            [f"Folded to one fidelity out of {', '.join(folded['from_fidelities'])}; it predicts what those did.", ""]
            if folded
            else []
        ),
        *_example(path, spec),
        "",
        "There is no default fidelity: say which level of theory you want. No file holds code or a pickle; "
        "`mffm inspect --check` compares every file with `manifest.json`, and predictions with the reference outputs.",
        "",
        *_fidelities(spec),
        *_errors(provenance, metrics),
        *_data(provenance),
        *_needs(spec),
        *_references(spec),
    ]
    return "\n".join(lines) + "\n"


def _origin(provenance: Mapping[str, Any]) -> str:
    """Return who trained what, in a sentence."""
    converted = provenance.get("converted")
    if converted:
        return (
            f"An interatomic potential converted from `{converted['from']}` with {converted['package']} and mffm "
            f"{provenance.get('mffm', __version__)}; it predicts what the original does."
        )
    base = provenance.get("start_from", {}).get("provenance", {}).get("converted")
    start = f", from the weights of `{base['from']}`" if base else ""
    return (
        f"An interatomic potential trained with mffm {provenance.get('mffm', __version__)} on several levels of theory "
        f"at once{start}."
    )


def _example(path: str, spec: PotentialSpec) -> list[str]:
    """Return code that runs: at a fidelity with references, for a structure of elements that have one there."""
    names = spec.fidelities.names
    fidelity = next((n for n in reversed(names) if spec.references.elements(n)), names[-1])
    elements = spec.references.elements(fidelity)
    if not elements:  # trained without energies: no structure can be calculated
        return []
    if {"C", "H", "O"} <= set(elements):
        structure = ["from ase.build import molecule", "", 'atoms = molecule("CH3CH2OH")']
    else:
        a, b = elements[0], elements[-1]
        formula = a + b if a != b else f"{a}2"
        distance = sum(covalent_radii[atomic_numbers[x]] for x in (a, b))
        structure = ["from ase import Atoms", "", f'atoms = Atoms("{formula}", [[0, 0, 0], [0, 0, {distance:.2f}]])']
    return [
        "```python",
        "from mffm.deploy.ase import Calculator",
        *structure,
        f'atoms.calc = Calculator("{path}", fidelity="{fidelity}")',
        "print(atoms.get_potential_energy(), atoms.get_forces())",
        "```",
    ]


def front_matter(name: str, spec: PotentialSpec, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return what hubs index: licence, library, tags, data sets, errors."""
    provenance = spec.provenance
    sources = licence_chain(provenance)
    licences = sorted({str(source.get("licence", "")) for source in sources})
    hub = HUB_LICENCES.get(licences[0].lower()) if len(licences) == 1 else None
    licence = {"license": hub} if hub else {"license": "other", "license_name": " and ".join(licences) or "not stated"}
    content: dict[str, Any] = {
        **licence,
        "library_name": "mffm",
        "tags": ["interatomic-potential", "materials-science", "chemistry", "multi-fidelity", *spec.fidelities.names],
    }
    results = [
        {
            "task": {"type": "interatomic-potential", "name": f"{row['property']} at {row['fidelity']}"},
            "dataset": {"name": f"{split} split of {provenance.get('store', 'the store')}", "type": "mffm-store"},
            "metrics": [{"type": "mae", "name": f"MAE, {row['unit']}", "value": float(f"{row['mae']:.4g}")}],
        }
        for split, report in metrics.items()
        for row in report["rows"]
    ]
    if results:
        content["model-index"] = [{"name": name, "results": results}]
    return content


def licence_chain(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sources that weights were trained on: their own, then those of what they were fine-tuned from."""
    sources = list(provenance.get("sources", []))
    base = provenance.get("start_from")
    if base is not None:
        sources += [s for s in licence_chain(base["provenance"]) if s not in sources]
    return sources


def _fidelities(spec: PotentialSpec) -> list[str]:
    lines = [
        "## Fidelities",
        "",
        "| fidelity | level of theory | code | training labels | elements with references |",
        "|---|---|---|---|---|",
    ]
    for fidelity in spec.fidelities:
        counts = ", ".join(f"{n:,} {prop}" for prop, n in spec.label_counts.get(fidelity.name, {}).items())
        elements = " ".join(spec.references.elements(fidelity.name)) or "none"
        lines.append(_row(fidelity.name, fidelity.level_of_theory, fidelity.code, counts, elements))
    for name, d3 in spec.model.d3.items():
        lines += [
            "",
            f"DFT-D3({d3.damping}) of {d3.functional} is a part of {name}; it needs `pip install 'mffm[d3]'`.",
        ]
    return [*lines, ""]


def _errors(provenance: Mapping[str, Any], metrics: Mapping[str, Any]) -> list[str]:
    if not metrics and "converted" in provenance:
        return []
    if not metrics:
        return ["## Errors", "", "None measured: run `mffm evaluate` on the run before the release.", ""]
    lines = ["## Errors", "", "| split | fidelity | property | MAE | RMSE | labels |", "|---|---|---|---|---|---|"]
    for split, report in metrics.items():
        for row in report["rows"]:
            mae, rmse = (f"{row[key]:.1f} {row['unit']}" for key in ("mae", "rmse"))
            lines.append(_row(split, row["fidelity"], row["property"], mae, rmse, row["n_systems"]))
    return [*lines, ""]


def _data(provenance: Mapping[str, Any]) -> list[str]:
    lines = ["## Data", "", "| source | licence | citation |", "|---|---|---|"]
    lines += [_row(s.get("name"), s.get("licence"), s.get("citation", "")) for s in licence_chain(provenance)]
    store = provenance.get("store_fingerprint")
    return [
        *lines,
        "",
        f"{f'Store fingerprint `{store}`. ' if store else ''}The weights inherit the obligations of these licences.",
        "",
    ]


def _needs(spec: PotentialSpec) -> list[str]:
    extra = {"escn": "fairchem", "sevennet": "sevennet"}.get(spec.model.backbone.kind)
    return [f"Its backbone is computed by another package: `pip install 'mffm[{extra}]'`.", ""] if extra else []


def _references(spec: PotentialSpec) -> list[str]:
    names = spec.fidelities.names
    lines = ["## Element references, eV", "", _row("element", *names), "|---|" + "---|" * len(names)]
    values = spec.references.array(names)
    elements = np.flatnonzero(~np.isnan(values).all(axis=0))
    shown = [["none" if np.isnan(v) else f"{v:.3f}" for v in values[:, z]] for z in elements]
    return lines + [_row(chemical_symbols[z], *row) for z, row in zip(elements, shown, strict=True)]


def _row(*cells: object) -> str:
    """Return a row of a table; what would end a cell or the line is taken out of it."""
    return "| " + " | ".join(" ".join(str(cell).replace("|", "/").split()) for cell in cells) + " |"
