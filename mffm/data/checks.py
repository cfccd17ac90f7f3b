"""One set of checks for ingest and whatever looks at data later.

Checks of a frame say why it must be left out (a reason with the value, or ""). Checks of a set cannot be certain, so
they give a ``Finding`` with its evidence: units, signs, outliers, leaks between splits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from mffm.data.identity import complete_cell, lookup_keys, same_geometry
from mffm.frame import Frame
from mffm.keys import ENERGY, FORCES, N_ELEMENTS, Property

if TYPE_CHECKING:
    from mffm.data.packed import Packed
    from mffm.data.records import Geometry
    from mffm.data.store import Store

# Two labels of one (structure, fidelity, property) closer than this are the same label printed or converged
# differently: energy in eV per atom, forces in eV/Å, stress in eV/Å³.
PAIRS_TOLD = 10  # of structures in two splits, in a message
SAME_LABEL = {"energy": 1e-4, "forces": 2e-3, "stress": 2e-4}
THINNEST = (
    0.1  # Å between lattice planes; crystals have 1 and more, and below it neighbor lists need thousands of images
)
_DENSE_ATOMS = 300  # up to here all pairs at once (45 000 of them); beyond, a neighbor list


@lru_cache(maxsize=64)  # 64 tables of at most 0.7 MB
def _pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the upper triangle of an n × n table."""
    i, j = np.triu_indices(n, 1)
    return i, j


def cell_fault(cell: np.ndarray, pbc: np.ndarray) -> str:
    """Return why a cell [3, 3] cannot carry its periodicity [3], or ""."""
    if not pbc.any():
        return ""
    vectors = cell[pbc]
    gram = vectors @ vectors.T
    lengths = np.sqrt(np.diagonal(gram))
    # The criterion of the neighbor list: volume relative to a right-angled cell of the same edges.
    if lengths.min() < 1e-6 or np.linalg.det(gram) < (1e-6 * lengths.prod()) ** 2:
        size = "zero volume" if pbc.all() else "zero extent"
        return f"periodic along {''.join('xyz'[i] for i in range(3) if pbc[i])} with a cell of {size}: {cell.tolist()}"
    apart = 1 / np.sqrt(np.diagonal(np.linalg.inv(gram)).max())
    if apart < THINNEST:
        return f"lattice planes {apart:.3g} Å apart, closer than {THINNEST:g} Å: cell {cell.tolist()}"
    return ""


def closest_pair(
    positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray, within: float
) -> tuple[float, int, int] | None:
    """Return (distance in Å, i, j) of the closest two atoms if closer than ``within`` Å, periodic images included."""
    n = len(positions)
    full = complete_cell(cell, pbc)
    inverse = np.linalg.inv(full)
    # A vector shorter than `within` has fractional components below within * |reciprocal vector|. Below one half, the
    # image that rounding picks is the only candidate, in a skewed cell too, and no atom meets its own image.
    reach = within * np.sqrt((inverse * inverse).sum(0))
    if n > _DENSE_ATOMS or (reach[pbc] >= 0.5).any():
        from mffm.data.neighbors import neighbor_list

        i, j, shift = neighbor_list(positions, cell, pbc, within)
        if len(i) == 0:
            return None
        distance = np.linalg.norm(positions[j] - positions[i] + shift @ cell, axis=1)
        k = int(distance.argmin())
        return float(distance[k]), int(i[k]), int(j[k])
    if n < 2:
        return None
    i, j = _pairs(n)
    coordinates = (positions @ inverse).T if pbc.any() else positions.T
    limits = reach if pbc.any() else (within,) * 3
    delta: list[np.ndarray] = []
    # Axis by axis, keeping only pairs that may still be close: after the first axis few are left.
    for axis in range(3):
        x = coordinates[axis]
        difference = x[j] - x[i]
        if pbc[axis]:
            difference -= np.rint(difference)
        keep = np.flatnonzero(np.abs(difference) < limits[axis])
        if len(keep) == 0:
            return None
        i, j = i[keep], j[keep]
        delta = [d[keep] for d in (*delta, difference)]
    vectors = np.stack(delta, 1) @ full if pbc.any() else np.stack(delta, 1)
    distance = np.sqrt((vectors * vectors).sum(1))
    k = int(distance.argmin())
    return (float(distance[k]), int(i[k]), int(j[k])) if distance[k] < within else None


