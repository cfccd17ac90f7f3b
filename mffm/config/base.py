"""The base of every schema: strict pydantic models filled from YAML, with dotted overrides."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from mffm.errors import InputError, known


class Schema(BaseModel):
    """A typed part of a configuration: unknown keys are errors, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


S = TypeVar("S", bound=Schema)


def read_yaml(path: Path | str) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        InputError: no such file, not YAML, or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        found = "an empty file" if content is None else type(content).__name__
        raise InputError(f"{path}: expected a mapping of keys to values, found {found}")
    return content


def apply_overrides(content: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return a copy of ``content`` with dotted overrides such as ``train.steps=2000`` or ``data.pools.0.weight=2``.

    Values are read as YAML, so ``null``, numbers, lists and strings have their usual meaning.
    """
    content = yaml.safe_load(yaml.safe_dump(content))
    for override in overrides:
        name, sep, value = override.partition("=")
        if not sep or not name:
            raise InputError(f"override {override!r}: expected key.key=value")
        *parents, last = name.strip().split(".")
        node: Any = content
        for depth, key in enumerate(parents):
            place = ".".join(parents[: depth + 1])
            if isinstance(node, list):
                node = node[_list_index(node, key, override)]
            elif isinstance(node, dict):
                if node.get(key) is None:
                    node[key] = {}
                node = node[key]
            if not isinstance(node, dict | list):
                raise InputError(f"override {override!r}: {place} is {node!r}, not a group of keys")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"override {override!r}: the value is not valid YAML") from error
        if isinstance(node, list):
            node[_list_index(node, last, override)] = parsed
        else:
            node[last] = parsed
    return content


def as_overrides(values: Mapping[str, Any]) -> list[str]:
    """Return dotted name → value as overrides; written by yaml, so that 1e-05 is read as a number again."""
    texts = {n: yaml.safe_dump(v, default_flow_style=True, width=10**6) for n, v in values.items()}
    return [f"{name}={text.strip().removesuffix('...').strip()}" for name, text in texts.items()]


def _list_index(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise InputError(f"override {override!r}: {key!r} is not an index into a list of {len(node)}")
    return int(key)


def validate(schema: type[S], content: Mapping[str, Any], place: str) -> S:
    """Return ``content`` as a ``schema``; every fault is listed with its key, its value and what was expected.

    Raises:
        InputError: one message that names every fault.
    """
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        lines = []
        for fault in error.errors():
            loc = ".".join(str(part) for part in fault["loc"]) or "(top level)"
            if fault["type"] == "extra_forbidden":
                siblings = _known_keys(schema, fault["loc"])
                lines.append(f"  {loc}: unknown key{f'; known keys here: {known(siblings)}' if siblings else ''}")
            elif fault["type"] == "missing":
                lines.append(f"  {loc}: required and not given")
            else:
                message = fault["msg"].removeprefix("Value error, ")
                shown = repr(fault["input"])
                lines.append(f"  {loc}: {message}" + (f" (found {shown})" if len(shown) < 80 else ""))
        raise InputError(f"{place}: {len(lines)} fault(s) in the configuration\n" + "\n".join(lines)) from error


def _known_keys(schema: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the schema at ``loc[:-1]`` knows; empty where it cannot be told."""
    current: Any = schema
    union: list[type[BaseModel]] = []
    for part in loc[:-1]:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            union = _schemas_in(current.model_fields[str(part)].annotation)
            current = union[0] if union else None
        elif tagged := [m for m in union if m.model_fields.get("kind") and part in _values(m, "kind")]:
            current = tagged[0]
        elif not (isinstance(part, int) or current is not None):
            return []
    return list(current.model_fields) if isinstance(current, type) and issubclass(current, BaseModel) else []


def _values(schema: type[BaseModel], key: str) -> tuple[Any, ...]:
    return getattr(schema.model_fields[key].annotation, "__args__", ())


def _schemas_in(annotation: Any) -> list[type[BaseModel]]:
    """Return the schemas in an annotation: several of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [schema for arg in getattr(annotation, "__args__", ()) for schema in _schemas_in(arg)]


def load(schema: type[S], path: Path | str, overrides: Sequence[str] = ()) -> S:
    """Return a YAML file, with overrides applied, as a ``schema``."""
    return validate(schema, apply_overrides(read_yaml(path), overrides), str(path))


def origins(config: Schema, content: Mapping[str, Any], overrides: Sequence[str]) -> list[tuple[str, Any, str]]:
    """Return every value of a configuration with its dotted name and where it came from.

    Args:
        content: what the YAML file gave.
        overrides: as for ``apply_overrides``.

    Returns:
        (name, value, "command line", "file" or "default"), in the schema's order.
    """
    given = {name for name, _ in _leaves(content)}
    overridden = [o.partition("=")[0].strip() for o in overrides]
    rows = []
    for name, value in _leaves(config.model_dump(mode="json")):
        if any(name == o or name.startswith(o + ".") for o in overridden):
            origin = "command line"
        else:
            origin = "file" if name in given else "default"
        rows.append((name, value, origin))
    return rows


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(node, Mapping):
        items = ((str(k), v) for k, v in node.items())
    elif isinstance(node, list) and any(isinstance(v, Mapping) for v in node):
        items = ((str(k), v) for k, v in enumerate(node))
    empty = True
    for key, value in items:
        empty = False
        yield from _leaves(value, f"{prefix}.{key}" if prefix else key)
    if empty and prefix:
        yield prefix, node


def dump(config: Schema) -> str:
    """Return the resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
