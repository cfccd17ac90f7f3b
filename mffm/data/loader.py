"""From rows of the store to batches: neighbor lists on the fly, packing, and a prefetch thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

import numpy as np
import torch

from mffm.batch import Batch
from mffm.data.bare import Bare, no_edges, outline
from mffm.data.neighbors import NeighborList, neighbor_list, pad
from mffm.data.plan import Cursor, Plan, StepPlan
from mffm.data.pools import bit
from mffm.data.store import NO_CHARGE, Store
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY, FORCES, PROPERTIES, STRESS, Property

# Bits of ``Pool.live`` → the properties they stand for.
_PROPERTIES_OF = tuple(frozenset(p for p in PROPERTIES if code & int(bit(p))) for code in range(1 << len(PROPERTIES)))


def pack(
    geometries: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    fidelity_idx: Sequence[int] | np.ndarray,
    cutoff: float,
    dtype: torch.dtype = torch.float32,
    charge: Sequence[int] | np.ndarray | None = None,
    spin_multiplicity: Sequence[int] | np.ndarray | None = None,
    rows: Sequence[int] | np.ndarray | None = None,
    bare: bool = False,
    lists: Sequence[NeighborList] | None = None,
) -> Batch:
    """Return structures as a batch without labels (all masks False, labels 0, weights 1).

    Geometry is handled in float64; the edge vectors are cast to ``dtype`` after they were computed.

    Args:
        geometries: (atomic numbers [n], positions [n, 3], cell [3, 3], pbc [3]) of at least one system.
        fidelity_idx: [n_systems], index in the model's fidelity table.
        cutoff: Å.
        dtype: of positions, edge vectors and labels.
        charge, spin_multiplicity: [n_systems]; None: 0, not given.
        rows: [n_systems], rows of the store; None: -1.
        bare: leave the edges to ``to``, which makes them on its device, unless the systems are too large for that
            (``mffm.data.bare.MAX_CANDIDATES``).
        lists: the neighbor list of each system within the cutoff, as ``neighbor_list`` gives it, where it is known.

    Raises:
        InputError: a cell does not span the periodic directions.
    """
    n_systems = len(geometries)
    n_atoms = np.array([len(g[0]) for g in geometries], np.int64)
    total = int(n_atoms.sum())
    further = outline(geometries, cutoff) if bare else None
    edges = _edges(geometries, cutoff, dtype, lists) if further is None else no_edges(dtype)
    cells = np.array([g[2] for g in geometries], np.float64)
    pbc = np.array([g[3] for g in geometries], bool)
    periodic = pbc.all(axis=1)
    shapes: dict[Property, tuple[int, ...]] = {ENERGY: (n_systems,), FORCES: (total, 3), STRESS: (n_systems, 3, 3)}
    none = np.zeros(n_systems, np.int64)
    values: dict[str, Any] = {
        "atomic_numbers": torch.from_numpy(np.concatenate([g[0] for g in geometries]).astype(np.int64)),
        "positions": torch.from_numpy(np.concatenate([g[1] for g in geometries]).astype(np.float64)).to(dtype),
        "cell": torch.from_numpy(cells).to(dtype),
        "system_idx": torch.from_numpy(np.repeat(np.arange(n_systems), n_atoms)),
        "fidelity_idx": torch.from_numpy(np.array(fidelity_idx, np.int64)),
        "n_atoms": torch.from_numpy(n_atoms),
        "pbc": torch.from_numpy(pbc),
        "volume": torch.from_numpy(np.where(periodic, np.abs(np.linalg.det(cells)), 0.0)).to(dtype),
        "charge": torch.from_numpy(none.copy() if charge is None else np.array(charge, np.int64)),
        "spin_multiplicity": torch.from_numpy(
            none.copy() if spin_multiplicity is None else np.array(spin_multiplicity, np.int64)
        ),
        "labels": {p: torch.zeros(shapes[p], dtype=torch.float64 if p == ENERGY else dtype) for p in PROPERTIES},
        "masks": {p: torch.zeros(n_systems, dtype=torch.bool) for p in PROPERTIES},
        "weights": {p: torch.ones(n_systems, dtype=dtype) for p in PROPERTIES},
        "rows": torch.from_numpy(none - 1 if rows is None else np.array(rows, np.int64)),
    }
    return Batch(**values, **edges) if further is None else Bare(**values, **edges, **further)


def _edges(
    geometries: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    cutoff: float,
    dtype: torch.dtype,
    lists: Sequence[NeighborList] | None,
) -> dict[str, Any]:
    """Return a batch's fields of edges, made on the host; see ``pack``."""
    receivers, senders, shifts, vectors, offset = [], [], [], [], 0
    for system, (_, positions, cell, pbc) in enumerate(geometries):
        receiver, sender, shift = neighbor_list(positions, cell, pbc, cutoff) if lists is None else lists[system]
        vector = positions[sender] - positions[receiver]
        if pbc.any():
            vector += shift @ cell
        receivers.append(receiver + offset)
        senders.append(sender + offset)
        shifts.append(shift)
        vectors.append(vector)
        offset += len(positions)
    slots = pad(
        np.concatenate(receivers),
        np.concatenate(senders),
        np.concatenate(shifts),
        np.concatenate(vectors).astype(np.float32 if dtype == torch.float32 else np.float64),
        offset,
        cutoff,
    )._asdict()
    edges = {name: v if name == "groups" else torch.from_numpy(v) for name, v in slots.items()}
    return {**edges, "edge_vectors": edges["edge_vectors"].to(dtype)}


