"""Whether what one fidelity's sources say is of one level of theory: element fits against each other, and isolated
atoms against the molecules that are made of them.
"""

import numpy as np
from ase.data import chemical_symbols

from mffm.data.checks import Finding, element_fit, far_from_fit, thomas_fermi_scott
from mffm.data.doctor.duplicates import EXAMPLES
from mffm.data.doctor.fingerprint import pairs
from mffm.data.doctor.inputs import Frames
from mffm.data.doctor.scan import Columns
from mffm.frame import Frame

HARTREE = 27.211386  # eV
LEAST = 20  # energies of a source
MOST = 5000  # frames of a source that are fitted
OFFSET = 0.5  # eV per atom between two sources' fits, and five widths: thermal motion at 2000 K is 0.26
UNBOUND, OVERBOUND = -0.5, 12.0  # eV per atom that isolated atoms may be above the structure; diamond has 7.7
EXCESS = 0.10  # of the sum of bond energies; and eV per atom other than hydrogen:
EXCESS_PER_HEAVY = 0.8
# Bonds of C, H, N and O: (length in Å, energy in eV) from single to triple, between them linear. Mean bond enthalpies
# at 298 K (as in chemistry textbooks), times 1.05 for the zero-point and thermal energy. Ethanol has 35.2 eV so, 35.1
# from its heat of formation; acetylacetone, whose bonds are conjugated, 70 and 67.
_BONDS: dict[tuple[int, int], tuple[tuple[float, float], ...]] = {
    (1, 1): ((0.74, 4.75),),
    (1, 6): ((1.09, 4.49),),
    (1, 7): ((1.01, 4.25),),
    (1, 8): ((0.96, 5.04),),
    (6, 6): ((1.20, 9.1), (1.34, 6.7), (1.54, 3.77)),
    (6, 7): ((1.16, 9.7), (1.28, 6.7), (1.47, 3.32)),
    (6, 8): ((1.21, 8.2), (1.43, 3.90)),
    (7, 7): ((1.10, 10.3), (1.25, 4.55), (1.45, 1.74)),
    (7, 8): ((1.21, 6.6), (1.40, 2.19)),
    (8, 8): ((1.21, 5.4), (1.47, 1.6)),
}
_BONDED = 1.3  # times the longest length above: still a bond


def check_levels(frames: Frames, columns: Columns) -> list[Finding]:
    """Return where sources of one fidelity, or its isolated atoms, do not fit to the rest."""
    findings = []
    for k, fidelity in enumerate(columns.fidelities):
        findings += _sources(columns, k, fidelity)
        findings += _isolated(frames, columns, k, fidelity)
    return findings


def _sources(columns: Columns, k: int, fidelity: str) -> list[Finding]:
    """Fit the references on the larger of two sources and look at the other one's energies."""
    rows_of = {
        s: np.flatnonzero((columns.source == s) & np.isfinite(columns.energy[k]) & ~columns.isolated)
        for s in range(len(columns.source_names))
    }
    known = sorted((s for s in rows_of if len(rows_of[s]) >= LEAST), key=lambda s: -len(rows_of[s]))
    findings = []
    for i, a in enumerate(known):
        rows = _thinned(rows_of[a])
        counts, energies = columns.composition(rows), columns.energy[k, rows]
        references, own = element_fit(counts, energies)
        _, width = far_from_fit(own)
        fractions = counts / counts.sum(1, keepdims=True)
        _, singular, axes = np.linalg.svd(fractions, full_matrices=False)
        axes = axes[singular > 1e-6 * singular[0]]
        for b in known[i + 1 :]:
            other = _thinned(rows_of[b])
            x = columns.composition(other)
            part = x / x.sum(1, keepdims=True)
            inside = np.abs(part - part @ axes.T @ axes).max(1) < 1e-6  # a says what such a composition has
            if inside.sum() < LEAST:
                continue
            other, x = other[inside], x[inside]
            gap = (columns.energy[k, other] - x @ references) / x.sum(1)
            offset = float(np.median(gap))
            _, other_width = far_from_fit(gap)
            if abs(offset) > max(OFFSET, 5 * (width + other_width)):
                names = columns.source_names
                findings.append(
                    Finding(
                        "level_of_theory", fidelity,
                        f"element references of {names[a]} put {len(other)} energies of {names[b]} off by "
                        f"{offset:+.4g} eV/atom (scatter {width:.2g} and {other_width:.2g})", "error",
                        remedy="two levels of theory, codes or pseudopotentials under one fidelity's name: declare two",
                    )
                )  # fmt: skip
    return findings