def frame_fault(frame: Frame, min_distance: float) -> str:
    """Return why a frame must be left out, or "": elements, finite values, shapes, cell, overlapping atoms."""
    numbers, n = frame.atomic_numbers, frame.n_atoms
    if n == 0:
        return "no atoms"
    if numbers.min() < 1 or numbers.max() > N_ELEMENTS:
        return f"atomic number {int(numbers.max()) if numbers.max() > N_ELEMENTS else 0} is outside 1..{N_ELEMENTS}"
    if not (np.isfinite(frame.positions).all() and np.isfinite(frame.cell).all()):
        return "positions or cell are not finite"
    for (fidelity, prop), value in frame.labels.items():
        reason = label_fault(prop, value, n)
        if reason:
            return f"{fidelity} {prop}: {reason}"
    reason = cell_fault(frame.cell, frame.pbc)
    if reason:
        return reason
    pair = closest_pair(frame.positions, frame.cell, frame.pbc, min_distance)
    if pair is not None:
        return f"atoms {pair[1]} and {pair[2]} are {pair[0]:.3f} Å apart, closer than min_distance {min_distance:g} Å"
    return ""


def label_fault(prop: Property, value: np.ndarray, n_atoms: int) -> str:
    """Return what is wrong with a label's shape or values, or ""."""
    expected = () if prop == ENERGY else (n_atoms, 3) if prop == FORCES else (3, 3)
    if np.shape(value) != expected:
        return f"expected shape {list(expected)}, found {list(np.shape(value))}"
    if not np.isfinite(value).all():
        bad = np.argwhere(~np.isfinite(value))
        place = f" at {bad[0].tolist()}" if bad.shape[1] else ""
        return f"{np.asarray(value)[tuple(bad[0])]}{place}"
    return ""


def conflict(prop: Property, old: np.ndarray, new: np.ndarray, n_atoms: int) -> str:
    """Return how two labels of the same structure, fidelity and property contradict each other, with both values, or
    "".
    """
    difference = np.abs(np.asarray(new, np.float64) - np.asarray(old, np.float64))
    allowed = SAME_LABEL[prop] * (n_atoms if prop == ENERGY else 1)
    # Large values are printed with few digits and kept as float32: 1e-6 relative is the same value.
    worst = int(np.argmax(difference - allowed - 1e-6 * np.abs(old)))
    if difference.flat[worst] <= allowed + 1e-6 * abs(old.flat[worst]):
        return ""
    return f"{new.flat[worst]:.8g} contradicts {old.flat[worst]:.8g}, which the same structure already has"


Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Finding:
    """Something that looks wrong in a set, with what speaks for it.

    Attributes:
        check: energy_unit, relative_energies, forces, stress_sign, stress_unit, outliers, leak; the doctor has more.
        severity: error: a training on it is misled; warning: to be looked at; note: to be known.
        evidence: (place, what is there) of the frames that show it, the worst first.
        remedy: what to do, where the message does not say it.
    """

    check: str
    fidelity: str
    message: str
    severity: Severity = "warning"
    evidence: tuple[tuple[str, str], ...] = ()
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.fidelity}: {self.message}" if self.fidelity else self.message


