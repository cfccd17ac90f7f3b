"""The plan: which systems each step reads. A pure function of (pools, config, seed, cursor).

The draws form one endless sequence that does not know of steps: the next draw comes from the stream that is furthest
behind its share (Sainte-Laguë's rule, the smallest ``(draws + 1/2) / share``), and a stream hands out its units in a
new random order in each pass. A step is the longest stretch of this sequence that fits the edge and the atom budget;
the unit that does not fit opens the next step. So fractional quotas carry over, nothing depends on the number of
ranks, and the cursor is one (pass, position) per stream: the credit of a stream is share × draws − its own draws.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from mffm.config.recipe import FinishConfig, PlanConfig
from mffm.data.permutation import mix, permute, permute_near
from mffm.data.pools import COLUMNS, LARGE, Pool, Sizes, bit, build_pools
from mffm.errors import InputError
from mffm.keys import ENERGY, FORCES, PROPERTIES, Property

__all__ = ["Cursor", "Plan", "Pool", "StepPlan", "build_pools"]

LabelCounts = dict[tuple[int, Property], int]
_STEPS_TO_MEASURE = 64  # steps from which the mean number of draws per step is taken
# Edges that cost as much as an atom in a training step of the default backbone (tools/simulate_scaling.py measures it).
ATOM_COST = 9


@dataclass(frozen=True)
class Cursor:
    """Where the plan stands before ``step``: (pass, position in the pass) of every stream.

    Attributes:
        since: draws of every stream before the phase of the last step; empty in the first phase.
    """

    step: int
    streams: tuple[tuple[int, int], ...]
    since: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        content: dict[str, Any] = {"step": self.step, "streams": [list(s) for s in self.streams]}
        return {**content, "since": list(self.since)} if self.since else content

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Cursor:
        """Return the cursor that ``to_dict`` wrote.

        Raises:
            InputError: the content is not that of a cursor.
        """
        try:
            streams = tuple((int(p), int(q)) for p, q in content["streams"])
            return cls(int(content["step"]), streams, tuple(int(n) for n in content.get("since", ())))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"plan cursor {content!r}: expected step and a list of (pass, position); the checkpoint is damaged or "
                "of another version, resume from an older one"
            ) from error


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The systems of one step, in the order in which they were drawn. All arrays are [n_systems].

    Attributes:
        step: number of the step.
        rows: rows of the store.
        fidelity_idx: index in the run's fidelity table.
        pool: index of the pool.
        n_atoms, n_edges: sizes.
        live: uint8 bits of the labels that count, as in ``Pool.live``.
        counts: (fidelity_idx, property) → live label components of the whole step, over all ranks: systems for the
            energy, 3 × atoms for the forces, 9 per system for the stress.
    """

    step: int
    rows: np.ndarray
    fidelity_idx: np.ndarray
    pool: np.ndarray
    n_atoms: np.ndarray
    n_edges: np.ndarray
    live: np.ndarray
    counts: LabelCounts

    def __len__(self) -> int:
        return len(self.rows)

    def partition(self, world_size: int, n_microbatches: int) -> list[list[np.ndarray]]:
        """Deal the systems out to ranks and microbatches, the largest first, each to the emptiest bin.

        Args:
            world_size: number of ranks.
            n_microbatches: of each rank.

        Returns:
            [rank][microbatch] → system indices (int64, ascending), possibly empty. Every system is in exactly one.
        """
        n_bins = world_size * n_microbatches
        load = (self.n_edges + ATOM_COST * self.n_atoms).tolist()
        order = np.argsort(-np.asarray(load), kind="stable").tolist()
        bins: list[list[int]] = [[] for _ in range(n_bins)]
        heap = [(0, b) for b in range(n_bins)]
        for i in order:
            total, b = heap[0]
            bins[b].append(i)
            heapq.heapreplace(heap, (total + load[i], b))
        # Deal the bins in a snake: similar loads meet in the same microbatch, and the ranks' sums stay level.
        ranked = [b for _, b in sorted(heap, key=lambda entry: (-entry[0], entry[1]))]
        result: list[list[np.ndarray]] = [[] for _ in range(world_size)]
        for microbatch in range(n_microbatches):
            row = ranked[microbatch * world_size : (microbatch + 1) * world_size]
            for rank, b in enumerate(row if microbatch % 2 == 0 else reversed(row)):
                result[rank].append(np.array(sorted(bins[b]), np.int64))
        return result


