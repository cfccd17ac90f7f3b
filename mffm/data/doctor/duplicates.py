"""The same structure more than once: duplicates, conflicting labels, leaks between splits and sources."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

from mffm.data.checks import SAME_LABEL, Finding, Severity
from mffm.data.doctor.fingerprint import NEAR, SAME, Tables, difference, tables
from mffm.data.doctor.inputs import Frames
from mffm.data.doctor.scan import Columns
from mffm.frame import Frame
from mffm.keys import ENERGY, FORCES, STRESS

EXAMPLES = 20  # frames a finding names
_NEIGHBORS = 8  # candidates that a frame is compared with
_NEAR_TRIED = 3  # of them, where only nearly the same is possible
_STIFFEST = 100.0  # eV/Å²: what a distance that differs by 1 Å may do to a force (a C=O bond has 90)
_SHIFT_PAIRS = 3  # conflicts between two sources from which a constant shift between them is one finding


class Match(NamedTuple):
    """Two rows and the largest difference of their sorted distances, Å."""

    a: int
    b: int
    difference: float


def matches(frames: Frames, columns: Columns, within: float = NEAR) -> Iterator[Match]:
    """Yield pairs of rows that are the same structure within ``within`` Å, each once, single atoms included.

    Of a frame the 8 nearest candidates are compared where they may be the same, 3 where they may be nearly the same.
    """
    cached = _cached(frames)
    for rows in _by_key(columns.key):
        if len(rows) < 2:
            continue
        x = columns.features[rows]
        # Many copies of one point would be each other's nearest 8 and split into clusters: copies hang on the first.
        _, first, copy_of = np.unique(x, axis=0, return_index=True, return_inverse=True)
        copy_of = copy_of.reshape(-1)
        for i in np.flatnonzero(first[copy_of] != np.arange(len(rows))).tolist():
            found = difference(cached(int(rows[first[copy_of[i]]])), cached(int(rows[i])))
            if found <= within:
                yield Match(int(rows[first[copy_of[i]]]), int(rows[i]), found)
        if len(first) > 1:
            yield from _of_points(cached, rows[first], x[first], rows[first], x[first], within)


def matches_between(
    frames: Frames, columns: Columns, other: Frames, other_columns: Columns, within: float = NEAR
) -> Iterator[Match]:
    """Yield (row, row of ``other``, difference) of structures that are in both."""
    cached, other_cached = _cached(frames), _cached(other)
    theirs = {int(other_columns.key[rows[0]]): rows for rows in _by_key(other_columns.key)}
    for rows in _by_key(columns.key):
        found = theirs.get(int(columns.key[rows[0]]))
        if found is not None:
            yield from _of_points(
                cached, rows, columns.features[rows], found, other_columns.features[found], within, other_cached
            )


def _cached(frames: Frames) -> "_Cached":
    return lru_cache(maxsize=4096)(lambda row: tables(frames.frame(row)))  # type: ignore[return-value]


class _Cached:
    """A function row → tables, which remembers; what ``lru_cache`` returns."""

    def __call__(self, row: int) -> Tables: ...  # type: ignore[empty-body]


def _by_key(key: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the rows of each key, ascending."""
    if len(key):
        order = np.argsort(key, kind="stable")
        yield from np.split(order, np.flatnonzero(np.diff(key[order])) + 1)


def _of_points(
    cached: "_Cached", rows: np.ndarray, x: np.ndarray, others: np.ndarray, y: np.ndarray, within: float,
    other_cached: "_Cached | None" = None,
) -> Iterator[Match]:  # fmt: skip
    """Yield the matches of points ``x`` [n, N_FEATURES] among ``y``; those of one set with itself where no
    ``other_cached`` is given.
    """
    itself = other_cached is None
    k = min(_NEIGHBORS + itself, len(others))
    limit = within * (1 + 1e-3) + 1e-5  # features are float32
    distances, indices = cKDTree(y).query(x, k=k, p=np.inf, distance_upper_bound=limit)
    distances, indices = distances.reshape(len(x), k), indices.reshape(len(x), k)
    for i in np.flatnonzero(np.isfinite(distances[:, int(itself and k > 1)])).tolist():
        tried = 0
        for distance, j in zip(distances[i].tolist(), indices[i].tolist(), strict=True):
            if not np.isfinite(distance):
                break
            if itself and (j == i or (j < i and i in indices[j])):  # the pair was compared from the other side
                continue
            if distance > SAME:
                tried += 1
                if tried > _NEAR_TRIED:
                    break
            found = difference(cached(int(rows[i])), (other_cached or cached)(int(others[j])))
            if found <= within:
                yield Match(int(rows[i]), int(others[j]), found)


