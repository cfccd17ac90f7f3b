"""What a label costs: CPU seconds against the size of a structure, log-log, per level of theory."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mffm.data.readers.ase import structures_of
from mffm.data.store import Store
from mffm.errors import InputError, known

PREFIX = "cpu_s"  # key of the CPU seconds of a frame's label: cpu_s_<level>, or cpu_s in a file of one level
BASIS = "n_basis"  # the same for the number of basis functions, where a file says it
RECORDS = "records.jsonl"  # of ``mffm label``: an attempt a line, in a layer's folder or beside a file
MIN_LABELS = 5
TAIL = 95  # percentile that is reported beside the mean

Measure = Literal["atoms", "electrons", "basis"]


class Size(NamedTuple):
    """Of a structure; basis functions: NaN where they are not known."""

    atoms: float
    electrons: float
    basis: float = np.nan


class Measured(NamedTuple):
    """The cost of one label."""

    seconds: float
    size: Size


@dataclass(frozen=True)
class CostModel:
    """seconds = factor · size^exponent, about which the logarithms scatter with ``scatter``.

    Attributes:
        measure: what counts as the size: the one that leaves the least scatter.
        exponent: None where all labels had one size; the cost is then the same for all.
        least, most: sizes of the labels that it was fitted to.
        mean, tail: CPU seconds of a label: mean and 95th percentile over the structures that are to be labelled.
    """

    level: str
    measure: Measure
    exponent: float | None
    factor: float
    scatter: float
    n_labels: int
    least: float
    most: float
    mean: float
    tail: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def fit(level: str, labels: Sequence[Measured], to_label: Sequence[Size] | None = None) -> CostModel:
    """Fit the cost of a level, by least squares on logarithms.

    Args:
        to_label: sizes of the structures that labels are bought for; None: those of the labels.

    Raises:
        InputError: fewer than five labels; one size only, but other structures to label.
    """
    if len(labels) < MIN_LABELS:
        raise InputError(f"level {level!r}: {len(labels)} labels with a cost; it needs {MIN_LABELS}")
    logs = np.log([label.seconds for label in labels])
    chosen: tuple[float, Measure, float | None, float] | None = None
    for measure in ("basis", "electrons", "atoms"):
        sizes = np.array([getattr(label.size, measure) for label in labels])
        unknown = to_label is not None and np.isnan([getattr(size, measure) for size in to_label]).any()
        if np.isnan(sizes).any() or unknown:
            continue
        exponent, offset = _line(np.log(sizes), logs)
        residuals = logs - offset - (exponent or 0.0) * np.log(sizes)
        scatter = float(np.sqrt(np.square(residuals).sum() / max(1, len(logs) - 2)))
        if chosen is None or scatter < chosen[0] * (1 - 1e-9):
            chosen = scatter, measure, exponent, offset
    assert chosen is not None, "atoms are always known"
    scatter, measure, exponent, offset = chosen
    sizes = np.array([getattr(label.size, measure) for label in labels])
    wanted = sizes if to_label is None else np.array([getattr(size, measure) for size in to_label])
    if exponent is None and not np.allclose(wanted, sizes[0]):
        raise InputError(
            f"level {level!r}: all {len(labels)} labels with a cost have {sizes[0]:g} {measure}, so nothing says what "
            f"one of {wanted.min():g} to {wanted.max():g} costs; label some of other sizes first"
        )
    # The mean of a log-normal about the line; scatter of the labels about it goes into the tail too.
    seconds = np.exp(offset + (exponent or 0.0) * np.log(wanted))
    spread = np.exp(scatter * np.random.default_rng(0).standard_normal((len(wanted), 64)))
    return CostModel(
        level, measure, exponent, float(np.exp(offset)), scatter, len(labels), float(sizes.min()), float(sizes.max()),
        float(seconds.mean() * np.exp(scatter**2 / 2)), float(np.percentile(seconds[:, None] * spread, TAIL)),
    )  # fmt: skip


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float | None, float]:
    """Return slope and offset of y over x; no slope where all x are one."""
    if np.ptp(x) < 1e-9:
        return None, float(y.mean())
    slope, offset = np.polyfit(x, y, 1)
    return float(slope), float(offset)


def read(paths: Sequence[Path], levels: Sequence[str]) -> dict[str, list[Measured]]:
    """Return level → costs of labels that were computed.

    A file that ASE reads has ``cpu_s_<level>``, or ``cpu_s`` where one level is asked. What ``mffm label`` wrote has
    its records beside it, a store in the label layer.

    Raises:
        InputError: a level without costs; a cost of zero, which somebody rounded away.
    """
    found: dict[str, list[Measured]] = {level: [] for level in levels}
    seen: set[str] = set()
    for path in paths:
        for level, label in _of_store(path) if path.is_dir() else _of_file(path, levels):
            seen.add(level)
            if level in found:
                found[level].append(label)
    missing = [level for level, costs in found.items() if not costs]
    if missing:
        raise InputError(
            f"{', '.join(map(str, paths))}: no costs of level {missing[0]!r} ({PREFIX}_{missing[0]}); it has costs of: "
            f"{known(seen)}; label some structures at it first, and give that file too"
        )
    return found


def _of_file(path: Path, levels: Sequence[str]) -> Iterator[tuple[str, Measured]]:
    """Yield (level, cost) of a file's frames."""
    recorded: dict[Any, list[tuple[str, float]]] = {}
    records = path.with_name(f"{path.stem}.{RECORDS}")
    if records.is_file():
        for entry in _computed(records):
            recorded.setdefault(entry["frame_id"], []).append((entry["fidelity"], entry["cpu_ns"] * 1e-9))
    for index, atoms in enumerate(structures_of(path)):
        own = {key.removeprefix(f"{PREFIX}_"): value for key, value in atoms.info.items() if key.startswith(PREFIX)}
        if PREFIX in own and len(levels) == 1:
            own.setdefault(levels[0], own[PREFIX])
        for level, value in [*own.items(), *recorded.get(atoms.info.get("frame_id"), ())]:
            if level == PREFIX:
                continue
            basis: Any = atoms.info.get(f"{BASIS}_{level}", atoms.info.get(BASIS, np.nan))
            if level in levels:
                seconds = _positive(value, f"{path}: frame {index}: {PREFIX} of {level!r}")
                yield level, Measured(seconds, Size(*_size(atoms.numbers), float(basis)))
            else:
                yield level, Measured(np.nan, Size(*_size(atoms.numbers)))  # its level is named where one lacks