@dataclass(eq=False)
class _Stream:
    """What is drawn as one: a frame at one fidelity, or at several where the plan is paired.

    Attributes:
        name: seeds the order.
        members: (pool, [n_units] index into that pool) for every fidelity of a unit; None: unit k is the pool's k-th.
        n_atoms, n_edges: [n_units], sums over the members.
    """

    name: str
    members: list[tuple[int, np.ndarray | None]]
    n_atoms: np.ndarray
    n_edges: np.ndarray
    sizes: Sizes
    key: np.ndarray = field(init=False)

    def __len__(self) -> int:
        return len(self.n_edges)

    def units(self, draws: np.ndarray, block: int | None) -> np.ndarray:
        """Return the unit of each draw, counted from the first draw of the run.

        Args:
            draws: [n] int64.
            block: units that lie together and are drawn near each other; None: any order is as likely.
        """
        passes, places = np.divmod(draws, len(self))
        keys = mix(self.key + passes.astype(np.uint64))
        return permute(places, len(self), keys) if block is None else permute_near(places, len(self), keys, block)


@dataclass(frozen=True)
class _Phase:
    """Steps with the same shares.

    Attributes:
        start: its first step.
        shares: of each stream in the draws; they sum to 1.
        guess: about how many draws fill a step, generously.
    """

    start: int
    shares: np.ndarray
    guess: int