SAMPLE = 4000  # frames a fidelity that the checks of a set read: 50 ms, and enough for a correlation
# What one unit read as eV does to a number (CODATA 2018).
_PER_EV = {
    "Hartree": 1 / 27.211386,
    "Rydberg": 1 / 13.605693,
    "kcal/mol": 23.060548,
    "kJ/mol": 96.485332,
    "meV": 1000.0,
}
_FORCES_PER_EV = {
    "Hartree/bohr": 1 / 51.422067,
    "Hartree/Angstrom": 1 / 27.211386,
    "eV/bohr": 0.52917721,
    "kcal/mol/Angstrom": 23.060548,
    "kJ/mol/Angstrom": 96.485332,
    "kJ/mol/nm": 964.85332,
}
LARGE_FORCE = 100.0  # eV/Å
CERTAIN = 0.8  # r² or |correlation| from which a wrong unit or sign is an error
SOFTEST = 6e-3  # eV/Å³, 1 GPa: half of water's bulk modulus
STIFFEST = 6.0  # eV/Å³, 960 GPa: twice the bulk modulus of diamond


def thomas_fermi_scott(z: np.ndarray) -> np.ndarray:
    """Return all-electron energies of atoms in Hartree, within 1 % for Z > 2 (Schwinger 1981): -0.7687 Z^7/3 + Z²/2
    - 0.2699 Z^5/3.
    """
    z = np.asarray(z, np.float64)
    return -0.768745 * z ** (7 / 3) + 0.5 * z**2 - 0.269900 * z ** (5 / 3)


