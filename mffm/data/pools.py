"""Pools: the (frame, fidelity) pairs of one fidelity that a recipe draws from."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mffm.config.recipe import PlanConfig, PoolConfig
from mffm.data.named import rows_in
from mffm.data.permutation import mix
from mffm.data.records import file_sha256
from mffm.errors import InputError, known
from mffm.fidelity import FidelityTable
from mffm.keys import N_ELEMENTS, PROPERTIES, Property

if TYPE_CHECKING:
    from mffm.data.store import Store

_CHUNK = 8192  # rows at a time: 8 MB of compositions


LARGE = 1_000_000  # frames from which the columns of a pool are kept in files, to be mapped instead of made
COLUMNS = {"rows": "<i8", "n_atoms": "<i4", "n_edges": "<i4", "live": "|u1"}


@dataclass(frozen=True)
class Sizes:
    """Largest and mean numbers of atoms and of edges."""

    most_atoms: int
    most_edges: int
    mean_atoms: float
    mean_edges: float

    @classmethod
    def of(cls, n_atoms: np.ndarray, n_edges: np.ndarray) -> Sizes:
        """Return those of two columns [n]."""
        if not len(n_atoms):
            return cls(0, 0, 0.0, 0.0)
        return cls(int(n_atoms.max()), int(n_edges.max()), float(n_atoms.mean()), float(n_edges.mean()))


@dataclass(frozen=True, eq=False)
class Pool:
    """The frames of one fidelity that one entry of the recipe names, sorted by row.

    Attributes:
        name: unique among the pools of a plan; it seeds the order, so a pool keeps its order when others are added.
        fidelity, fidelity_idx: name, and index in the run's table.
        rows: [n] int64, rows of the store.
        n_atoms, n_edges: [n] int32.
        live: [n] uint8, bit p is set where the label ``PROPERTIES[p]`` exists and the recipe uses it.
        properties: labels that the recipe uses.
        weight: share of the draws (relative), or step → share from that step on, or None where the temperature decides.
        label_counts: property → frames of this pool with that label; counted where not given.
    """

    name: str
    fidelity: str
    fidelity_idx: int
    rows: np.ndarray
    n_atoms: np.ndarray
    n_edges: np.ndarray
    live: np.ndarray
    properties: tuple[Property, ...]
    weight: float | Mapping[int, float] | None = None
    label_counts: dict[Property, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.label_counts:
            counts = {p: int(np.count_nonzero(self.live & bit(p))) for p in self.properties}
            object.__setattr__(self, "label_counts", counts)

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def sizes(self) -> Sizes:
        """Of its frames."""
        return Sizes.of(self.n_atoms, self.n_edges)

    @cached_property
    def digest(self) -> str:
        """sha256 of the columns."""
        digest = hashlib.sha256()
        for name, dtype in COLUMNS.items():
            column = getattr(self, name)
            for first in range(0, len(column), 1 << 22):
                digest.update(np.ascontiguousarray(column[first : first + (1 << 22)], dtype=dtype).data)
        return digest.hexdigest()


def bit(prop: Property) -> np.uint8:
    """Return the bit of a property in ``Pool.live``."""
    return np.uint8(1 << PROPERTIES.index(prop))


def build_pools(store: Store, config: PlanConfig, fidelities: FidelityTable, cutoff: float) -> list[Pool]:
    """Return the pools of a recipe in its order.

    A frame enters a pool if at least one of the pool's properties is labelled. ``max_frames`` keeps the frames with
    the smallest hash of (pool seed, frame), so that larger choices contain smaller ones, fidelities with the same
    seed choose the same frames, and neither the order of ingest nor the run's seed matters. With ``elements_first`` the
    frames that are the first to contain an element, in the order of the hash, come before all others.

    Raises:
        InputError: unknown fidelity, source or split; no edge counts for this cutoff; a pool without any label; pools
            that give the same label twice; weights for some pools only.
    """
    n_edges = store.n_edges(cutoff)
    # A layer beside the store is not in its fingerprint, by which the columns are found again.
    kept = KeptPools(store, cutoff) if store.n_frames >= LARGE and store.beside is None else None
    pools: list[Pool] = []
    for place, entry in enumerate(config.pools):
        where = f"data.plan.pools.{place}"
        name = _name(entry, pools)
        index = fidelities.index(entry.fidelity)
        found = kept.read(entry, name, index) if kept is not None else None
        if found is None:
            rows, live = _labelled_rows(store, entry, where)
            if entry.max_frames is not None and entry.max_frames < len(rows):
                chosen = np.isin(rows, _chosen(store, rows, entry), assume_unique=True)
                rows, live = rows[chosen], live[chosen]
            found = Pool(
                name=name,
                fidelity=entry.fidelity,
                fidelity_idx=index,
                rows=rows,
                n_atoms=np.asarray(store.n_atoms[rows], np.int32),
                n_edges=np.asarray(n_edges[rows], np.int32),
                live=live,
                properties=tuple(p for p in PROPERTIES if p in entry.properties),
                weight=entry.weight,
            )
            if kept is not None and kept.write(entry, found):
                found = kept.read(entry, name, index) or found
        pools.append(found)
    _refuse_repeated_labels(pools)
    return pools


def _labelled_rows(store: Store, entry: PoolConfig, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the pool (sorted, int64) and their ``live`` bits (uint8)."""
    if entry.fidelity not in store.fidelities:
        raise InputError(
            f"{where}.fidelity: {entry.fidelity!r} is not in the store {store.path}, which has "
            f"{known(store.fidelities.names)}; name one of these, or add its labels with `mffm ingest`"
        )
    try:
        masks = {
            p: store.mask(split=entry.split, source=entry.source, fidelity=entry.fidelity, prop=p)
            for p in entry.properties
        }
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    rows = np.flatnonzero(np.logical_or.reduce(list(masks.values()))).astype(np.int64, copy=False)
    if len(rows) == 0:
        counts = store.label_counts(entry.split).get(entry.fidelity, {})
        of_source = f" of source {entry.source!r}" if entry.source else ""
        raise InputError(
            f"{where}: no frame{of_source} in split {entry.split!r} has a label of fidelity {entry.fidelity!r} for "
            f"{', '.join(entry.properties)}; labels of that fidelity in this split, of any source: "
            f"{', '.join(f'{p} {n}' for p, n in counts.items()) or 'none'}; "
            "change the pool's split, source or properties"
        )
    if entry.only is not None:
        rows = np.intersect1d(rows, rows_in(store, Path(entry.only)), assume_unique=True)
        if not len(rows):
            raise InputError(
                f"{where}.only: none of the frames that {entry.only} names is in split {entry.split!r} with a label of "
                f"fidelity {entry.fidelity!r} for {', '.join(entry.properties)}; label them, or name others"
            )
    live = np.zeros(len(rows), np.uint8)
    for prop, mask in masks.items():
        live |= mask[rows].view(np.uint8) * bit(prop)
    return rows, live


