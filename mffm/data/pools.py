"""Pools: the (frame, fidelity) pairs of one fidelity that a recipe draws from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mffm.config.recipe import PlanConfig, PoolConfig
from mffm.data.permutation import mix
from mffm.errors import InputError, known
from mffm.fidelity import FidelityTable
from mffm.keys import N_ELEMENTS, PROPERTIES, Property

if TYPE_CHECKING:
    from mffm.data.store import Store

_CHUNK = 8192  # rows at a time: 8 MB of compositions


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
        label_counts: property → frames of this pool with that label.
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
    label_counts: dict[Property, int] = field(init=False)

    def __post_init__(self) -> None:
        counts = {p: int(np.count_nonzero(self.live & bit(p))) for p in self.properties}
        object.__setattr__(self, "label_counts", counts)

    def __len__(self) -> int:
        return len(self.rows)


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
    pools: list[Pool] = []
    for place, entry in enumerate(config.pools):
        where = f"data.plan.pools.{place}"
        rows, live = _labelled_rows(store, entry, where)
        chosen = np.isin(rows, _chosen(store, rows, entry), assume_unique=True)
        rows, live = rows[chosen], live[chosen]
        pools.append(
            Pool(
                name=_name(entry, pools),
                fidelity=entry.fidelity,
                fidelity_idx=fidelities.index(entry.fidelity),
                rows=rows,
                n_atoms=np.asarray(store.n_atoms[rows], np.int32),
                n_edges=np.asarray(n_edges[rows], np.int32),
                live=live,
                properties=tuple(p for p in PROPERTIES if p in entry.properties),
                weight=entry.weight,
            )
        )
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
        by_property = {
            p: store.rows(split=entry.split, source=entry.source, fidelity=entry.fidelity, prop=p)
            for p in entry.properties
        }
        counts = store.label_counts(entry.split).get(entry.fidelity, {})
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    rows = np.unique(np.concatenate(list(by_property.values()))).astype(np.int64)
    if len(rows) == 0:
        of_source = f" of source {entry.source!r}" if entry.source else ""
        raise InputError(
            f"{where}: no frame{of_source} in split {entry.split!r} has a label of fidelity {entry.fidelity!r} for "
            f"{', '.join(entry.properties)}; labels of that fidelity in this split, of any source: "
            f"{', '.join(f'{p} {n}' for p, n in counts.items()) or 'none'}; "
            "change the pool's split, source or properties"
        )
    live = np.zeros(len(rows), np.uint8)
    for prop, labelled in by_property.items():
        live[np.searchsorted(rows, labelled)] |= bit(prop)
    return rows, live


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
