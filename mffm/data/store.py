"""The store: frames in immutable sharded LMDB files, labels in append-only layers, a columnar memory-mapped index.

Folder (schema version 1)::

    manifest.json              fidelities, sources, splits, shards with sizes and hashes, layers, fingerprints
    groups.json                names of the groups
    geometry/00000.lmdb …      records of ``mffm.data.records``
    index/*.npy                per row: n_atoms, shard, frame_hash, geometry_hash, split, group, source, charge, spin,
                               weight;
    element counts (CSR) layers/<name>/             layer.json, labels-00000.lmdb …, rows.npy, present.npy, energy.npy
    edges/cutoff-<c>.npy/json  directed edges per row
    rejected.jsonl, ingest.md  what was left out, and the report

Opening reads JSON and maps arrays, nothing per frame; LMDB files are opened on first use, per process, without locks
and read-only, so that any number of processes on any file system may read.
"""

import hashlib
import json
import os
import pickle
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from mffm.data import records
from mffm.data.packed import Packed, read_packed
from mffm.data.records import SCHEMA_VERSION, LabelLayout
from mffm.errors import InputError, known
from mffm.fidelity import Fidelity, FidelityTable
from mffm.frame import Frame
from mffm.keys import ENERGY, N_ELEMENTS, PROPERTIES, Property

NO_CHARGE = -32768
COLUMNS = ("n_atoms", "shard", "frame_hash", "geometry_hash", "split", "group", "source", "charge", "spin", "weight")
ELEMENT_COLUMNS = ("element_start", "element", "element_count")

_BLOCK = 1 << 22  # rows looked at together: bounds what a store of 1e8 rows needs beside its result
# Environments by (process, device, inode), never closed: the arrays handed out are views of their maps.
_environments: dict[tuple[int, int, int], lmdb.Environment] = {}
_environments_lock = threading.Lock()


def _environment(path: Path) -> lmdb.Environment:
    try:
        status = path.stat()
    except OSError as error:
        raise InputError(f"{path}: shard is missing; restore it or ingest the store again") from error
    key = (os.getpid(), status.st_dev, status.st_ino)
    with _environments_lock:
        environment = _environments.get(key)
        if environment is None:
            try:
                environment = lmdb.open(str(path), subdir=False, readonly=True, lock=False, readahead=False, max_dbs=0)
            except lmdb.Error as error:
                raise InputError(f"{path}: cannot be read as a shard ({error}); restore it or ingest again") from error
            _environments[key] = environment
    return environment