class KeptPools:
    """Columns of large pools in files beside the store, or in ``$MFFM_CACHE`` where it cannot be written: made once,
    then mapped, so that a start takes no time and all processes of a node share one copy.
    """

    def __init__(self, store: Store, cutoff: float):
        self._store = store
        self._of = [1, store.fingerprint, store.edges_fingerprint(cutoff)]

    def _name(self, entry: PoolConfig) -> str:
        choice = entry.model_dump(mode="json", exclude={"weight", "only"})
        if entry.only is not None:
            choice["only"] = file_sha256(Path(entry.only))
        return hashlib.sha256(json.dumps([*self._of, choice], sort_keys=True).encode()).hexdigest()[:16]

    def read(self, entry: PoolConfig, name: str, fidelity_idx: int) -> Pool | None:
        """Return the pool of an entry, None where its columns were not kept or are not whole."""
        for folder in self._store.folders_beside("pools"):
            path = folder / self._name(entry)
            if not (path / "pool.json").is_file():
                continue
            about = json.loads((path / "pool.json").read_text())
            columns = {column: np.load(path / f"{column}.npy", mmap_mode="r") for column in COLUMNS}
            pool = Pool(
                name=name,
                fidelity=entry.fidelity,
                fidelity_idx=fidelity_idx,
                properties=tuple(p for p in PROPERTIES if p in entry.properties),
                weight=entry.weight,
                label_counts=about["label_counts"],
                **columns,
            )
            pool.__dict__.update(sizes=Sizes(**about["sizes"]), digest=about["digest"])
            return pool
        return None

    def write(self, entry: PoolConfig, pool: Pool) -> bool:
        """Keep the columns of a pool; return False where nothing can be written, which only costs time."""
        for folder in self._store.folders_beside("pools"):
            path = folder / self._name(entry)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=".making-", dir=folder) as aside:
                    whole = Path(aside) / "whole"
                    whole.mkdir()
                    for column, dtype in COLUMNS.items():
                        np.save(whole / f"{column}.npy", np.asarray(getattr(pool, column), dtype))
                    about = {"label_counts": pool.label_counts, "sizes": asdict(pool.sizes), "digest": pool.digest}
                    (whole / "pool.json").write_text(json.dumps(about))
                    whole.rename(path)
            except OSError:  # read-only, full, or another rank was first
                if not (path / "pool.json").is_file():
                    continue
            return True
        return False


