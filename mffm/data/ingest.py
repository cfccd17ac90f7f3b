"""Ingest: source files → a store, streamed, in parallel, resumable, every frame checked."""

import hashlib
import json
import os
import pickle
import re
import time
from collections.abc import Iterator
from difflib import get_close_matches
from glob import glob
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, NamedTuple

from mffm.config.data import DataConfig, SourceSpec, SplitSpec
from mffm.data import parts, records
from mffm.data.checks import frame_fault
from mffm.data.edges import count_edges
from mffm.data.finish import Contents, finish
from mffm.data.identity import geometry_hash, lookup_keys
from mffm.data.parts import Extent
from mffm.data.readers import READERS, reader_name, wanted
from mffm.data.readers.chunk import Chunk
from mffm.data.readers.convert import RejectedFrame, Wanted
from mffm.data.report import IngestReport, count_reason, finish_report, saved_report
from mffm.data.splits import Splitter
from mffm.data.staging import Item, Staging, new_state, open_or_explain
from mffm.data.store import NO_CHARGE, Store
from mffm.data.workers import Call, Meter, Workers
from mffm.errors import InputError, known
from mffm.fidelity import Fidelity, FidelityTable

_MOST_KEYS = 500  # names of values kept per source, for messages
COMMIT_FRAMES = 4096  # a kill loses at most this many frames' work
# Up to these sizes a file is read by the worker that processes it, of larger ones the chunks are dealt out. Lines of
# text are cheap to deal out; what a format decodes while it reads is not, but a kill loses what was read of a file.
_WHOLE_TEXT_BYTES = 1 << 24
_WHOLE_FILE_BYTES = 1 << 30


class Work(NamedTuple):
    """One file to be read."""

    source: int
    path: Path
    reader: str


class Settings(NamedTuple):
    """What a worker needs besides the chunk; the same for all chunks of a source."""

    reader: str
    want: Wanted
    fidelities: tuple[str, ...]
    min_distance: float
    cutoffs: tuple[float, ...] = ()  # Å, that edges are counted for


def source_files(source: SourceSpec, base: Path) -> list[Path]:
    """Return the files of a source, globs sorted.

    Raises:
        InputError: no such file, an empty glob, or an environment variable that is not set.
    """
    files: list[Path] = []
    for pattern in [source.path] if isinstance(source.path, str) else source.path:
        expanded = os.path.expandvars(pattern)
        unset = re.search(r"\$\{?(\w+)", expanded)
        if unset:
            raise InputError(f"source {source.name!r}: {pattern}: the environment variable {unset[1]} is not set")
        path = str(base / Path(expanded).expanduser())
        found = sorted(glob(path, recursive=True)) if any(c in path for c in "*?[") else [path]
        folders = [f for f in found if Path(f).is_dir()]
        if source.files is not None:
            found += sorted(str(f) for folder in folders for f in Path(folder).glob(source.files))
        found = [f for f in found if Path(f).is_file()]
        if not found and folders:
            raise InputError(
                f"source {source.name!r}: {folders[0]}: is a folder; name its files, e.g. {Path(pattern) / '*.extxyz'}"
                if source.files is None
                else f"source {source.name!r}: {folders[0]}: has no file {source.files}; correct `path` or `files`"
            )
        if not found:
            raise InputError(f"source {source.name!r}: {path}: no such file; correct `path` in the data YAML")
        files += [Path(f) for f in found]
    return files