class _Shards:
    """The LMDB files of a folder; ``get`` finds a record by row."""

    def __init__(self, folder: Path, entries: Sequence[dict[str, Any]]):
        self.folder = folder
        self.entries = entries
        self._local = threading.local()  # a read transaction belongs to the thread that began it

    def check_sizes(self) -> None:
        for entry in self.entries:
            path = self.folder / entry["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                found = "the file is missing" if size is None else f"it has {size} bytes"
                raise InputError(
                    f"{path}: {found}, the manifest says {entry['bytes']}; a copy was cut short: "
                    "restore the file from where the store was made, or ingest again"
                )

    def verify(self) -> None:
        self.check_sizes()
        for entry in self.entries:
            path = self.folder / entry["file"]
            found = records.file_sha256(path)
            if found != entry["sha256"]:
                raise InputError(
                    f"{path}: damaged: SHA-256 is {found[:16]}…, the manifest says {entry['sha256'][:16]}…; "
                    "restore the file from where the store was made, or ingest again"
                )

    def transaction(self, shard: int) -> lmdb.Transaction:
        local = self._local
        if getattr(local, "pid", None) != os.getpid():
            local.pid, local.transactions = os.getpid(), {}
        transaction = local.transactions.get(shard)
        if transaction is None:
            environment = _environment(self.folder / self.entries[shard]["file"])
            transaction = local.transactions[shard] = environment.begin(buffers=True)
        return transaction

    def get(self, shard: int, row: int) -> memoryview:
        record = self.transaction(shard).get(row.to_bytes(8, "big"))
        if record is None:
            path = self.folder / self.entries[shard]["file"]
            raise InputError(
                f"{path}: row {row} is not in the shard; find what is damaged with `mffm verify`, or ingest again"
            )
        return record


class Layer:
    """One label layer: which (row, fidelity, property) it has, and where."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta: dict[str, Any] = _read_json(folder / "layer.json")
        self.name: str = self.meta["name"]
        self.source: str = self.meta["source"]
        self.fidelities: list[str] = self.meta["fidelities"]
        self.fingerprint: str = self.meta["fingerprint"]
        self.rows = _load(folder / "rows.npy")
        self.present = _load(folder / "present.npy")
        self.energy = _load(folder / "energy.npy")  # [n_fidelities, n_rows]; meaningless where `present` says no
        self.shards = _Shards(folder, self.meta["shards"])
        self.shard_starts = np.array([s["first_row"] for s in self.meta["shards"]], np.int64)
        self._starts = self.shard_starts.tolist()
        n = len(self.rows)
        # A layer that covers rows 0..n-1 without gaps needs no search.
        self.dense = n > 0 and int(self.rows[0]) == 0 and int(self.rows[-1]) == n - 1
        self.layouts = {name: LabelLayout(k) for k, name in enumerate(self.fidelities)}

    def position(self, row: int) -> int:
        """Return the index of a row in this layer, or -1."""
        n = len(self.rows)
        if self.dense:
            return row if row < n else -1
        at = int(self.rows.searchsorted(row))
        return at if at < n and self.rows[at] == row else -1

    def positions(self, rows: np.ndarray) -> np.ndarray:
        """Return the index of each row in this layer, -1 where it has none."""
        if self.dense:
            return np.where(rows < len(self.rows), rows, -1)
        at = np.minimum(np.searchsorted(self.rows, rows), max(len(self.rows) - 1, 0))
        return np.where(self.rows[at] == rows, at, -1) if len(self.rows) else np.full(len(rows), -1)

    def record(self, row: int) -> memoryview:
        shard = 0 if len(self._starts) == 1 else int(self.shard_starts.searchsorted(row, "right")) - 1
        return self.shards.get(shard, row)


class Store:
    """Frames and labels, read-only. Cheap to open, to copy to another process and to use from several threads.

    Args:
        path: folder of the store.
        layers: names of the label layers to see, None for all; where two have the same label, the earlier one counts.
        beside: folder of one more layer that is not the store's, before all others; ``write_beside`` made it. It is no
            part of the fingerprint.

    Raises:
        InputError: no complete store there, an unknown schema version, an unknown layer, or a shard that was cut short.
    """

    def __init__(self, path: str | Path, layers: Sequence[str] | None = None, beside: Path | None = None):
        self.path = Path(path)
        self._chosen = None if layers is None else tuple(layers)
        self.beside = beside
        self._open()

    def __getstate__(self) -> tuple[str, tuple[str, ...] | None, Path | None]:
        return str(self.path), self._chosen, self.beside

    def __setstate__(self, state: tuple[str, tuple[str, ...] | None, Path | None]) -> None:
        self.path, self._chosen, self.beside = Path(state[0]), state[1], state[2]
        self._open()

    def _open(self) -> None:
        manifest = read_manifest(self.path)
        self.manifest = manifest
        self.name: str = manifest["name"]
        self.fidelities = FidelityTable.from_list(manifest["fidelities"])
        self.sources: list[dict[str, str]] = manifest["sources"]
        self.split_names: tuple[str, ...] = tuple(manifest["splits"])
        self.n_frames: int = manifest["n_frames"]
        self.geometry_fingerprint: str = manifest["geometry_fingerprint"]
        names = [layer["name"] for layer in manifest["layers"]]
        chosen = names if self._chosen is None else self._chosen
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise InputError(f"{self.path}: no label layer {unknown[0]!r}; layers: {known(names)}")
        self.layers = [Layer(self.path / "layers" / name) for name in names if name in chosen]
        for layer, entry in zip(self.layers, (e for e in manifest["layers"] if e["name"] in chosen), strict=True):
            if layer.fingerprint != entry["fingerprint"]:
                raise InputError(f"{layer.folder}: not the layer that the manifest names; restore it or ingest again")
        self.fingerprint = combined_fingerprint(
            self.geometry_fingerprint, [(layer.name, layer.fingerprint) for layer in self.layers]
        )
        if self.beside is not None:
            self._open_beside(self.beside)
        self.layers_of = {f: [layer for layer in self.layers if f in layer.fidelities] for f in self.fidelities.names}
        self.geometry_shards = _Shards(self.path / "geometry", manifest["geometry"])
        self.geometry_shards.check_sizes()
        for layer in self.layers:
            layer.shards.check_sizes()
        _allow_open_files(len(manifest["geometry"]) + sum(len(layer.shards.entries) for layer in self.layers))
        columns = {name: _load(self.path / "index" / f"{name}.npy") for name in COLUMNS + ELEMENT_COLUMNS}
        self.n_atoms, self.split, self.group = columns["n_atoms"], columns["split"], columns["group"]
        self.source, self.charge, self.spin_multiplicity = columns["source"], columns["charge"], columns["spin"]
        self.weight = columns["weight"]
        self.frame_hash, self.geometry_hash = columns["frame_hash"], columns["geometry_hash"]
        self.shard = columns["shard"]
        self._element_start, self.element = columns["element_start"], columns["element"]
        self._element_count = columns["element_count"]
        starts = np.cumsum([0] + [entry["n_frames"] for entry in manifest["geometry"]])
        self._shard_starts = starts[:-1]
        self._groups: list[str] | None = None

    def _open_beside(self, folder: Path) -> None:
        layer, about = Layer(folder), _read_json(folder / "beside.json")
        if about["source"]["name"] in self.source_names:
            raise InputError(f"{self.path}: has a source {about['source']['name']!r}, as the layer {folder} beside it")
        for row in about["fidelities"]:
            if row["name"] not in self.fidelities:
                self.fidelities = self.fidelities.appended(Fidelity(**row))
        self.sources = [*self.sources, about["source"]]
        self.layers.insert(0, layer)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}, {self.n_frames} frames, layers {[layer.name for layer in self.layers]})"

    @property
    def group_names(self) -> list[str]:
        if self._groups is None:
            self._groups = _read_json(self.path / "groups.json")
        return self._groups

    def split_index(self, split: str) -> int:
        if split not in self.split_names:
            raise InputError(f"{self.path}: no split {split!r}; splits: {known(self.split_names)}")
        return self.split_names.index(split)

    def rows(
        self,
        split: str | None = None,
        source: str | None = None,
        fidelity: str | None = None,
        prop: Property | None = None,
    ) -> np.ndarray:
        """Return the rows (int64, ascending) that meet every condition given.

        ``source`` with ``fidelity`` means: has a label of that fidelity from that source; ``source`` alone: is a
        structure or has a label of that source. ``fidelity`` without ``prop``: any property.

        Raises:
            InputError: unknown split, source or fidelity; the message lists the known ones.
        """
        return np.flatnonzero(self.mask(split, source, fidelity, prop)).astype(np.int64, copy=False)

    def mask(
        self,
        split: str | None = None,
        source: str | None = None,
        fidelity: str | None = None,
        prop: Property | None = None,
    ) -> np.ndarray:
        """Return a bool [n_frames]: which rows meet every condition; see ``rows``."""
        if source is not None and source not in self.source_names:
            raise InputError(f"{self.path}: no source {source!r}; sources: {known(self.source_names)}")
        if fidelity is not None:
            self.fidelities.index(fidelity)
        assert prop is None or prop in PROPERTIES
        mask = np.ones(self.n_frames, bool)
        if split is not None:
            mask &= self.split == self.split_index(split)
        if fidelity is not None or prop is not None:
            mask &= self._labelled(source, fidelity, prop)
        elif source is not None:
            mask &= self._labelled(source, None, None) | (self.source == self.source_names.index(source))
        return mask

    @property
    def source_names(self) -> list[str]:
        return [source["name"] for source in self.sources]

    def _labelled(self, source: str | None, fidelity: str | None, prop: Property | None) -> np.ndarray:
        mask = np.zeros(self.n_frames, bool)
        for layer in self.layers:
            if source is not None and layer.source != source:
                continue
            bits = sum(
                1 << records.bit(k, p)
                for k, name in enumerate(layer.fidelities)
                for p in PROPERTIES
                if fidelity in (None, name) and prop in (None, p)
            )
            for first in range(0, len(layer.rows), _BLOCK):
                part = slice(first, first + _BLOCK)
                has = (layer.present[part] & np.uint64(bits)) != 0
                if layer.dense:
                    mask[part][: len(has)] |= has
                else:
                    mask[layer.rows[part][has]] = True
        return mask

    def has(self, fidelity: str, prop: Property) -> np.ndarray:
        """Return a bool [n_frames]: which frames have that label."""
        self.fidelities.index(fidelity)
        return self._labelled(None, fidelity, prop)

    def energies(self, fidelity: str, rows: np.ndarray) -> np.ndarray:
        """Return energies [len(rows)] float64, eV; every row must have one (`has`)."""
        rows = np.asarray(rows, np.int64)
        energies = np.zeros(len(rows))
        missing = np.ones(len(rows), bool)
        for layer in self.layers_of[self.fidelities[fidelity].name]:
            k = layer.fidelities.index(fidelity)
            at = layer.positions(rows)
            mask = np.uint64(1 << records.bit(k, ENERGY))
            take = missing & (at >= 0)
            take[take] = (layer.present[at[take]] & mask) != 0
            energies[take] = layer.energy[k, at[take]]
            missing &= ~take
        assert not missing.any(), f"{missing.sum()} rows have no {fidelity} energy, first: {rows[missing][:5]}"
        return energies

    def composition(self, rows: np.ndarray) -> np.ndarray:
        """Return element counts, float64 [len(rows), N_ELEMENTS + 1], column = atomic number."""
        rows = np.asarray(rows, np.int64)
        start, stop = self._element_start[rows], self._element_start[rows + 1]
        length = stop - start
        frame = np.repeat(np.arange(len(rows)), length)
        entry = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length) + np.repeat(start, length)
        counts = np.zeros((len(rows), N_ELEMENTS + 1))
        counts[frame, self.element[entry]] = self._element_count[entry]
        return counts

    def elements(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the atomic numbers that occur in a row, ascending, and how many atoms of each."""
        place = slice(int(self._element_start[row]), int(self._element_start[row + 1]))
        return self.element[place], self._element_count[place]

    def geometry(self, row: int) -> records.Geometry:
        """Return ``(atomic_numbers u8 [n], positions f8 [n, 3], cell f8 [3, 3], pbc bool [3])``: read-only views, Å."""
        return records.unpack_geometry(self.geometry_shards.get(int(self.shard[row]), int(row)))

    def frame_id(self, row: int) -> str:
        return records.unpack_frame_id(self.geometry_shards.get(int(self.shard[row]), int(row)))

    def labels(self, row: int, fidelity: str) -> dict[Property, np.ndarray]:
        """Return the labels of a row at a fidelity that exist: energy () f8, forces [n, 3] f4, stress [3, 3] f8
        (views).
        """
        row = int(row)
        merged: dict[Property, np.ndarray] = {}
        layers = self.layers_of.get(fidelity)
        if layers is None:
            self.fidelities.index(fidelity)
        for layer in layers or ():
            if layer.position(row) >= 0:
                merged = {**layer.layouts[fidelity].unpack(layer.record(row)), **merged}
        return merged

    def frame(self, row: int) -> Frame:
        """Return everything about a row as a ``Frame`` with arrays of its own."""
        record = self.geometry_shards.get(int(self.shard[row]), int(row))
        numbers, positions, cell, pbc = records.unpack_geometry(record)
        charge, spin = int(self.charge[row]), int(self.spin_multiplicity[row])
        moments = records.unpack_moments(record)
        return Frame(
            atomic_numbers=numbers.copy(),
            positions=positions.copy(),
            cell=cell.copy(),
            pbc=pbc.copy(),
            labels={
                (f, p): np.array(value, np.float64)
                for f in self.fidelities.names
                for p, value in self.labels(row, f).items()
            },
            frame_id=records.unpack_frame_id(record),
            group=self.group_names[self.group[row]],
            split=self.split_names[self.split[row]],
            charge=None if charge == NO_CHARGE else charge,
            spin_multiplicity=spin or None,
            magnetic_moments=None if moments is None else moments.astype(np.float64),
            weight=float(self.weight[row]),
            origin=f"{self.path}:{int(row)}",
        )

    def read(self, rows: np.ndarray, fidelity: str) -> Packed:
        """Return many rows at one fidelity as packed arrays, in the order asked for; about twice as fast as row by
        row.
        """
        return read_packed(self, np.asarray(rows, np.int64), fidelity)

    def n_edges(self, cutoff: float) -> np.ndarray:
        """Return directed edges per row within ``cutoff`` Å, int32 [n_frames].

        Raises:
            InputError: they were never counted; the message gives the command.
        """
        return _load(self._edges(cutoff).with_suffix(".npy"))

    def edges_fingerprint(self, cutoff: float) -> str:
        return str(_read_json(self._edges(cutoff))["sha256"])

    def folders_beside(self, name: str) -> list[Path]:
        """Return where what follows from a store may lie: in it, then in ``$MFFM_CACHE``."""
        return [folder.with_name(name) for folder in edge_folders(self.path, self.geometry_fingerprint)]

    def neighbor_histograms(self) -> dict[float, dict[str, int]]:
        """Return cutoff → (mean neighbors of a structure's atoms, rounded → structures), of the counts in the store."""
        found = (_read_json(path) for path in (self.path / "edges").glob("cutoff-*.json"))
        known = {meta["cutoff"]: meta.get("neighbors_per_atom") for meta in found}
        return {cutoff: known[cutoff] for cutoff in sorted(known) if known[cutoff]}

    def _edges(self, cutoff: float) -> Path:
        for folder in edge_folders(self.path, self.geometry_fingerprint):
            path = folder / f"cutoff-{cutoff:g}.json"
            if path.is_file():
                if _read_json(path)["geometry_fingerprint"] != self.geometry_fingerprint:
                    raise InputError(f"{path}: counted for another store; delete it and run `mffm edges {self.path}`")
                return path
        raise InputError(
            f"{self.path}: edges were not counted for a cutoff of {cutoff:g} Å; "
            f"run `mffm edges {self.path} --cutoff {cutoff:g}`"
        )

    def label_counts(self, split: str | None = None) -> dict[str, dict[str, int]]:
        """Return the number of frames with a label, by fidelity and property."""
        in_split = None if split is None else self.split == self.split_index(split)
        counts: dict[str, dict[str, int]] = {}
        for f in self.fidelities.names:
            for p in PROPERTIES:
                has = self.has(f, p)
                n = int((has if in_split is None else has & in_split).sum())
                if n:
                    counts.setdefault(f, {})[p] = n
        return counts

    def verify(self) -> None:
        """Compare the SHA-256 of every file with the manifest, edge counts with the one beside them.

        Raises:
            InputError: a file is damaged or missing; the message names it.
        """
        if len(self.group_names) <= int(self.group.max(initial=-1)):
            raise InputError(
                f"{self.path / 'groups.json'}: damaged: {len(self.group_names)} names, but rows of group "
                f"{int(self.group.max())}; restore it or ingest the store again"
            )
        for path in sorted((self.path / "edges").glob("cutoff-*.json")):
            meta = _read_json(path)
            if hashlib.sha256(_load(path.with_suffix(".npy")).tobytes()).hexdigest() != meta["sha256"]:
                raise InputError(
                    f"{path.with_suffix('.npy')}: damaged; run `mffm edges {self.path} --cutoff {meta['cutoff']:g}`"
                )
        self.geometry_shards.verify()
        _verify_files(self.path / "index", self.manifest["index"])
        for layer in self.layers:
            layer.shards.verify()
            _verify_files(layer.folder, layer.meta["columns"])


def _verify_files(folder: Path, files: dict[str, str]) -> None:
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: missing; restore it or ingest the store again")
        found = records.file_sha256(path)
        if found != expected:
            raise InputError(
                f"{path}: damaged: SHA-256 is {found[:16]}…, the manifest says {expected[:16]}…; "
                "restore the file from where the store was made, or ingest again"
            )


def combined_fingerprint(geometry: str, layers: Sequence[tuple[str, str]]) -> str:
    """Return the fingerprint of a geometry with label layers on it; it is the same on every machine for the same
    content.
    """
    return hashlib.sha256(json.dumps([SCHEMA_VERSION, geometry, list(layers)]).encode()).hexdigest()


def read_manifest(path: Path) -> dict[str, Any]:
    """Return manifest.json of a store.

    Raises:
        InputError: there is no complete store, or its schema version is not this one.
    """
    file = path / "manifest.json"
    if not file.is_file():
        if (path / "staging.lmdb").is_file():
            raise InputError(
                f"{path}: an unfinished ingest; run the same `mffm ingest` again, it goes on where it stopped"
            )
        raise InputError(f"{path}: no store there (no manifest.json); make one with `mffm ingest <data.yaml>`")
    manifest: dict[str, Any] = _read_json(file)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"{file}: schema version {version!r}; this mffm reads version {SCHEMA_VERSION}: "
            "ingest the sources again, or use the mffm that wrote the store"
        )
    return manifest