def dummy(cutoff: float, dtype: torch.dtype = torch.float32) -> Batch:
    """Return the batch that stands for an empty microbatch: one hydrogen atom, no edge, no label, row -1."""
    hydrogen = (np.ones(1, np.uint8), np.zeros((1, 3)), np.zeros((3, 3)), np.zeros(3, bool))
    return pack([hydrogen], [0], cutoff, dtype)


def collate(
    store: Store,
    rows: Sequence[int] | np.ndarray,
    fidelity_idx: Sequence[int] | np.ndarray,
    fidelities: FidelityTable,
    properties: Sequence[Collection[Property]],
    cutoff: float,
    dtype: torch.dtype = torch.float32,
    bare: bool = False,
) -> Batch:
    """Return stored systems as a batch with the labels that exist and that are asked for; no rows: ``dummy``.

    Args:
        store: where the frames are.
        rows, fidelity_idx: [n_systems]; one system per entry, in this order.
        fidelities: the run's table; ``fidelity_idx`` counts in it.
        properties: per system, the labels to use.
        cutoff: Å.
        dtype: of everything real but the energies, which are float64.
        bare: leave the edges to ``to``; see ``pack``.
    """
    if len(rows) == 0:
        return dummy(cutoff, dtype)
    rows = np.asarray(rows, np.int64)
    charge = np.asarray(store.charge[rows], np.int64)
    batch = pack(
        [store.geometry(row) for row in rows.tolist()],
        fidelity_idx,
        cutoff,
        dtype,
        charge=np.where(charge == NO_CHARGE, 0, charge),
        spin_multiplicity=np.asarray(store.spin_multiplicity[rows], np.int64),
        rows=rows,
        bare=bare,
    )
    labels = {p: batch.labels[p].numpy() for p in PROPERTIES}  # views: writing fills the batch
    masks = {p: batch.masks[p].numpy() for p in PROPERTIES}
    names = fidelities.names
    start = 0
    for system, (row, f) in enumerate(zip(rows.tolist(), batch.fidelity_idx.tolist(), strict=True)):
        stop = start + int(batch.n_atoms[system])
        stored = store.labels(row, names[f])
        for prop in properties[system]:
            if prop in stored:
                place = slice(start, stop) if prop == FORCES else system
                labels[prop][place] = stored[prop]
                masks[prop][system] = True
        start = stop
    weights = torch.from_numpy(np.array(store.weight[rows], np.float32)).to(dtype)
    batch.weights = dict.fromkeys(PROPERTIES, weights)
    return batch


def microbatch(
    store: Store,
    step: StepPlan,
    items: np.ndarray,
    fidelities: FidelityTable,
    cutoff: float,
    dtype: torch.dtype = torch.float32,
    bare: bool = False,
) -> Batch:
    """Return some systems of a step, [n] int64, as a batch with the labels that count; see ``collate``."""
    properties = [_PROPERTIES_OF[code] for code in step.live[items].tolist()]
    return collate(store, step.rows[items], step.fidelity_idx[items], fidelities, properties, cutoff, dtype, bare)


