"""What a potential is but for its weights, and the JSON files that say it."""

import hashlib
import platform
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mffm
from mffm.config.base import validate
from mffm.config.model import ModelConfig
from mffm.data.references import ElementReferences
from mffm.errors import InputError
from mffm.fidelity import FidelityTable
from mffm.models.potential import Potential
from mffm.release.files import read_json, write_json
from mffm.release.upgrades import FORMAT_VERSION, Documents, checked_version, upgraded

SPEC_FILES = ("config.json", "fidelities.json", "provenance.json")
_OF_FIDELITY = ("name", "level_of_theory", "code", "settings")


@dataclass
class PotentialSpec:
    """All of a potential but its weights."""

    model: ModelConfig
    fidelities: FidelityTable
    references: ElementReferences
    avg_neighbors: float
    scale: float
    label_counts: dict[str, dict[str, int]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def build(self) -> Potential:
        """Return the potential with fresh weights."""
        return Potential(self.model, self.fidelities.names, avg_neighbors=self.avg_neighbors, scale=self.scale)

    def reference_table(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the element references, NaN where a fidelity has none. [n_fidelities, N_ELEMENTS + 1] float64, eV"""
        return torch.as_tensor(self.references.array(self.fidelities.names), dtype=torch.float64, device=device)

    def documents(self) -> Documents:
        """Return the JSON files, by name."""
        content = self.references.to_dict()
        fidelities = [
            {
                **row,
                "references": content["references"][row["name"]],
                "references_report": content["report"].get(row["name"], {}),
                "label_counts": self.label_counts.get(row["name"], {}),
            }
            for row in self.fidelities.to_list()
        ]
        return {
            "config.json": {
                "format_version": FORMAT_VERSION,
                "model": self.model.model_dump(mode="json"),
                "avg_neighbors": self.avg_neighbors,
                "scale": self.scale,
            },
            "fidelities.json": {"fidelities": fidelities},
            "provenance.json": self.provenance,
        }

    def write(self, folder: Path) -> None:
        """Write the JSON files."""
        for name, content in self.documents().items():
            write_json(folder / name, content)

    @classmethod
    def read(cls, folder: Path) -> "PotentialSpec":
        """Return the potential described in a run's ``potential`` folder.

        Raises:
            InputError: a file is missing, damaged, or written by a newer version.
        """
        documents = {name: read_json(folder / name) for name in SPEC_FILES}
        version = checked_version(documents["config.json"].get("format_version"), str(folder / "config.json"))
        return cls.from_documents(upgraded(documents, version, str(folder)), str(folder))

    @classmethod
    def from_documents(cls, documents: Documents, place: str) -> "PotentialSpec":
        """Return what ``documents`` gave.

        Raises:
            InputError: something is missing, or is not what it should be.
        """
        config, rows = documents["config.json"], documents["fidelities.json"].get("fidelities")
        try:
            model = validate(ModelConfig, config["model"], f"{place}: config.json")
            names = [row["name"] for row in rows or []]
            if len(set(names)) != len(names) or not names:
                raise ValueError("no fidelity, or one twice")
            return cls(
                model=model,
                fidelities=FidelityTable.from_list({key: row[key] for key in _OF_FIDELITY} for row in rows or []),
                references=ElementReferences.from_dict(
                    {
                        "references": {row["name"]: row["references"] for row in rows or []},
                        "report": {row["name"]: row["references_report"] for row in rows or []},
                    }
                ),
                avg_neighbors=float(config["avg_neighbors"]),
                scale=float(config["scale"]),
                label_counts={row["name"]: dict(row["label_counts"]) for row in rows or []},
                provenance=documents["provenance.json"],
            )
        except InputError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(
                f"{place}: config.json or fidelities.json lacks what it should have ({error!r}); it is damaged, "
                "copy it again"
            ) from error


def code_version() -> dict[str, str]:
    """Return the versions that a provenance records, and the digest of mffm's own source files."""
    return {
        "mffm": mffm.__version__,
        "mffm_source_sha256": _source_digest(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@cache
def _source_digest() -> str:
    """Return the SHA-256 over names and contents of mffm's modules: tells code apart whether or not it is in git."""
    root, digest = Path(mffm.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
