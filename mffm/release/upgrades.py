"""Numbered upgrades of the format: step N turns the JSON files of version N into those of version N + 1.

1  One set of weights with its SHA-256 in config.json; references and label counts in tables of their own.
2  manifest.json with the SHA-256 of every file; fidelities.json holds one object per fidelity; what belongs to the
   release itself is gathered in provenance.json's "release"; outputs.json.

A version is never read by code of its own: it is upgraded, then read. A step stays here for ever, with a release of its
version in tests/golden.
"""

from collections.abc import Callable, Mapping
from typing import Any

from mffm import __version__
from mffm.errors import InputError

FORMAT_VERSION = 2

Documents = dict[str, dict[str, Any]]  # name of the JSON file → its content


def _from_1(documents: Documents) -> Documents:
    config, fidelities = dict(documents["config.json"]), documents["fidelities.json"]
    config.pop("weights_sha256", None)
    references = fidelities["references"]
    merged = [
        {
            **fidelity,
            "references": references["references"][fidelity["name"]],
            "references_report": references["report"].get(fidelity["name"], {}),
            "label_counts": fidelities["label_counts"].get(fidelity["name"], {}),
        }
        for fidelity in fidelities["fidelities"]
    ]
    provenance = dict(documents["provenance.json"])
    release = {
        "from": provenance.pop("released_from", None),
        "weights": provenance.pop("weights", None),
        "training_log_sha256": (provenance.pop("training", None) or {}).get("metrics_sha256"),
    }
    if any(value is not None for value in release.values()):
        provenance["release"] = release
    return {
        **documents,
        "config.json": {**config, "format_version": 2},
        "fidelities.json": {"fidelities": merged},
        "provenance.json": provenance,
    }


UPGRADES: Mapping[int, Callable[[Documents], Documents]] = {1: _from_1}


def checked_version(version: object, place: str) -> int:
    """Return a format version that this mffm reads.

    Raises:
        InputError: newer, or no version at all.
    """
    if isinstance(version, int) and not isinstance(version, bool) and 1 <= version <= FORMAT_VERSION:
        return version
    newer = isinstance(version, int) and version > FORMAT_VERSION
    raise InputError(
        f"{place}: format version {version!r}; this mffm {__version__} reads versions 1 to {FORMAT_VERSION}"
        + ("; install a newer mffm" if newer else "; the file is damaged, copy it again")
    )


def upgraded(documents: Documents, version: int, place: str) -> Documents:
    """Return the JSON files of a version as those of the present one.

    Raises:
        InputError: a file lacks what its version has.
    """
    try:
        for step in range(version, FORMAT_VERSION):
            documents = UPGRADES[step](documents)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{place}: lacks what format version {version} has ({error!r}); copy it again") from error
    return documents