def evaluation_batches(
    store: Store,
    rows: np.ndarray,
    fidelity: str,
    fidelities: FidelityTable,
    cutoff: float,
    edge_budget: int,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Batch]:
    """Yield every row once with all labels of ``fidelity``, largest first, about ``edge_budget`` edges in a batch.

    A system over the budget is a batch of its own. The order depends on rows and edge counts only.

    Raises:
        InputError: ``fidelity`` is not in the run's table; edges were not counted for this cutoff.
    """
    rows = np.asarray(rows, np.int64)
    n_edges = np.asarray(store.n_edges(cutoff)[rows], np.int64)
    f = fidelities.index(fidelity)
    order = np.lexsort((rows, -n_edges))
    start = 0
    while start < len(order):
        total = np.cumsum(n_edges[order[start:]] + 1)  # + 1: atoms without neighbors cost something too
        stop = start + max(1, int(np.searchsorted(total, edge_budget, side="right")))
        chosen = rows[order[start:stop]]
        n = len(chosen)
        yield collate(store, chosen, np.full(n, f), fidelities, [PROPERTIES] * n, cutoff, dtype)
        start = stop


class Loader:
    """Reads ahead the microbatches of one rank in threads (vesin and most of numpy release the GIL).

    Iterating yields ``(step plan, microbatches of this rank, cursor after the step)``. The cursor to save in a
    checkpoint is the one that came with the last step consumed; what was read ahead is read again on resume.

    Use it as a context manager, or call ``close``.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        fidelities: FidelityTable,
        cutoff: float,
        cursor: Cursor | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        dtype: torch.dtype = torch.float32,
        last_step: int | None = None,
        prefetch: int = 2,
        threads: int = 1,
        pinned: bool = False,
        bare: bool = False,
    ):
        """Start reading.

        Args:
            store, plan, fidelities, cutoff: what to read.
            cursor: where to begin; None: at the start.
            rank, world_size: whose share of each step.
            dtype: see ``collate``.
            last_step: steps before this number are read, then iteration ends; None: endless.
            prefetch: steps that may lie ready or be in the making.
            threads: that make batches, a step each.
            pinned: give batches in page-locked memory, for training on a GPU.
            bare: leave the edges to ``to``; see ``pack``.
        """
        self._store, self._plan, self._fidelities, self._cutoff = store, plan, fidelities, cutoff
        self._rank, self._world_size, self._dtype = rank, world_size, dtype
        self._last_step, self._pinned, self._bare = last_step, pinned, bare
        self._queue: queue.Queue[tuple[StepPlan, Future[list[Batch]], Cursor] | BaseException | None] = queue.Queue(
            max(prefetch, threads)
        )
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="mffm-batches")
        self._stop = threading.Event()
        self._ended = False
        self._thread = threading.Thread(
            target=self._run, args=(cursor or plan.start(),), name="mffm-loader", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[StepPlan, list[Batch], Cursor]:
        """Return the next step.

        Raises:
            StopIteration: after ``last_step`` or ``close``.
            BaseException: whatever stopped a thread, once; then StopIteration.
        """
        if self._ended:
            raise StopIteration
        item = self._queue.get()
        if isinstance(item, tuple):
            step, batches, cursor = item
            try:
                return step, batches.result(), cursor
            except BaseException:
                self.close()
                raise
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def close(self) -> None:
        """Stop the threads and wait for them; calling it again does nothing."""
        self._ended = True
        self._stop.set()
        while self._thread.is_alive():
            try:  # room for a put that is waiting
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(timeout=0.01)
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _run(self, cursor: Cursor) -> None:
        try:
            while not self._stop.is_set() and (self._last_step is None or cursor.step < self._last_step):
                step, cursor = self._plan.step(cursor)
                self._queue.put((step, self._pool.submit(self._microbatches, step), cursor))
            self._queue.put(None)
        except BaseException as error:  # noqa: BLE001 - the caller raises it
            self._queue.put(error)

    def _microbatches(self, step: StepPlan) -> list[Batch]:
        bins = step.partition(self._world_size, self._plan.n_microbatches(self._world_size))[self._rank]
        read = (microbatch(self._store, step, i, self._fidelities, self._cutoff, self._dtype, self._bare) for i in bins)
        return [batch.pinned() if self._pinned else batch for batch in read]