class Plan:
    """What every step of a run reads.

    Attributes:
        pools: as given.
        oversize: pool name → frames over a budget (left out under ``skip``, steps of their own under ``single``).
        finish_start: first step of the last part, on some fidelities alone; None where the config has none.
        fingerprint: sha256 of everything that the order depends on.
    """

    def __init__(self, pools: Sequence[Pool], config: PlanConfig, seed: int, steps: int | None = None):
        """Prepare the streams; O(frames) once, nothing in a step is.

        Args:
            steps: of the whole run; a plan with ``finish`` needs them.

        Raises:
            InputError: a frame over the budget under the policy ``error``; nothing left under ``skip``; weights for
                some of the pools only; a batch that nothing limits.
        """
        self.pools = list(pools)
        self.config = config
        self.seed = seed
        self.finish_start: int | None = None
        self.oversize = {pool.name: 0 for pool in pools}
        self._streams = _paired_streams(self.pools) if config.paired else _single_streams(self.pools)
        for stream in self._streams:
            self._apply_oversize_policy(stream)
        self._streams = [stream for stream in self._streams if len(stream)]
        self._require_something()
        self._phases = [_Phase(s, shares, self._expected_draws(shares)) for s, shares in self._shares_by_start(steps)]
        self._expected: dict[int, dict[tuple[int, Property], float]] = {}  # first step of a phase → counts
        for stream in self._streams:
            digest = hashlib.blake2b(f"{seed} {stream.name}".encode(), digest_size=8).digest()
            stream.key = np.frombuffer(digest, "<u8").astype(np.uint64)

    # Streams

    def _apply_oversize_policy(self, stream: _Stream) -> None:
        config = self.config
        limits = [
            ("edge_budget", config.edge_budget, stream.n_edges, stream.sizes.most_edges),
            ("atom_budget", config.atom_budget, stream.n_atoms, stream.sizes.most_atoms),
        ]
        if config.edges_per_microbatch is not None:
            largest = stream.n_edges
            if len(stream.members) > 1:
                largest = np.max([_of_units(self.pools[p].n_edges, index) for p, index in stream.members], axis=0)
            most = stream.sizes.most_edges if len(stream.members) == 1 else int(largest.max())
            limits.append(("edges_per_microbatch", config.edges_per_microbatch, largest, most))
        if all(limit is None or most <= limit for _, limit, _, most in limits):
            return
        over = np.zeros(len(stream), bool)
        for name, limit, sizes, most in limits:
            if limit is None or most <= limit:
                continue
            over |= sizes > limit
            if config.oversize == "error":
                unit = int(np.argmax(sizes))
                p, index = stream.members[0]
                row = _of_units(self.pools[p].rows, index)[unit]
                n_over = np.count_nonzero(sizes > limit)
                raise InputError(
                    f"pool {stream.name}: row {row} has {stream.n_edges[unit]} edges and {stream.n_atoms[unit]} atoms, "
                    f"over data.plan.{name} = {limit}, as {n_over} of {len(stream)} frames are; "
                    f"raise {name} to at least {most}, or set data.plan.oversize to single or skip"
                )
        for p, _ in stream.members:
            self.oversize[self.pools[p].name] += int(np.count_nonzero(over))
        if config.oversize == "skip":
            kept = np.flatnonzero(~over)
            stream.members = [(p, kept if index is None else index[kept]) for p, index in stream.members]
            stream.n_atoms, stream.n_edges = stream.n_atoms[~over], stream.n_edges[~over]
            stream.sizes = Sizes.of(stream.n_atoms, stream.n_edges)

    def _require_something(self) -> None:
        for p, pool in enumerate(self.pools):
            if not any(p == member for stream in self._streams for member, _ in stream.members):
                raise InputError(
                    f"pool {pool.name}: all {len(pool)} frames are over the budget and data.plan.oversize is "
                    f"{self.config.oversize}; raise edge_budget (found {self.config.edge_budget})"
                )
        if self.config.atom_budget is None and not any(stream.sizes.most_edges for stream in self._streams):
            raise InputError("data.plan: no frame has an edge within the cutoff; give atom_budget to limit a batch")

    def _shares_by_start(self, steps: int | None) -> list[tuple[int, np.ndarray]]:
        """Return (first step, share of each stream) of every phase.

        Share of a pool: its weight, or size^(1/temperature). Of a paired stream: units × the largest rate per frame
        among its pools, so that proportional mixing draws every frame equally often whatever labels it has.
        """
        sizes = np.zeros(len(self.pools))
        for stream in self._streams:
            for p, _ in stream.members:
                sizes[p] += len(stream)
        weights = [pool.weight for pool in self.pools]
        given = [w for w in weights if w is not None]
        if given and len(given) < len(weights):
            without = [pool.name for pool in self.pools if pool.weight is None]
            raise InputError(
                f"data.plan.pools: weight is given for some pools and not for {', '.join(without)}; "
                "give it for all, or for none and set data.plan.temperature"
            )
        starts = {0}.union(*(w for w in given if isinstance(w, Mapping)))
        finish = self.config.finish
        if finish is not None:
            if steps is None:
                raise InputError("data.plan.finish: a plan with a last part needs the number of steps of the run")
            self.finish_start = self._finish_start(finish, steps)
            starts.add(self.finish_start)
        found = []
        for start in sorted(starts):
            wanted = (
                np.array([_weight_at(w, start) for w in given]) if given else sizes ** (1 / self.config.temperature)
            )
            in_finish = finish is not None and self.finish_start is not None and start >= self.finish_start
            if finish is not None and in_finish:
                wanted = wanted * [pool.fidelity in finish.fidelities for pool in self.pools]
            if not wanted.any():
                raise InputError(
                    f"data.plan.pools: no pool {'of data.plan.finish ' if in_finish else ''}has a weight above 0 from "
                    f"step {start} on"
                )
            rate = wanted / wanted.sum() / sizes
            shares = np.array([len(s) * max(rate[p] for p, _ in s.members) for s in self._streams])
            found.append((start, shares / shares.sum()))
        for stream, most in zip(self._streams, np.max([shares for _, shares in found], axis=0), strict=True):
            if finish is not None and most == 0:
                raise InputError(
                    f"data.plan.pools: {stream.name} would begin after step {self.finish_start}, from where on "
                    f"{', '.join(finish.fidelities)} are read alone (data.plan.finish); let it begin earlier, or leave "
                    "it out"
                )
        return found

    def _finish_start(self, finish: FinishConfig, steps: int) -> int:
        """Return the first step of the last part."""
        read = [s for s in self._streams if self.pools[s.members[0][0]].fidelity in finish.fidelities]
        edges = sum(len(s) * s.sizes.mean_edges for s in read)
        steps_a_pass = edges / self.config.edge_budget
        if self.config.atom_budget is not None:
            steps_a_pass = max(steps_a_pass, sum(len(s) * s.sizes.mean_atoms for s in read) / self.config.atom_budget)
        return max(1, steps - max(1, round(min(finish.part * steps, finish.passes * steps_a_pass))))

    def _expected_draws(self, shares: np.ndarray) -> int:
        edges = sum(share * s.sizes.mean_edges for share, s in zip(shares, self._streams, strict=True))
        atoms = sum(share * s.sizes.mean_atoms for share, s in zip(shares, self._streams, strict=True))
        n = self.config.edge_budget / edges if edges > 0 else np.inf
        if self.config.atom_budget is not None:
            n = min(n, self.config.atom_budget / atoms)
        if not np.isfinite(n):
            raise InputError("data.plan: at some time no frame that is drawn has an edge; give atom_budget")
        return int(1.1 * n + 3 * np.sqrt(n)) + 8

    def _phase(self, step: int) -> _Phase:
        return next(phase for phase in reversed(self._phases) if phase.start <= step)

    # Steps

    def start(self) -> Cursor:
        """Return the cursor before the first step."""
        return Cursor(0, ((0, 0),) * len(self._streams))

    def n_microbatches(self, world_size: int) -> int:
        """Return the microbatches of a step on every rank; constant in a run."""
        if self.config.edges_per_microbatch is None:
            return 1
        return -(-self.config.edge_budget // (world_size * self.config.edges_per_microbatch))

    def step(self, cursor: Cursor) -> tuple[StepPlan, Cursor]:
        """Return the systems of the step at ``cursor`` and the cursor of the next step. Has no side effect.

        Raises:
            InputError: the cursor is of a plan with other pools.
        """
        if len(cursor.streams) != len(self._streams):
            raise InputError(
                f"plan cursor with {len(cursor.streams)} pools, but the recipe has {len(self._streams)}; "
                "resume with the recipe of the checkpoint"
            )
        drawn = np.array([p * len(s) + q for (p, q), s in zip(cursor.streams, self._streams, strict=True)], np.int64)
        phase = self._phase(cursor.step)
        since = np.array(cursor.since or [0] * len(drawn), np.int64)
        if phase.start and cursor.step == phase.start:
            since = drawn
        n_draws = phase.guess
        while True:
            stream, unit, fits = self._sequence(phase.shares, drawn, since, n_draws)
            if not fits.all():
                break
            n_draws *= 2
        # A unit over the budget (policy single) fits nowhere: it is alone in its step.
        n_taken = max(1, int(np.argmin(fits)))
        stream, unit = stream[:n_taken], unit[:n_taken]
        drawn = drawn + np.bincount(stream, minlength=len(self._streams))
        after = tuple(divmod(int(d), len(s)) for d, s in zip(drawn, self._streams, strict=True))
        before = tuple(since.tolist()) if phase.start else ()
        return self._systems(cursor.step, stream, unit), Cursor(cursor.step + 1, after, before)

    def _sequence(
        self, shares: np.ndarray, drawn: np.ndarray, since: np.ndarray, n_draws: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return stream and unit of about ``n_draws`` next draws, and whether each still fits the budgets."""
        numbers, times = [], []
        for share, first, d in zip(shares.tolist(), since.tolist(), drawn.tolist(), strict=True):
            numbers.append(d + np.arange(int(share * n_draws) + 2 if share else 0))
            times.append((numbers[-1] - first + 0.5) / (share or 1.0))
        horizon = min(t[-1] for t in times if len(t))  # up to here no stream lacks a draw
        lengths = [int(np.searchsorted(t, horizon, side="right")) for t in times]
        order = np.argsort(np.concatenate([t[:n] for t, n in zip(times, lengths, strict=True)]), kind="stable")
        units, edges, atoms = [], [], []
        for s, number, n in zip(self._streams, numbers, lengths, strict=True):
            unit = s.units(number[:n], self.config.block_frames)
            units.append(unit)
            edges.append(s.n_edges[unit])
            atoms.append(s.n_atoms[unit])
        fits = np.cumsum(np.concatenate(edges)[order]) <= self.config.edge_budget
        if self.config.atom_budget is not None:
            fits &= np.cumsum(np.concatenate(atoms)[order]) <= self.config.atom_budget
        return np.repeat(np.arange(len(lengths)), lengths)[order], np.concatenate(units)[order], fits

    def _systems(self, step: int, stream: np.ndarray, unit: np.ndarray) -> StepPlan:
        """Return the systems of the drawn units, in the order of the draws."""
        parts: list[list[np.ndarray]] = []
        for s, source in enumerate(self._streams):
            places = np.flatnonzero(stream == s)
            for p, index in source.members:
                pool, chosen = self.pools[p], unit[places] if index is None else index[unit[places]]
                number = np.full(len(places), p)
                fidelity = np.full(len(places), pool.fidelity_idx)
                sizes = [pool.n_atoms[chosen], pool.n_edges[chosen]]
                parts.append([places, pool.rows[chosen], fidelity, number, *sizes, pool.live[chosen]])
        places, rows, fidelity_idx, pool_idx, n_atoms, n_edges, live = (
            np.concatenate(column) for column in zip(*parts, strict=True)
        )
        order = np.lexsort((pool_idx, places))
        counts: LabelCounts = {}
        for prop in PROPERTIES:
            on = (live & bit(prop)) != 0
            for f in np.unique(fidelity_idx[on]).tolist():
                chosen = on & (fidelity_idx == f)
                counts[f, prop] = int(n_components(prop, n_atoms[chosen].astype(np.int64)).sum())
        return StepPlan(
            step=step,
            rows=rows[order],
            fidelity_idx=fidelity_idx[order],
            pool=pool_idx[order],
            n_atoms=n_atoms[order].astype(np.int64),
            n_edges=n_edges[order].astype(np.int64),
            live=live[order],
            counts=counts,
        )

    # What a run wants to know beforehand

    def shares(self, step: int = 0) -> dict[str, float]:
        """Return the share of each stream in the draws of a step, by stream name."""
        return {s.name: float(share) for s, share in zip(self._streams, self._phase(step).shares, strict=True)}

    def draws_per_step(self, step: int = 0) -> float:
        """Return the mean draws per step over the first steps of a step's phase."""
        cursor = Cursor(self._phase(step).start, ((0, 0),) * len(self._streams))
        for _ in range(_STEPS_TO_MEASURE):
            _, cursor = self.step(cursor)
        return sum(p * len(s) + q for (p, q), s in zip(cursor.streams, self._streams, strict=True)) / _STEPS_TO_MEASURE

    def expected_counts(self, step: int) -> dict[tuple[int, Property], float]:
        """Return the mean live label components of a step in its phase: measured draws per step × the exact mean of a
        draw, so that a rare fidelity's count is not a matter of luck."""
        phase = self._phase(step)
        if phase.start not in self._expected:
            self._expected[phase.start] = self._counts_of(phase.shares * self.draws_per_step(step))
        return self._expected[phase.start]

    def _counts_of(self, draws: np.ndarray) -> dict[tuple[int, Property], float]:
        """Return the mean live label components of so many draws of each stream."""
        counts: dict[tuple[int, Property], float] = {}
        for n_draws, stream in zip(draws.tolist(), self._streams, strict=True):
            for p, index in stream.members:
                pool = self.pools[p]
                for prop in pool.properties:
                    on = (_of_units(pool.live, index) & bit(prop)) != 0
                    total = int(n_components(prop, _of_units(pool.n_atoms, index)[on].astype(np.int64)).sum())
                    if total and n_draws:
                        key = (pool.fidelity_idx, prop)
                        counts[key] = counts.get(key, 0.0) + n_draws * total / len(stream)
        return counts

    def passes(self, cursor: Cursor) -> dict[str, float]:
        """Return how many times each stream has been gone through."""
        return {s.name: p + q / len(s) for (p, q), s in zip(cursor.streams, self._streams, strict=True)}

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what the order of the draws depends on; how a step is partitioned is not part of it."""
        config, (first, *later) = self.config, self._phases
        digest = hashlib.sha256()
        settings = {
            "version": 1,
            "seed": self.seed,
            "paired": config.paired,
            "edge_budget": config.edge_budget,
            "atom_budget": config.atom_budget,
            "streams": [[s.name, share, len(s)] for s, share in zip(self._streams, first.shares.tolist(), strict=True)],
            "pools": [[p.name, p.fidelity, p.fidelity_idx, len(p), list(p.properties)] for p in self.pools],
        }
        if config.block_frames is not None:
            settings["block_frames"] = config.block_frames
        if later:
            settings["phases"] = [[phase.start, phase.shares.tolist()] for phase in later]
        digest.update(json.dumps(settings, sort_keys=True).encode())
        for pool in self.pools:
            if len(pool) >= LARGE:  # its digest is kept with its columns
                digest.update(pool.digest.encode())
                continue
            for name, dtype in COLUMNS.items():
                digest.update(np.ascontiguousarray(getattr(pool, name), dtype=dtype).data)
        for stream in self._streams:
            for p, index in stream.members:
                digest.update(np.array(p, "<i8").tobytes())
                if index is not None:
                    digest.update(np.ascontiguousarray(index, dtype="<i8").data)
        return digest.hexdigest()


def _weight_at(weight: float | Mapping[int, float], step: int) -> float:
    return weight[max(s for s in weight if s <= step)] if isinstance(weight, Mapping) else weight


def n_components(prop: Property, n_atoms: np.ndarray) -> np.ndarray:
    """Return the number of label components of systems of these sizes."""
    if prop == ENERGY:
        return np.ones_like(n_atoms)
    return 3 * n_atoms if prop == FORCES else np.full_like(n_atoms, 9)


def _of_units(column: np.ndarray, index: np.ndarray | None) -> np.ndarray:
    return column if index is None else column[index]


def _single_streams(pools: Sequence[Pool]) -> list[_Stream]:
    return [_Stream(pool.name, [(p, None)], pool.n_atoms, pool.n_edges, pool.sizes) for p, pool in enumerate(pools)]


def _paired_streams(pools: Sequence[Pool]) -> list[_Stream]:
    """One stream for every set of pools in which a frame occurs."""
    rows = np.unique(np.concatenate([pool.rows for pool in pools]))
    place = np.full((len(pools), len(rows)), -1, np.int64)  # index of a frame in a pool
    for p, pool in enumerate(pools):
        place[p, np.searchsorted(rows, pool.rows)] = np.arange(len(pool))
    patterns, which = np.unique(place >= 0, axis=1, return_inverse=True)
    streams = []
    for number in range(patterns.shape[1] - 1, -1, -1):
        frames = np.flatnonzero(which.ravel() == number)
        inside = [int(p) for p in np.flatnonzero(patterns[:, number])]
        indices = [place[p, frames] for p in inside]
        members: list[tuple[int, np.ndarray | None]] = [*zip(inside, indices, strict=True)]
        n_atoms = np.stack([_of_units(pools[p].n_atoms, index) for p, index in members]).sum(axis=0, dtype=np.int64)
        n_edges = np.stack([_of_units(pools[p].n_edges, index) for p, index in members]).sum(axis=0, dtype=np.int64)
        streams.append(
            _Stream("+".join(pools[p].name for p in inside), members, n_atoms, n_edges, Sizes.of(n_atoms, n_edges))
        )
    return streams