def _file_digest(path: Path) -> str:
    """Return a hash of a file: of everything up to 64 MiB, of 64 blocks spread over it beyond (reading TBs takes
    hours).
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    block = 1 << 20
    with path.open("rb") as file:
        if size <= 64 * block:
            digest.update(file.read())
        else:
            for i in range(64):
                file.seek((size - block) * i // 63)
                digest.update(file.read(block))
    return digest.hexdigest()


def _config_hash(config: DataConfig, work: list[Work]) -> str:
    """Return a hash of what decides the store's content, the order of fidelities and splits too; speed and edge
    counts do not.
    """
    content = config.model_dump(mode="json", exclude={"store", "workers", "cutoffs"})
    files = [[w.source, w.path.name, _file_digest(w.path), *map(_file_digest, READERS[w.reader].companions(w.path))]
             for w in work]  # fmt: skip
    return hashlib.sha256(json.dumps([content, files]).encode()).hexdigest()


def process(chunk: Chunk, settings: Settings) -> tuple[list[Item | RejectedFrame], set[str]]:
    """Parse, check and pack the frames of a chunk; runs in any process."""
    parsed = READERS[settings.reader].parse(chunk, settings.want)
    number = {name: k for k, name in enumerate(settings.fidelities)}
    items: list[Item | RejectedFrame] = []
    for i, frame in enumerate(parsed.frames):
        if isinstance(frame, RejectedFrame):
            items.append(frame)
            continue
        fault = frame_fault(frame, settings.min_distance)
        if fault:
            items.append(RejectedFrame(chunk.path, chunk.first + i, fault, settings.want.source))
            continue
        geometry = (frame.atomic_numbers, frame.positions, frame.cell, frame.pbc)
        name = geometry_hash(*geometry, charge=frame.charge)
        frame_id = frame.frame_id or name.hex()
        labels = records.pack_labels({(number[f], p): v for (f, p), v in frame.labels.items()}, frame.n_atoms)
        items.append(
            Item(
                number=chunk.first + i,
                record=records.pack_geometry(*geometry, frame_id, frame.magnetic_moments),
                n_atoms=frame.n_atoms,
                frame_id=frame_id,
                key=frame.frame_id,
                group=frame.group,
                split=frame.split,
                charge=NO_CHARGE if frame.charge is None else frame.charge,
                spin=frame.spin_multiplicity or 0,
                weight=frame.weight,
                geometry_hash=name,
                lookup=lookup_keys(*geometry),
                labels=labels,
                present=records.LABEL_HEADER.unpack_from(labels)[2],
                edges=_edges(geometry, settings.cutoffs),
            )
        )
    return items, parsed.keys


def _edges(geometry: records.Geometry, cutoffs: tuple[float, ...]) -> tuple[int, ...]:
    if not cutoffs:
        return ()
    from mffm.data.neighbors import count

    _, positions, cell, pbc = geometry
    return tuple(count(positions, cell, pbc, cutoff) for cutoff in cutoffs)


# Of consecutive chunks: their items, or where these lie pickled, and the keys that were seen.
Staged = list[tuple[Chunk, list[Item | RejectedFrame] | Extent, set[str]]]


def stage_chunk(chunk: Chunk, settings: Settings, folder: Path) -> Staged:
    """Process a chunk and put its records into a part file of ``folder``; runs in any process."""
    items, keys = process(chunk, settings)
    frames = [item for item in items if isinstance(item, Item)]
    payloads = [record for item in frames for record in (item.record, item.labels) if isinstance(record, bytes)]
    assert len(payloads) == 2 * len(frames)
    extents = iter(parts.append(folder, payloads)) if payloads else iter(())
    staged = [
        item._replace(record=next(extents), labels=next(extents)) if isinstance(item, Item) else item for item in items
    ]
    return [(chunk._replace(payload=None), staged, keys)]


def stage_file(path: Path, start: int, first: int, settings: Settings, folder: Path) -> Staged:
    """Read and process a file, or what is left of it; runs in any process.

    The items lie in the part file too: those of a file would fill the memory of the process that waits for them.
    """
    staged: Staged = []
    for chunk in READERS[settings.reader].chunks(path, settings.want, start, first):
        ((read, items, keys),) = stage_chunk(chunk, settings, folder)
        (extent,) = parts.append(folder, [pickle.dumps(items)])
        staged.append((read, extent, keys))
    return staged


def ingest(config: DataConfig, base: Path, store: Path | None = None, progress: bool = True) -> IngestReport:
    """Read, check and store every frame of the sources.

    Running it again after it was killed goes on where it stopped and ends with the same fingerprint; running it again
    when it is complete does nothing.

    Args:
        config: the data YAML.
        base: folder that relative source paths start from (the folder of the YAML).
        store: folder of the store instead of ``config.store``.
        progress: show a bar, or lines where the output is not a terminal.

    Raises:
        InputError: a source that cannot be read or has no such label, another store in the folder, a full disk.
    """
    folder = Path(store if store is not None else config.store)
    with records.disk_errors_explained(folder):
        return _ingest(config, Path(base), folder, progress)


def _ingest(config: DataConfig, base: Path, folder: Path, progress: bool) -> IngestReport:
    started = time.monotonic()
    work = [
        Work(k, path, reader_name(path, source.reader))
        for k, source in enumerate(config.sources)
        for path in source_files(source, base)
    ]
    settings = [
        Settings(
            w.reader,
            wanted(config.sources[w.source], config.splits.key),
            fidelities_of(config, w.source),
            config.min_distance,
        )
        for w in work
    ]
    config_hash = _config_hash(config, work)
    if (folder / "manifest.json").is_file() and not (folder / "staging.lmdb").is_file():
        existing = Store(folder)
        if existing.manifest["config_hash"] != config_hash:
            raise InputError(
                f"{folder}: holds a store of another data YAML or of other source files; "
                "name another `store`, or delete the folder and ingest again"
            )
        count_missing(existing, config)
        return saved_report(existing)
    _refuse_foreign_files(folder)
    layers = [list(fidelities_of(config, k)) for k in range(len(config.sources))]
    with (
        Workers(config.workers) as workers,
        open_or_explain(folder, config.shard_frames, layers, _new_state(config, config_hash), workers) as staging,
    ):
        if staging.state["config_hash"] != config_hash:
            raise InputError(
                f"{folder}: holds an unfinished ingest of another data YAML or of other source files; "
                "name another `store`, or delete the folder and ingest again"
            )
        # An ingest that goes on counts what it began with; what else is wanted is counted at the end.
        settings = [s._replace(cutoffs=tuple(staging.state["cutoffs"])) for s in settings]
        try:
            _read_sources(staging, config, work, settings, workers, progress)
        except InputError:  # these sources with this YAML can never be finished
            staging.discard()
            raise
        sources = [{"name": s.name, "licence": s.licence, "citation": s.citation} for s in config.sources]
        contents = Contents(folder.name, fidelity_table(config), sources, config.shard_frames)
        finish(staging, contents, [(s.name, s.name) for s in config.sources], config_hash, workers, progress)
        rejected = list(islice(staging.rejected(), 20))
        result = Store(folder)
        count_missing(result, config)
        report = finish_report(result, config, staging.state, rejected, time.monotonic() - started)
    staging.remove_working_files()
    return report


def _refuse_foreign_files(folder: Path) -> None:
    """A new store gets a folder of its own: what cannot be finished is removed from it again."""
    if (folder / "staging.lmdb").is_file() or not folder.is_dir():
        return
    for path in folder.iterdir():
        begun = path.is_dir() and path.name in ("geometry", "staging") and not any(path.iterdir())
        if path.name != "ingest.lock" and not begun:
            raise InputError(f"{folder}: is not empty ({path.name}) and holds no store; name a new or an empty folder")


def count_missing(store: Store, config: DataConfig) -> None:
    """Count edges for the cutoffs asked for that were not counted yet."""
    for cutoff in config.cutoffs:
        if not (store.path / "edges" / f"cutoff-{cutoff:g}.json").is_file():
            count_edges(store.path, cutoff, config.workers)


def fidelities_of(config: DataConfig, source: int) -> tuple[str, ...]:
    """Return the fidelities that a source labels, in the order of the data YAML."""
    labelled = config.sources[source].labels
    names = tuple(name for name in config.fidelities if name in labelled)
    if len(names) > records.MAX_FIDELITIES:
        raise InputError(
            f"source {config.sources[source].name!r}: {len(names)} fidelities; "
            f"a source may label {records.MAX_FIDELITIES}: split it into two sources"
        )
    return names


def _new_state(config: DataConfig, config_hash: str) -> dict[str, Any]:
    return {
        **new_state(config_hash, config.cutoffs, len(config.sources)),
        "file": 0,  # index into the list of files
        "position": 0,  # where to go on in it
        "frame": 0,  # index of the frame there
        "empty_group": 0,
        "source_frames": [0] * len(config.sources),
        "source_keys": [[] for _ in config.sources],
        "label_counts": [{} for _ in config.sources],
        "reading_done": False,
    }


def _calls(
    state: dict[str, Any], work: list[Work], settings: list[Settings], folder: Path, whole: bool
) -> Iterator[Call]:
    """Yield what is left to be read, in order, tagged with the index of the file."""
    for k in range(state["file"], len(work)):
        path = work[k].path
        start, first = (state["position"], state["frame"]) if k == state["file"] else (0, 0)
        text = work[k].reader == "extxyz" and path.suffix != ".gz"
        if whole and path.stat().st_size <= (_WHOLE_TEXT_BYTES if text else _WHOLE_FILE_BYTES):
            yield k, stage_file, (path, start, first, settings[k], folder)
            continue
        for chunk in READERS[work[k].reader].chunks(path, settings[k].want, start, first):
            yield k, stage_chunk, (chunk, settings[k], folder)


def _read_sources(
    staging: Staging, config: DataConfig, work: list[Work], settings: list[Settings], workers: Workers, progress: bool
) -> None:
    """Bring every frame of every file into the working file, from where an earlier run stopped."""
    state = staging.state
    if state["reading_done"]:
        return
    splitter = Splitter(config.splits, state["split_names"])
    before = [0, *accumulate(w.path.stat().st_size for w in work)]  # bytes before each file
    meter = Meter(before[-1], progress)
    since_commit = 0

    def begin(k: int) -> None:
        for ended in range(state["file"] + 1, k + 1):
            _end_source(staging, config, work, ended)
            state.update(file=ended, position=0, frame=0)

    calls = _calls(dict(state), work, settings, staging.parts, whole=workers.workers > 1)
    with meter:
        for k, staged in workers.in_order(calls):
            begin(k)
            for chunk, items, keys in staged:
                known_keys = state["source_keys"][work[k].source]
                known_keys += sorted(keys.difference(known_keys))[: _MOST_KEYS - len(known_keys)]
                for item in pickle.loads(staging.bytes_of(items)) if isinstance(items, Extent) else items:
                    _take(staging, item, config, work[k], splitter)
                state["source_frames"][work[k].source] += chunk.n
                state.update(position=chunk.next_position, frame=chunk.first + chunk.n)
                since_commit += chunk.n
                if since_commit >= COMMIT_FRAMES:
                    staging.commit()
                    since_commit = 0
                meter.update(before[k] + (chunk.next_position if work[k].reader == "extxyz" else 0), state)
        begin(len(work) - 1)
        _end_source(staging, config, work, len(work))
    if state["n_rows"] == 0:
        staging.commit()
        first = next(staging.rejected())
        raise InputError(
            f"no usable frame, {state['n_rejected']} rejected; "
            f"the first: {first['file']}:{first['index']}: {first['reason']}"
        )
    staging.commit()
    _require_groups(config.splits, staging.group_names())
    state["reading_done"] = True
    staging.commit()


def _end_source(staging: Staging, config: DataConfig, work: list[Work], k: int) -> None:
    """After the last file of a source: every label that was asked for must have occurred.

    Raises:
        InputError: an empty source, or a key that no frame has; the message lists the keys that the files have.
    """
    state = staging.state
    source = work[k - 1].source
    if k < len(work) and work[k].source == source:
        return
    spec = config.sources[source]
    files = ", ".join(str(w.path) for w in work if w.source == source)
    if state["source_frames"][source] == 0:
        raise InputError(f"{files}: no frames; the source {spec.name!r} is empty: correct `path`, or leave it out")
    keys = state["source_keys"][source]
    for name in ("frame_key", "group_key", "charge_key", "spin_multiplicity_key", "magnetic_moments_key", "weight_key"):
        key = getattr(spec, name)
        if key is not None and key not in keys and len(keys) < _MOST_KEYS and (name, key) != ("group_key", "formula"):
            raise InputError(
                f"{files}: no frame has the key {key!r} ({name} of source {spec.name!r}); "
                f"{_found(staging, source, config)}"
            )
    if k == len(work) and config.splits.key is not None:
        every = {key for found in state["source_keys"] for key in found}
        if config.splits.key not in every and len(every) < _MOST_KEYS:
            raise InputError(f"no frame of any source has splits.key {config.splits.key!r}; keys found: {known(every)}")
    for fidelity, properties in spec.labels.items():
        for prop in properties:
            key = spec.label(fidelity, prop).key
            if key not in keys and not state["label_counts"][source].get(f"{fidelity} {prop}"):
                raise InputError(
                    f"{files}: no frame has the key {key!r} (labels.{fidelity}.{prop} of source {spec.name!r}); "
                    f"{_found(staging, source, config)}"
                )


def _require_groups(splits: SplitSpec, there: list[str]) -> None:
    """Refuse a group that is to be held out and does not exist: what was meant by it would train."""
    for split, held in splits.holdout.items():
        absent = next((group for group in held if group not in there), None)
        if absent is not None:
            near = get_close_matches(absent, there, n=3, cutoff=0.5)
            shown = f"is it {' or '.join(near)}?" if near else f"groups: {known(there[:20])}"
            raise InputError(
                f"splits.holdout.{split}: no structure has the group {absent!r}, of {len(there)}; {shown} Correct it, "
                "or leave it out"
            )


def _found(staging: Staging, source: int, config: DataConfig) -> str:
    """Return the keys of a source and its first rejected frame: damage may be why a key was not seen."""
    text = f"keys found: {known(staging.state['source_keys'][source])}"
    staging.commit()  # to see the frames rejected last; the caller gives up
    first = next((r for r in staging.rejected() if r["source"] == config.sources[source].name), None)
    if first is None:
        return text
    count = staging.state["n_rejected"]
    return f"{text}; rejected: {count}, the first {first['file']}:{first['index']}: {first['reason']}"


def _take(staging: Staging, item: Item | RejectedFrame, config: DataConfig, work: Work, splitter: Splitter) -> None:
    """Store one frame: as a new row, or as labels of a row that exists; or reject it."""
    source = config.sources[work.source]
    state = staging.state
    if isinstance(item, RejectedFrame):
        _reject(staging, item, config)
        return
    counts = state["label_counts"][work.source]
    for k, fidelity in enumerate(staging.layers[work.source]):
        for p, prop in enumerate(("energy", "forces", "stress")):
            if item.present >> (3 * k + p) & 1:
                counts[f"{fidelity} {prop}"] = counts.get(f"{fidelity} {prop}", 0) + 1
    row = -1
    if item.key:
        row = staging.by_key(work.source, item.key)
        if row >= 0 and source.pair_by == "key":
            same = staging.is_same(row, item)
            if not same:
                reason = f"frame_key {item.key!r} names another structure as well (row {row}); make the keys unique"
                _reject(staging, RejectedFrame(str(work.path), item.number, reason, source.name), config)
                return
    if row < 0 or source.pair_by == "geometry":
        row = staging.same_structure(item)
    split = splitter.split(item.split, item.group, item.geometry_hash)
    if row < 0:
        row = staging.add(item, work.source, split, source.name)
        if source.group_key is not None and not item.group:
            state["empty_group"] += 1
        if item.present:
            staging.put_labels(row, work.source, item.labels)
        return
    n_repeated, reason = staging.merge_labels(row, work.source, item, config.duplicates)
    place = f"{work.path}:{item.number}"
    if n_repeated and config.duplicates == "error":
        raise InputError(
            f"{place}: the same structure as row {row} with a label that it already has, and `duplicates: error`; "
            "remove one of them, or choose merge or skip"
        )
    if reason:
        _reject(staging, RejectedFrame(str(work.path), item.number, reason, source.name), config)
        return
    state["n_merged"] += 1
    state["n_repeated_labels"] += n_repeated
    if item.key:
        staging.set_key(work.source, item.key, row)
    if item.split and staging.split_of(row) != split:
        count_move(state, f"{place} ({item.split}; kept in {splitter.names[staging.split_of(row)]})")


def count_move(state: dict[str, Any], what: str) -> None:
    """Note a structure that another split has already; it stays there."""
    state["split_moves_count"] += 1
    if len(state["split_moves"]) < 20:
        state["split_moves"].append(what)


def _reject(staging: Staging, rejected: RejectedFrame, config: DataConfig) -> None:
    if config.on_reject == "stop":
        raise InputError(f"{rejected.origin}: {rejected.reason} (on_reject: stop)")
    count_reason(staging.state["reasons"], rejected.reason)
    staging.reject(rejected)


def fidelity_table(config: DataConfig) -> FidelityTable:
    return FidelityTable(Fidelity(name, **spec.model_dump()) for name, spec in config.fidelities.items())


def add_labels(store_path: str | Path, config: DataConfig, base: Path, layer_name: str) -> dict[str, int]:
    """Append the labels of one source to a store as a new layer; see ``mffm.data.layers.add_labels``."""
    from mffm.data import layers

    return layers.add_labels(store_path, config, base, layer_name)