def _thinned(rows: np.ndarray) -> np.ndarray:
    return rows[:: max(1, -(-len(rows) // MOST))]


def _isolated(frames: Frames, columns: Columns, k: int, fidelity: str) -> list[Finding]:
    """Compare structures with the isolated atoms of the same fidelity: the binding energy must be one."""
    has = np.isfinite(columns.energy[k])
    atoms: dict[int, list[int]] = {}
    for row in np.flatnonzero(has & columns.isolated).tolist():
        atoms.setdefault(int(columns.element[columns.element_start[row]]), []).append(row)
    if not atoms:
        return []
    lowest = {z: min(float(columns.energy[k, row]) for row in rows) for z, rows in atoms.items()}
    rows = _thinned(np.flatnonzero(has & ~columns.isolated))
    if not len(rows):
        return []
    counts = columns.composition(rows)
    elements = np.array(sorted(lowest))
    covered = counts.sum(1) == counts[:, elements].sum(1)
    rows, counts = rows[covered], counts[covered]
    if not len(rows):
        return []
    energies = np.array([lowest[z] for z in elements.tolist()])
    binding = counts[:, elements] @ energies - columns.energy[k, rows]
    per_atom = binding / counts.sum(1)
    middle = float(np.median(per_atom))
    evidence = tuple(
        (frames.place(r), f"isolated {chemical_symbols[z]}: {float(columns.energy[k, r]):.6f} eV")
        for z, found in sorted(atoms.items()) for r in found
    )[:EXAMPLES]  # fmt: skip
    if not UNBOUND < middle < OVERBOUND:
        return [
            Finding(
                "isolated_atoms", fidelity,
                f"isolated atoms are {middle:.4g} eV/atom above {len(rows)} structures of them (median; between 0 and "
                f"{OVERBOUND:g} where both are of one level)", "error", evidence,
                "atoms and structures are of two levels of theory, or in two units",
            )
        ]  # fmt: skip
    all_electron = lowest[int(elements[-1])] / float(thomas_fermi_scott(elements[-1]))
    if abs(all_electron / HARTREE - 1) > 0.05:
        return []  # valence energies: of a semi-empirical method, whose free atoms are none
    return _against_bonds(frames, fidelity, rows, binding, evidence)


def _against_bonds(
    frames: Frames, fidelity: str, rows: np.ndarray, binding: np.ndarray, evidence: tuple[tuple[str, str], ...]
) -> list[Finding]:
    """Compare binding energies of molecules of C, H, N and O with the sum of their bonds: an atom that is not in its
    ground state (a singlet carbon) binds too much.
    """
    excess, heavy, bonds = [], [], []
    for i in range(0, len(rows), max(1, len(rows) // 200)):
        frame = frames.frame(int(rows[i]))
        total = bond_energy(frame)
        if total is None:
            continue
        excess.append(float(binding[i]) - total)
        heavy.append(int((frame.atomic_numbers > 1).sum()))
        bonds.append(total)
    if not excess:
        return []
    share = float(np.median(np.array(excess) / np.array(bonds)))
    per_heavy = float(np.median(np.array(excess) / np.maximum(1, heavy)))
    if share < EXCESS or per_heavy < EXCESS_PER_HEAVY:
        return []
    return [
        Finding(
            "isolated_atoms", fidelity,
            f"molecules are bound by {share:.0%} more than their bonds explain (median of {len(excess)}), "
            f"{per_heavy:.2g} eV an atom other than hydrogen: the isolated atoms' energies are too high", "warning",
            evidence,
            "an isolated atom in a wrong spin state (carbon, oxygen: triplet; nitrogen: quartet) does that: calculate "
            "it again, or let the references be fitted",
        )
    ]  # fmt: skip


def bond_energy(frame: Frame) -> float | None:
    """Return the sum of mean bond energies of a molecule of C, H, N and O, eV; None for anything else."""
    z = frame.atomic_numbers
    if frame.pbc.any() or not np.isin(z, (1, 6, 7, 8)).all():
        return None
    found = pairs(frame)
    once = found.receiver < found.sender
    total = 0.0
    for i, j, distance in zip(found.receiver[once], found.sender[once], found.distance[once], strict=True):
        kind = _BONDS[min(int(z[i]), int(z[j])), max(int(z[i]), int(z[j]))]
        if distance < _BONDED * kind[-1][0]:
            total += float(np.interp(distance, [d for d, _ in kind], [e for _, e in kind]))
    return total or None