def element_fit(counts: np.ndarray, energies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return element energies [N_ELEMENTS + 1] (least squares, eV) and residuals [n] in eV per atom."""
    n_atoms = counts.sum(1, keepdims=True)
    solution = np.linalg.lstsq(counts / n_atoms, energies / n_atoms[:, 0], rcond=1e-8)[0]
    return solution, (energies - counts @ solution) / n_atoms[:, 0]


def far_from_fit(residual: np.ndarray) -> tuple[np.ndarray, float]:
    """Return which residuals [n] (eV per atom) of an element fit are outliers, and their width.

    The width is 1.4826 × the median deviation (of a normal distribution its sigma). An outlier is more than 20 widths
    and more than 0.5 eV per atom from the median.
    """
    distance = np.abs(residual - np.median(residual))
    width = 1.4826 * float(np.median(distance))
    return distance > max(20 * width, 0.5), width


def check_store(store: "Store") -> list[Finding]:
    """Return the findings of every check on a sample of every fidelity."""
    findings = []
    for fidelity in store.fidelities.names:
        has = store.has(fidelity, ENERGY)
        rows = np.flatnonzero(has)
        if len(rows) < 4:
            continue
        rows = rows[:: max(1, len(rows) // SAMPLE)][:SAMPLE]
        # Neighbours in the source are often close in geometry: a second sample in runs of 40 keeps them together.
        runs = np.unique(
            np.concatenate([np.arange(s, min(s + 40, store.n_frames)) for s in rows[:: max(1, len(rows) // 50)]])
        )
        findings += check_sample(fidelity, store.composition(rows), store.energies(fidelity, rows), rows)
        findings += check_derivatives(fidelity, store.read(runs[has[runs]], fidelity))
        findings += check_large_forces(fidelity, store.read(rows, fidelity), rows)
    return findings + split_leaks(store)


def check_sample(fidelity: str, counts: np.ndarray, energies: np.ndarray, rows: np.ndarray) -> list[Finding]:
    """Check energies by their size: unit, relative energies, outliers of the element-reference fit.

    Args:
        counts: [n, N_ELEMENTS + 1]. energies: [n], eV. rows: [n], for messages.
    """
    findings = []
    n_atoms = counts.sum(1)
    ratio = energies / (counts[:, 1:] @ thomas_fermi_scott(np.arange(1, N_ELEMENTS + 1)))
    middle = float(np.median(ratio))
    spread = float(np.subtract(*np.percentile(ratio, [75, 25])))
    for unit, expected in (("Hartree", 1.0), ("kcal/mol", 627.5095), ("kJ/mol", 2625.4996)):
        if abs(middle / expected - 1) < 0.04 and spread < 0.04 * expected:
            findings.append(
                Finding(
                    "energy_unit",
                    fidelity,
                    f"energies look like {unit} read as eV: energy / all-electron atomic energies in Hartree has "
                    f"median {middle:.4g} over {len(rows)} frames (27.2 were eV); "
                    f"give labels.{fidelity}.energy.unit: {unit}",
                    "error",
                )
            )
    _, residual = element_fit(counts, energies)
    far, width = far_from_fit(residual)
    if width > 2.0:
        findings.append(
            Finding(
                "energy_unit",
                fidelity,
                f"after the element-reference fit energies still scatter by {width:.3g} eV/atom (chemistry: below 1); "
                "a wrong unit (kcal/mol read as eV: ×23), or structures that do not belong together",
            )
        )
    n_far = int(far.sum())
    if n_far:
        worst = int(np.abs(residual - np.median(residual)).argmax())
        findings.append(
            Finding(
                "outliers",
                fidelity,
                f"{n_far} of {len(rows)} sampled energies are more than 20 median deviations "
                f"({20 * width:.3g} eV/atom) from the element-reference fit; "
                f"farthest: row {int(rows[worst])}, {residual[worst]:.3g} eV/atom",
            )
        )
    if float(np.median(np.abs(energies) / n_atoms)) < 0.5 and float(energies.std()) > 0:
        findings.append(
            Finding(
                "relative_energies",
                fidelity,
                f"energies look relative to some zero (median {np.median(energies):.3g} eV): "
                "fine within one composition, not comparable between compositions",
                "note" if (counts == counts[0]).all() else "warning",
            )
        )
    return findings


def check_large_forces(fidelity: str, packed: "Packed", rows: np.ndarray) -> list[Finding]:
    """Report forces beyond ``LARGE_FORCE``, which are rarely meant."""
    if not packed.has_forces.any() or not len(packed.forces):
        return []
    frame = np.repeat(np.arange(len(rows)), packed.n_atoms)
    largest = np.zeros(len(rows))
    np.maximum.at(largest, frame, np.abs(packed.forces).max(1))
    n = int((largest > LARGE_FORCE).sum())
    if not n:
        return []
    worst = int(largest.argmax())
    return [
        Finding(
            "outliers",
            fidelity,
            f"{n} of {len(rows)} sampled frames have a force beyond {LARGE_FORCE:g} eV/Å; "
            f"largest {largest[worst]:.3g} in row {int(rows[worst])}",
        )
    ]


def check_derivatives(fidelity: str, packed: "Packed") -> list[Finding]:
    """Find wrong units and signs of forces and stress by what they do between similar frames.

    Forces: ``E_b - E_a ≈ -½ (F_a + F_b)·(x_b - x_a)`` in one cell. Stress: its mean rises with the volume of one
    composition, by the bulk modulus.
    """
    starts = np.cumsum(packed.n_atoms) - packed.n_atoms
    groups: dict[bytes, list[int]] = {}
    for i, (start, n) in enumerate(zip(starts.tolist(), packed.n_atoms.tolist(), strict=True)):
        groups.setdefault(packed.atomic_numbers[start : start + n].tobytes(), []).append(i)
    forces: list[tuple[float, float]] = []
    trends: list[tuple[float, float, int]] = []
    for numbers, members in groups.items():
        take = np.array(members[:60])
        n = len(numbers)
        if len(take) < 3:
            continue
        atoms = starts[take][:, None] + np.arange(n)
        if n > 1 and packed.has_forces[take].all() and packed.has_energy[take].all():
            forces += _force_work(packed, take, atoms)
        if packed.has_stress[take].all():
            trends += _stress_trend(packed, take)
    return _judge_forces(fidelity, np.array(forces).reshape(-1, 2)) + _judge_stress(fidelity, trends)


def _force_work(packed: "Packed", take: np.ndarray, atoms: np.ndarray) -> list[tuple[float, float]]:
    """Return (work, energy difference) of every frame and its nearest other one; molecules are turned onto each
    other.
    """
    x, f, e = packed.positions[atoms], packed.forces[atoms].astype(np.float64), packed.energy[take]
    cells, pbc = packed.cells[take], packed.pbc[take]
    pairs = []
    for i in range(len(take)):
        others = np.delete(np.arange(len(take)), i)
        fj = f[others]
        if pbc[i].any():
            same = (np.abs(cells[others] - cells[i]).max((1, 2)) < SAME_LABEL["forces"]) & (pbc[others] == pbc[i]).all(
                1
            )
            if not same.any():
                continue
            others, fj = others[same], fj[same]
            full = complete_cell(cells[i], pbc[i])
            fractional = (x[others] - x[i]) @ np.linalg.inv(full)
            fractional[..., pbc[i]] -= np.rint(fractional[..., pbc[i]])
            delta = fractional @ full
        else:
            a = x[i] - x[i].mean(0)
            b = x[others] - x[others].mean(1, keepdims=True)
            u, _, vt = np.linalg.svd(b.transpose(0, 2, 1) @ a)
            u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]
            turn = u @ vt
            delta, fj = b @ turn - a, fj @ turn
        distance = np.sqrt((delta**2).sum((1, 2)) / len(a if not pbc[i].any() else x[i]))
        k = int(distance.argmin())
        if 1e-4 < distance[k] < 0.3:
            pairs.append((float(-0.5 * ((f[i] + fj[k]) * delta[k]).sum()), float(e[others[k]] - e[i])))
    return pairs


def _stress_trend(packed: "Packed", take: np.ndarray) -> list[tuple[float, float, int]]:
    """Return (correlation of mean stress with volume, |bulk modulus| in eV/Å³, frames) of one composition."""
    volume = np.abs(np.linalg.det(packed.cells[take]))
    mean_stress = np.trace(packed.stress[take], axis1=1, axis2=2) / 3
    if len(take) < 4 or volume.min() <= 0 or volume.max() / volume.min() < 1.03 or mean_stress.std() == 0:
        return []
    covariance = np.cov(volume, mean_stress)
    correlation = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    return [(float(correlation), float(abs(volume.mean() * covariance[0, 1] / covariance[0, 0])), len(take))]


def _slope(pairs: np.ndarray) -> tuple[float, float]:
    """Return slope and r² of energy differences over work, both about zero."""
    work, difference = pairs[:, 0], pairs[:, 1]
    ww, wd, dd = float(work @ work), float(work @ difference), float(difference @ difference)
    if ww == 0 or dd == 0:
        return 0.0, 0.0
    return wd / ww, wd * wd / (ww * dd)


def _judge_forces(fidelity: str, pairs: np.ndarray) -> list[Finding]:
    if len(pairs) < 10:
        return []
    slope, r2 = _slope(pairs)
    if r2 < 0.5:
        return []
    if 0.5 < slope < 2.0:
        return []
    evidence = (
        f"between {len(pairs)} pairs of similar frames energy changes by {slope:.4g} × the work of the forces "
        f"(r² {r2:.2f})"
    )
    severity: Severity = "error" if r2 > CERTAIN else "warning"
    factors = [(f"energy in {u}", v) for u, v in _PER_EV.items()]
    factors += [(f"forces in {u}", 1 / v) for u, v in _FORCES_PER_EV.items()]
    off = {reading: abs(float(np.log(abs(slope) / v))) for reading, v in factors}
    readings = sorted((reading for reading in off if off[reading] < 0.28), key=lambda reading: off[reading])
    if slope < 0:
        sign = "gradients given as forces (`negate: true`)"
        return [Finding("forces", fidelity, f"{evidence}: {' and '.join([sign, *readings[:1]])}", severity)]
    what = " or ".join(readings) or "units do not fit together"
    return [Finding("energy_unit", fidelity, f"{evidence}, expected 1: {what}", severity)]


def _judge_stress(fidelity: str, trends: Sequence[tuple[float, float, int]]) -> list[Finding]:
    findings: list[Finding] = []
    frames = sum(n for _, _, n in trends)
    if frames < 8:
        return findings
    correlation = float(np.average([r for r, _, _ in trends], weights=[n for _, _, n in trends]))
    evidence = f"over {len(trends)} compositions, {frames} frames"
    if correlation < -0.5:
        findings.append(
            Finding(
                "stress_sign",
                fidelity,
                f"stress falls with volume within a composition (mean correlation {correlation:.2f} {evidence}): "
                "pressure given as stress; use `negate: true`",
                "error" if -correlation > CERTAIN else "warning",
            )
        )
    bulk = float(np.median([b for _, b, _ in trends]))
    if abs(correlation) > 0.5 and bulk < SOFTEST:
        findings.append(
            Finding(
                "stress_unit",
                fidelity,
                f"stress changes with volume like a bulk modulus of {bulk * 160.2:.4g} GPa "
                f"({evidence}; liquids have 1 and more): stress in eV/Å³ read as GPa or kbar, or a gas",
            )
        )
    if abs(correlation) > 0.5 and bulk > STIFFEST:
        # Solids have 5 to 440 GPa: read as eV/Å³ these are up to 440 if the file has GPa, up to 4400 if it has kbar.
        unit = "kbar" if bulk > 440 else "GPa or kbar"
        findings.append(
            Finding(
                "stress_unit",
                fidelity,
                f"stress changes with volume like a bulk modulus of {bulk * 160.2:.4g} GPa "
                f"({evidence}; diamond has 440): stress in {unit} read as eV/Å³",
                "error" if abs(correlation) > CERTAIN else "warning",
            )
        )
    return findings


def split_leaks(store: "Store") -> list[Finding]:
    """Return a finding where one geometry hash occurs in two splits of a store (ingest never lets it)."""
    order = np.lexsort((store.geometry_hash[:, 1], store.geometry_hash[:, 0]))
    hashes, split = store.geometry_hash[order], store.split[order]
    twice = np.flatnonzero((hashes[1:] == hashes[:-1]).all(1) & (split[1:] != split[:-1]))
    if not len(twice):
        return []
    return [Finding("leak", "", told_pairs(store, [(int(order[k]), int(order[k + 1])) for k in twice]), "error")]


def told_pairs(store: "Store", pairs: Sequence[tuple[int, int]]) -> str:
    """Return pairs of rows that are one structure in two splits as a message: names, rows and splits of the first."""

    def told(row: int) -> str:
        return f"{store.frame_id(row)} (row {row}, {store.split_names[store.split[row]]})"

    shown = "; ".join(f"{told(a)} and {told(b)}" for a, b in pairs[:PAIRS_TOLD])
    more = f"; and {len(pairs) - PAIRS_TOLD} more" if len(pairs) > PAIRS_TOLD else ""
    return f"{len(pairs)} structures are in two splits: {shown}{more}"


def same_structures(a: Iterable["Geometry"], b: Iterable["Geometry"]) -> list[tuple[int, int]]:
    """Return (index in ``a``, index in ``b``) of structures that are the same within 1e-3 Å; ``a`` is kept in memory.

    The leak check between two splits or two stores: ``same_structures(map(store.geometry, train), map(other.geometry,
    test))``.
    """
    filed: dict[bytes, list[tuple[int, Geometry]]] = {}
    for i, geometry in enumerate(a):
        filed.setdefault(lookup_keys(*geometry)[0], []).append((i, geometry))
    found = []
    for j, geometry in enumerate(b):
        for key in lookup_keys(*geometry):
            found += [(i, j) for i, other in filed.get(key, ()) if same_geometry(other, geometry)]
    return found