class _Union:
    """Groups of rows that are linked."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}

    def root(self, row: int) -> int:
        path = []
        while self.parent.setdefault(row, row) != row:
            path.append(row)
            row = self.parent[row]
        for passed in path:
            self.parent[passed] = row
        return row

    def join(self, a: int, b: int) -> None:
        a, b = self.root(a), self.root(b)
        self.parent[max(a, b)] = min(a, b)

    def groups(self) -> list[list[int]]:
        found: dict[int, list[int]] = defaultdict(list)
        for row in sorted(self.parent):
            found[self.root(row)].append(row)
        return [rows for _, rows in sorted(found.items()) if len(rows) > 1]


def check_duplicates(frames: Frames, columns: Columns) -> list[Finding]:
    """Return what is there twice: duplicates, nearly the same, conflicts, overlaps of sources, leaks between splits,
    and shifts between two sources that label the same structures.
    """
    union = _Union()
    near: list[Match] = []
    worst: dict[int, float] = {}  # row → largest difference to one of its copies, Å
    for match in matches(frames, columns):
        if match.difference <= SAME:
            union.join(match.a, match.b)
            worst[match.a] = worst[match.b] = max(match.difference, worst.get(match.a, 0.0))
        else:
            near.append(match)
    groups = union.groups()
    findings = _conflicts(frames, columns, groups, worst)
    findings += _same(frames, columns, groups)
    apart = [m for m in near if union.root(m.a) != union.root(m.b)]
    return findings + _near(frames, columns, apart) + _shared_ids(frames, columns)


def _names(rows: Sequence[int], of: np.ndarray, names: Sequence[str]) -> list[str]:
    return sorted({names[of[row]] for row in rows if of[row] >= 0})


def _places(frames: Frames, rows: Sequence[int]) -> str:
    return " = ".join(frames.place(row) for row in rows[:6]) + (f" and {len(rows) - 6} more" if len(rows) > 6 else "")


def _same(frames: Frames, columns: Columns, groups: list[list[int]]) -> list[Finding]:
    """Sort groups of one structure into leaks between splits, overlaps of sources, and duplicates of one source."""
    leaks: dict[tuple[str, ...], list[list[int]]] = defaultdict(list)
    overlaps: dict[tuple[str, ...], list[list[int]]] = defaultdict(list)
    inside: dict[tuple[str, ...], list[list[int]]] = defaultdict(list)
    isolated = columns.isolated  # they belong into every set: told, not judged
    atoms: dict[tuple[str, ...], int] = defaultdict(int)
    for rows in groups:
        splits = _names(rows, columns.split, columns.split_names)
        sources = _names(rows, columns.source, columns.source_names)
        if isolated[rows[0]]:
            atoms[tuple(sources)] += 1
            continue
        if len(splits) > 1:
            leaks[tuple(splits)].append(rows)
        if len(sources) > 1:
            overlaps[tuple(sources)].append(rows)
        elif len(splits) < 2:
            inside[tuple(sources)].append(rows)
    findings = []
    for splits_of, found in leaks.items():
        findings.append(
            Finding(
                "leak", "", f"{are(len(found))} in more than one split: {' and '.join(splits_of)}", "error",
                _evidence(frames, found), "keep each in one split; an ingest does so for the same order of atoms",
            )
        )  # fmt: skip
    for sources_of, found in overlaps.items():
        findings.append(
            Finding(
                "overlap", "",
                f"{are(len(found), _and_atoms(atoms[sources_of]))} in {' and '.join(sources_of)}", "warning",
                _evidence(frames, found), "if one is for testing, take them out of the other; to train on both, ingest "
                "them into one store, which merges what has the same order of atoms",
            )
        )  # fmt: skip
    for (name,), found in inside.items():
        extra = sum(len(rows) - 1 for rows in found)
        findings.append(
            Finding(
                "duplicates", "", f"{name}: {are(len(found))} there more than once, {extra} frames too many",
                "note", _evidence(frames, found), "an ingest merges those with the same order of atoms",
            )
        )  # fmt: skip
    return findings


def are(n: int, aside: str = "") -> str:
    """Return "1 structure is" or "2 structures are", with a remark after the noun."""
    return f"{n} structure{aside} is" if n == 1 else f"{n} structures{aside} are"


def _and_atoms(n: int) -> str:
    return f" (and {n} isolated atom{'' if n == 1 else 's'})" if n else ""


def _evidence(frames: Frames, groups: list[list[int]]) -> tuple[tuple[str, str], ...]:
    return tuple((frames.place(rows[0]), f"the same as {_places(frames, rows[1:])}") for rows in groups[:EXAMPLES])


def _near(frames: Frames, columns: Columns, found: list[Match]) -> list[Finding]:
    if not found:
        return []
    found.sort(key=lambda m: m.difference)
    crossing = [m for m in found if -1 < columns.split[m.a] != columns.split[m.b] > -1]
    inside = [m for m in found if not -1 < columns.split[m.a] != columns.split[m.b] > -1]
    kinds: list[tuple[list[Match], str, Severity, str, str]] = [
        (crossing, "near_leak", "warning", "are nearly the same and in two splits", "split by group or trajectory"),
        (inside, "near_duplicates", "note", "are nearly the same", "steps of one trajectory: thin them out"),
    ]
    findings = []
    for chosen, check, severity, where, remedy in kinds:
        if chosen:
            evidence = tuple(
                (frames.place(m.a), f"{m.difference:.4f} Å from {frames.place(m.b)}") for m in chosen[:EXAMPLES]
            )
            message = f"{len(chosen)} pairs of structures {where}: every distance within {NEAR:g} Å"
            findings.append(Finding(check, "", message, severity, evidence, remedy))
    return findings


def _shared_ids(frames: Frames, columns: Columns) -> list[Finding]:
    """Report ids of materials or trajectories that two plain files share."""
    of_group: dict[int, set[int]] = defaultdict(set)
    row_of: dict[tuple[int, int], int] = {}
    with_ids = {i for i, name in enumerate(columns.source_names) if name in frames.id_keys}
    for row in np.flatnonzero((columns.group >= 0) & np.isin(columns.source, list(with_ids))).tolist():
        group, source = int(columns.group[row]), int(columns.source[row])
        of_group[group].add(source)
        row_of.setdefault((group, source), row)
    shared: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for group, there in of_group.items():
        if len(there) > 1:
            shared[tuple(sorted(there))].append(group)
    findings = []
    for sources, groups in shared.items():
        names = [columns.source_names[s] for s in sources]
        key = frames.id_keys[names[0]]
        evidence = tuple(
            (columns.group_names[g], " and ".join(frames.place(row_of[g, s]) for s in sources))
            for g in groups[:EXAMPLES]
        )
        findings.append(
            Finding(
                "shared_ids", "", f"{len(groups)} values of {key} are in {' and '.join(names)}", "warning", evidence,
                f"frames of one id are alike: split by it (group_key: {key}, splits.by: group)",
            )
        )  # fmt: skip
    return findings


class _Conflict(NamedTuple):
    fidelity: str
    what: str  # energy, forces or stress
    a: int
    b: int
    per_atom: float  # energy of b less that of a, eV an atom; NaN where the energies agree
    text: str


def _conflicts(
    frames: Frames, columns: Columns, groups: list[list[int]], worst: dict[int, float]
) -> list[Finding]:  # fmt: skip
    """Report labels that contradict each other: one by one, or as a shift between two sources."""
    found: list[_Conflict] = []
    for rows in groups:
        first: dict[str, tuple[int, Frame]] = {}
        for row in rows:
            frame = frames.frame(row)
            for fidelity in {f for f, _ in frame.labels}:
                if fidelity not in first:
                    first[fidelity] = (row, frame)
                    continue
                other_row, other = first[fidelity]
                conflict = _contradiction(fidelity, other, frame, worst.get(row, 0.0))
                if conflict is not None:
                    found.append(_Conflict(fidelity, conflict[0], other_row, row, *conflict[1:]))
    shifts, rest = _shifts(frames, columns, found)
    for fidelity in dict.fromkeys(c.fidelity for c in rest):
        mine = [c for c in rest if c.fidelity == fidelity]
        evidence = tuple((f"{frames.place(c.a)} and {frames.place(c.b)}", c.text) for c in mine[:EXAMPLES])
        what = " and ".join(sorted({c.what for c in mine}))
        shifts.append(
            Finding(
                "conflict", fidelity, f"{len(mine)} pairs of frames are the same structure with different {what}",
                "error", evidence, "find out which is right and leave the other out; an ingest keeps the first",
            )
        )  # fmt: skip
    return shifts


def _contradiction(fidelity: str, a: Frame, b: Frame, apart: float) -> tuple[str, float, str] | None:
    """Return (property, energy difference an atom, both values) of two frames of one structure, or None.

    Labels are compared by what a rotation and another order leave: energy, sorted lengths of the forces, eigenvalues of
    the stress. Cells of another size are not compared: their k-points differ.
    """
    if a.n_atoms != b.n_atoms:
        return None
    n = a.n_atoms
    x, y = a.labels.get((fidelity, ENERGY)), b.labels.get((fidelity, ENERGY))
    lengths = [
        None if f is None else np.sort(np.linalg.norm(f, axis=1))
        for f in (frame.labels.get((fidelity, FORCES)) for frame in (a, b))
    ]
    steep = max((float(f.max()) for f in lengths if f is not None), default=0.0)
    if x is not None and y is not None:
        gap = float(y) - float(x)
        if abs(gap) > SAME_LABEL[ENERGY] * n + 1e-6 * abs(float(x)) + steep * apart * n:
            return ENERGY, gap / n, f"energy {float(x):.8g} and {float(y):.8g} eV"
    f, g = lengths
    if f is not None and g is not None:
        off = np.abs(f - g)
        k = int(off.argmax())
        if off[k] > SAME_LABEL[FORCES] + 1e-6 * steep + _STIFFEST * apart:
            return FORCES, float("nan"), f"lengths of forces {f[k]:.6g} and {g[k]:.6g} eV/Å"
    s, t = (frame.labels.get((fidelity, STRESS)) for frame in (a, b))
    if s is not None and t is not None:
        u, v = np.linalg.eigvalsh(s), np.linalg.eigvalsh(t)
        k = int(np.abs(u - v).argmax())
        if abs(u[k] - v[k]) > SAME_LABEL[STRESS] + 1e-3 * float(np.abs(u).max()) + apart:
            return STRESS, float("nan"), f"principal stress {u[k]:.6g} and {v[k]:.6g} eV/Å³"
    return None


def _shifts(frames: Frames, columns: Columns, found: list[_Conflict]) -> tuple[list[Finding], list[_Conflict]]:
    """Take out conflicts that are one shift an atom between two sources: two levels of theory under one name."""
    by_pair: dict[tuple[str, int, int], list[_Conflict]] = defaultdict(list)
    for c in found:
        sources = int(columns.source[c.a]), int(columns.source[c.b])
        if sources[0] != sources[1] and np.isfinite(c.per_atom):
            by_pair[c.fidelity, min(sources), max(sources)].append(c)
    findings: list[Finding] = []
    explained: set[int] = set()
    for (fidelity, a, b), conflicts in by_pair.items():
        shift = np.array([c.per_atom if columns.source[c.a] == a else -c.per_atom for c in conflicts])
        if len(shift) < _SHIFT_PAIRS or shift.std() > 0.25 * abs(shift.mean()):
            continue
        explained.update(id(c) for c in conflicts)
        findings.append(
            Finding(
                "level_of_theory", fidelity,
                f"{len(shift)} structures that {columns.source_names[a]} and {columns.source_names[b]} share have "
                f"energies that differ by {shift.mean():+.4g} ± {shift.std():.2g} eV/atom", "error",
                tuple((f"{frames.place(c.a)} and {frames.place(c.b)}", c.text) for c in conflicts[:EXAMPLES]),
                "two levels of theory (functional, code, pseudopotentials, corrections): declare two fidelities",
            )
        )  # fmt: skip
    return findings, [c for c in found if id(c) not in explained]
