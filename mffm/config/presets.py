"""Presets: the layout of a published set, by name. A source of a data YAML takes from one what it does not say itself.

A preset is a YAML in ``mffm/config/presets`` with ``fidelities`` (what its labels are; none where that is the user's
to say), ``source`` (a source without ``name`` and ``path``) and, for its user, ``about``, ``confirmed`` (against what
the layout was checked) and ``from_memory`` (what was not).
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from mffm.config.base import read_yaml
from mffm.errors import known

FOLDER = Path(__file__).parent / "presets"


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


@lru_cache
def preset(name: str) -> dict[str, Any]:
    """Return a preset's content.

    Raises:
        ValueError: no preset has this name; the message lists the known ones.
    """
    if name not in names():
        raise ValueError(f"unknown preset {name!r}; known presets: {known(names())}")
    return read_yaml(FOLDER / f"{name}.yaml")


def fill(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source with what its preset says added, key by key; what the source says wins, null takes a key out.

    Raises:
        ValueError: no such preset; or ``fidelity`` is to rename one of several.
    """
    base = dict(preset(str(source["preset"]))["source"])
    if source.get("fidelity") is not None:
        if len(base["labels"]) > 1:
            raise ValueError(
                f"preset {source['preset']!r} labels {known(base['labels'])}: `fidelity` names the one of a preset "
                "that has one; give `labels`"
            )
        base["labels"] = {str(source["fidelity"]): labels for labels in base["labels"].values()}
    return _merged(base, source)


def declare(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a data YAML with the fidelities that its presets label and that it does not declare itself.

    Raises:
        ValueError: two presets give one name to different levels of theory.
    """
    content = dict(content)
    sources = [s for s in content.get("sources") or () if isinstance(s, Mapping) and s.get("preset") is not None]
    if not sources or not isinstance(content.get("fidelities", {}), Mapping | None):
        return content
    given = content.get("fidelities") or {}
    declared: dict[str, Any] = {}
    for source in sources:
        described = dict(preset(str(source["preset"])).get("fidelities") or {})
        if source.get("fidelity") is not None and len(described) == 1:
            described = {str(source["fidelity"]): about for about in described.values()}
        labels = fill(source).get("labels")
        for name in labels if isinstance(labels, Mapping) else ():
            if name in given or name not in described:
                continue
            if declared.setdefault(name, described[name]) != described[name]:
                raise ValueError(f"presets describe the fidelity {name!r} differently; declare it under fidelities")
    content["fidelities"] = {**given, **declared}
    return content


def _merged(base: Any, given: Any) -> Any:
    if not (isinstance(base, Mapping) and isinstance(given, Mapping)):
        return given
    keys = [*base, *(key for key in given if key not in base)]
    merged = {key: _merged(base[key], given[key]) if key in base and key in given else
              given.get(key, base.get(key)) for key in keys}  # fmt: skip
    return {key: value for key, value in merged.items() if not (key in given and given[key] is None)}