def _of_store(path: Path) -> Iterator[tuple[str, Measured]]:
    """Yield (level, cost) of the label layers of a store that ``mffm label`` computed."""
    store = Store(path)
    for layer in store.layers:
        records = layer.folder / RECORDS
        entries = list(_computed(records)) if records.is_file() else []
        sizes = _of_rows(store, np.array([entry["index"] for entry in entries], np.int64))
        for entry, size in zip(entries, sizes, strict=True):
            seconds = _positive(entry["cpu_ns"] * 1e-9, f"{records}: {entry['frame_id']}: cpu_ns")
            yield entry["fidelity"], Measured(seconds, size)


def _computed(records: Path) -> Iterator[dict[str, Any]]:
    """Yield the attempts of a file of ``mffm label`` that gave a label."""
    with records.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                entry = json.loads(line)
                if entry["status"] == "ok" and entry["cpu_ns"] is not None:
                    yield {**entry, "cpu_ns": float(entry["cpu_ns"])}
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{records}: line {number} is no record of mffm label ({error})") from error


def sizes_of(paths: Sequence[Path]) -> list[Size]:
    """Return the sizes of the structures of stores and files.

    Raises:
        InputError: nothing there, or no structures in it.
    """
    found: list[Size] = []
    for path in paths:
        if path.is_dir():
            store = Store(path)
            found += _of_rows(store, np.arange(store.n_frames))
        else:
            found += [Size(*_size(atoms.numbers)) for atoms in structures_of(path)]
    if not found:
        raise InputError(f"{', '.join(map(str, paths))}: no structures in it; nothing to label")
    return found


def _of_rows(store: Store, rows: np.ndarray) -> list[Size]:
    counts = store.composition(rows)
    electrons = counts @ np.arange(counts.shape[1])
    return [Size(float(n), float(z)) for n, z in zip(counts.sum(1), electrons, strict=True)]


def _size(numbers: np.ndarray) -> tuple[float, float]:
    return float(len(numbers)), float(numbers.sum())


def _positive(value: Any, place: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = np.nan
    if not (np.isfinite(seconds) and seconds > 0):
        raise InputError(
            f"{place} is {value}: expected positive CPU seconds; a zero was rounded away: label again with a code "
            "that keeps nanoseconds, or remove the key from the frame"
        )
    return seconds