def choose(store: Store, rows: np.ndarray, seed: int, n: int | None) -> np.ndarray:
    """Return ``n`` of the rows (all for None), sorted: those with the smallest hash of (seed, frame)."""
    return rows if n is None or n >= len(rows) else np.sort(rows[_order(store, rows, seed)[:n]])


def _chosen(store: Store, rows: np.ndarray, entry: PoolConfig) -> np.ndarray:
    """Return the rows that ``max_frames`` of a pool keeps, sorted."""
    if not entry.elements_first or entry.max_frames is None:
        return choose(store, rows, entry.seed, entry.max_frames)
    ordered = rows[_order(store, rows, entry.seed)]
    seen, first = np.zeros(N_ELEMENTS + 1, bool), []
    for start in range(0, len(ordered), _CHUNK):
        present = store.composition(ordered[start : start + _CHUNK]) > 0
        added = present.any(0) & ~seen
        first += [start + np.unique(present[:, added].argmax(0))]
        seen |= added
    order = np.concatenate([*first, np.delete(np.arange(len(ordered)), np.concatenate(first))])
    return np.sort(ordered[order[: entry.max_frames]])


def _order(store: Store, rows: np.ndarray, seed: int) -> np.ndarray:
    """Return the places of the rows by the hash of (seed, frame)."""
    key = np.frombuffer(hashlib.blake2b(f"max_frames {seed}".encode(), digest_size=8).digest(), "<u8")
    return np.argsort(mix(np.asarray(store.frame_hash[rows, 0]).astype(np.uint64) ^ key), kind="stable")


def _name(entry: PoolConfig, others: Sequence[Pool]) -> str:
    name = entry.fidelity
    if entry.source:
        name += f"@{entry.source}"
    if entry.split != "train":
        name += f":{entry.split}"
    taken = {pool.name for pool in others}
    if name not in taken:
        return name
    return next(f"{name}#{i}" for i in range(2, len(taken) + 3) if f"{name}#{i}" not in taken)


def _refuse_repeated_labels(pools: Sequence[Pool]) -> None:
    """Two pools may share frames of a fidelity (energies of all, forces of a few), but never the same label."""
    for i, pool in enumerate(pools):
        for other in pools[:i]:
            shared = [p for p in pool.properties if p in other.properties]
            if pool.fidelity != other.fidelity or not shared:
                continue
            _, mine, theirs = np.intersect1d(pool.rows, other.rows, assume_unique=True, return_indices=True)
            both = pool.live[mine] & other.live[theirs]
            if both.any():
                raise InputError(
                    f"data.plan.pools: {other.name} and {pool.name} both draw the {' and '.join(shared)} labels of "
                    f"fidelity {pool.fidelity!r}: {np.count_nonzero(both)} frames are in both, the first is row "
                    f"{pool.rows[mine][both != 0][0]}; give each pool a source, split or property of its own"
                )