def edge_folders(path: Path, geometry_fingerprint: str) -> Iterator[Path]:
    """Yield where edge counts may lie: in the store, then in ``$MFFM_CACHE`` (for a store that cannot be written)."""
    yield path / "edges"
    cache = os.environ.get("MFFM_CACHE")
    if cache:
        yield Path(cache) / geometry_fingerprint[:16] / "edges"


def _allow_open_files(n: int) -> None:
    """Raise this process's soft limit of open files where the shards need more than is left of it."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = n + 512
    if soft != resource.RLIM_INFINITY and soft < wanted:
        top = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, top), hard))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; restore it or ingest the store again") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); restore it or ingest the store again") from error


def _load(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; restore it or ingest the store again") from error
    except (ValueError, OSError, EOFError) as error:
        try:  # an array of length 0 cannot be mapped
            array = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError, pickle.UnpicklingError):
            raise InputError(f"{path}: damaged ({error}); restore it or ingest the store again") from error
    return array


def count_edges(store_path: str | Path, cutoff: float, workers: int = 1) -> Path:
    """Count the directed edges of every frame within ``cutoff`` Å into a sidecar; see
    ``mffm.data.edges.count_edges``.
    """
    from mffm.data import edges

    return edges.count_edges(store_path, cutoff, workers)
