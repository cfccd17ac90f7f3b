"""What a submission to Matbench Discovery has: prediction CSV, geometry JSONL, κ JSON and the model's YAML."""

import csv
import gzip
import hashlib
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mffm.errors import InputError, known

# tests/model-schema.yml at 2c7f9fc
REQUIRED = (
    "authors", "architecture_types", "environment", "checkpoint_url", "dates", "doi", "license", "lifecycle",
    "model_key", "model_name", "model_params", "model_version", "openness", "paper", "pr_url", "repo",
    "targets", "test_task", "train_task", "training_sets",
)  # fmt: skip
OPTIONAL = (
    "superseded_by", "trained_by", "docs", "pypi", "size", "fine_tune", "hyperparams", "notes", "n_estimators",
    "training_cost",
)  # fmt: skip
TARGETS_WITH_FORCES = "EFS_G"  # energy, forces, stress by gradient; direct heads are EFS_D


def write_gzip(path: Path, text: str) -> None:
    """Write text compressed, aside and renamed; the same text gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    aside.write_bytes(gzip.compress(text.encode(), mtime=0))
    os.replace(aside, path)


def write_predictions(path: Path, e_form: Mapping[str, float | None]) -> None:
    """Write ``material_id,e_form_per_atom`` (eV/atom, 4 decimals); a missing prediction has an empty field."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("material_id", "e_form_per_atom"))
    for i, value in e_form.items():
        rows.writerow((i, "" if value is None or math.isnan(value) else f"{value:.4f}"))
    write_gzip(path, text.getvalue())


def read_predictions(path: Path) -> dict[str, float]:
    """Return id → formation energy, eV/atom, of a prediction file; NaN where the field is empty.

    The column is ``e_form_per_atom`` or, in older files, the last one whose name starts so.
    """
    with gzip.open(path, "rt") as file:
        rows = csv.reader(file)
        header = next(rows)
        columns = [k for k, name in enumerate(header) if name.startswith("e_form_per_atom")]
        if header[0] != "material_id" or not columns:
            raise InputError(f"{path}: columns {known(header)}; expected material_id and e_form_per_atom")
        return {row[0]: float(row[columns[-1]] or "nan") for row in rows}


def write_geometries(path: Path, relaxed: Sequence[Mapping[str, Any]]) -> None:
    """Write one JSON object a line: material_id, structure (pymatgen dict), energy (eV), converged, n_steps."""
    keys = ("material_id", "structure", "energy", "converged", "n_steps")
    write_gzip(path, "".join(json.dumps({k: r[k] for k in keys}, allow_nan=False) + "\n" for r in relaxed))


def write_kappa(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Write the records of all materials, failures included, as one JSON list."""
    write_gzip(path, json.dumps(list(records), allow_nan=False))


def file_entry(path: Path, root: Path) -> dict[str, Any]:
    """Return name, size and md5 of an artefact as the YAML has it; ``url`` is added when it is uploaded."""
    content = path.read_bytes()
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    return {"name": str(path.relative_to(root)), "size": len(content), "md5": digest}


def model_yaml(
    submission: Mapping[str, Any], metrics: Mapping[str, Any], evaluation: Mapping[str, Any]
) -> tuple[str, list[str]]:
    """Return the model's YAML and the required keys that are not filled in yet.

    Args:
        submission: what only the authors know: names, licence, links, training sets.
        metrics: ``discovery``, ``geo_opt``, ``phonons`` as the schema has them.
        evaluation: relaxation settings, and ``kappa`` with its protocol.

    Raises:
        InputError: a key that the suite's schema does not have.
    """
    unknown = set(submission) - set(REQUIRED) - set(OPTIONAL)
    if unknown:
        raise InputError(f"submission: keys {known(unknown)} are not in the suite's schema; known: {known(REQUIRED)}")
    filled: dict[str, Any] = {
        "lifecycle": "active",
        "architecture_types": ["gnn"],
        "train_task": "S2EFS",
        "test_task": "IS2RE-SR",
        "targets": TARGETS_WITH_FORCES,
        **submission,
    }
    filled["hyperparams"] = {**filled.get("hyperparams", {}), "evaluation": dict(evaluation)}
    missing = [k for k in REQUIRED if k not in filled]
    ordered = {k: filled[k] for k in (*REQUIRED, *OPTIONAL) if k in filled}
    ordered["metrics"] = metrics
    head = f"# to be filled in before it is submitted: {', '.join(missing)}\n" if missing else ""
    return head + yaml.safe_dump(ordered, sort_keys=False, allow_unicode=True), missing


def rounded(metrics: Mapping[str, float | None], digits: int) -> dict[str, float | int | None]:
    """Return metrics as they are published: counts as they are, the others rounded."""
    return {k: v if v is None or isinstance(v, int) else round(float(v), digits) for k, v in metrics.items()}
