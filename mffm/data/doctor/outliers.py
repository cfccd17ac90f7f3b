"""Frames that stand out: energies far from the element fit, large forces and stress, overlapping and lone atoms, net
forces, zeros where a label is missing, elements that occur once.
"""

from collections.abc import Callable

import numpy as np
from ase.data import chemical_symbols

from mffm.data.checks import LARGE_FORCE, Finding, element_fit, far_from_fit
from mffm.data.doctor.duplicates import EXAMPLES
from mffm.data.doctor.inputs import Frames
from mffm.data.doctor.scan import Columns

FIT = 20_000  # frames of the element fit; its residual is taken of all
LARGE_STRESS = 1.0  # eV/Å³, 160 GPa: half of what the earth's core has
OVERLAP = 0.6  # of the sum of the covalent radii; H2 at 100 GPa has 1.1, MgO there 0.9
# Kuryla et al. (2025), "How accurate are DFT forces?": from 1 meV/Å an atom a net force shows forces in error.
NET_FORCE = 1e-3  # eV/Å an atom: a note
LARGE_NET_FORCE = 1e-2  # eV/Å an atom: a warning
_CHUNK = 4096


def residuals(columns: Columns, fidelity: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows [n] with an energy of a fidelity and their residuals [n] of the element fit, eV per atom.

    Single atoms and energies of exactly 0 are left out. The fit is made twice, the second time without the outliers of
    the first.
    """
    energy = columns.energy[fidelity]
    rows = np.flatnonzero(np.isfinite(energy) & (energy != 0) & ~columns.isolated)
    if len(rows) < 4:
        return rows[:0], np.zeros(0)
    fitted = rows[:: max(1, -(-len(rows) // FIT))]
    counts, energies = columns.composition(fitted), energy[fitted]
    _, residual = element_fit(counts, energies)
    kept = ~far_from_fit(residual)[0]
    references, _ = element_fit(counts[kept], energies[kept])
    parts = []
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        gap = energy[chunk] - columns.composition(chunk) @ references
        parts.append(gap / columns.n_atoms[chunk])
    return rows, np.concatenate(parts)


def _worst(
    frames: Frames, rows: np.ndarray, size: np.ndarray, text: Callable[[int], str]
) -> tuple[tuple[str, str], ...]:
    """Return the evidence of the rows with the largest size [len(rows)]; ``text`` of an index into them."""
    return tuple((frames.place(int(rows[i])), text(int(i))) for i in np.argsort(-size, kind="stable")[:EXAMPLES])


def check_outliers(frames: Frames, columns: Columns) -> list[Finding]:
    """Return the findings of every fidelity and of the structures."""
    findings = _structures(frames, columns) + _elements(frames, columns)
    for k, fidelity in enumerate(columns.fidelities):
        findings += _energies(frames, columns, k, fidelity)
        findings += _large(frames, columns.largest_force[k], LARGE_FORCE, fidelity, "force", "eV/Å", "large_forces")
        findings += _large(frames, columns.largest_stress[k], LARGE_STRESS, fidelity, "stress", "eV/Å³", "large_stress")
        findings += _net_force(frames, columns.net_force[k], fidelity)
        findings += _placeholders(frames, columns, k, fidelity)
    return findings


def _energies(frames: Frames, columns: Columns, k: int, fidelity: str) -> list[Finding]:
    rows, residual = residuals(columns, k)
    if not len(rows):
        return []
    far, width = far_from_fit(residual)
    if not far.any():
        return []
    chosen, gap = rows[far], residual[far] - np.median(residual)
    return [
        Finding(
            "energy_outliers", fidelity,
            f"{len(chosen)} of {len(rows)} energies are more than {max(20 * width, 0.5):.3g} eV/atom from the element "
            "fit (20 median deviations)", "warning",
            _worst(frames, chosen, np.abs(gap), lambda i: f"{gap[i]:+.4g} eV/atom from the fit"),
            "look at whether the calculation converged, and whether the structure belongs here",
        )
    ]  # fmt: skip


def _large(
    frames: Frames, values: np.ndarray, limit: float, fidelity: str, what: str, unit: str, check: str
) -> list[Finding]:
    rows = np.flatnonzero(np.nan_to_num(values) > limit)
    if not len(rows):
        return []
    return [
        Finding(
            check, fidelity, f"{len(rows)} frames have a {what} beyond {limit:g} {unit}", "warning",
            _worst(frames, rows, values[rows], lambda i: f"largest {what} {values[rows[i]]:.4g} {unit}"),
            "leave them out, or weight them down, unless such structures are what the potential is for",
        )
    ]  # fmt: skip


def _net_force(frames: Frames, net: np.ndarray, fidelity: str) -> list[Finding]:
    has = np.isfinite(net)
    rows = np.flatnonzero(np.nan_to_num(net) > NET_FORCE)
    if not len(rows):
        return []
    large = int((net[rows] > LARGE_NET_FORCE).sum())
    return [
        Finding(
            "net_force", fidelity,
            f"{len(rows)} of {int(has.sum())} frames have forces whose sum is beyond {1e3 * NET_FORCE:g} meV/Å an "
            f"atom, {large} of them beyond {1e3 * LARGE_NET_FORCE:g}", "warning" if large else "note",
            _worst(frames, rows, net[rows], lambda i: f"|sum of forces| / atoms = {1e3 * net[rows[i]]:.4g} meV/Å"),
            "forces that are no gradient of an energy: loose convergence, a coarse grid, or constrained atoms whose "
            "forces were set to zero",
        )
    ]  # fmt: skip


def _placeholders(frames: Frames, columns: Columns, k: int, fidelity: str) -> list[Finding]:
    """Report zeros that stand for a missing label: energy 0, or forces all 0 of a bent molecule."""
    big = ~columns.isolated
    energy = np.flatnonzero((columns.energy[k] == 0) & big)
    forces = np.flatnonzero((columns.largest_force[k] == 0) & (columns.n_atoms > 2) & (columns.volume == 0))
    findings = []
    for what, rows in (("energy", energy), ("forces", forces)):
        if len(rows):
            findings.append(
                Finding(
                    "zeros", fidelity, f"{len(rows)} frames have {what} of exactly 0", "warning",
                    tuple((frames.place(int(row)), f"{what} 0") for row in rows[:EXAMPLES]),
                    "a missing label is absent, not 0: take the key out of these frames",
                )
            )  # fmt: skip
    return findings


def _structures(frames: Frames, columns: Columns) -> list[Finding]:
    findings = []
    rows = np.flatnonzero(columns.closest < OVERLAP)
    if len(rows):
        findings.append(
            Finding(
                "overlapping_atoms", "",
                f"{len(rows)} structures have two atoms closer than {OVERLAP:g} of the sum of their covalent radii",
                "warning",
                _worst(frames, rows, -columns.closest[rows], lambda i: f"{columns.closest[rows[i]]:.3f} of the sum"),
                "leave them out, unless collisions are what the potential is for",
            )
        )  # fmt: skip
    rows = np.flatnonzero(columns.n_alone > 0)
    if len(rows):
        findings.append(
            Finding(
                "lone_atoms", "", f"{len(rows)} structures have an atom with no other within 6 Å", "warning",
                _worst(frames, rows, columns.n_alone[rows], lambda i: f"{columns.n_alone[rows[i]]} atoms alone"),
                "a potential of that cutoff sees a free atom; look for a lost atom or a wrong cell",
            )
        )  # fmt: skip
    return findings


def _elements(frames: Frames, columns: Columns) -> list[Finding]:
    """Report elements that occur in one frame only."""
    counts = np.bincount(columns.element, minlength=256)
    once = np.flatnonzero(counts == 1)
    if not len(once) or columns.n < 2:
        return []
    entry = [int(np.flatnonzero(columns.element == z)[0]) for z in once]
    rows = [int(np.searchsorted(columns.element_start, e, side="right")) - 1 for e in entry]
    return [
        Finding(
            "rare_elements", "", f"in one structure only: {', '.join(chemical_symbols[z] for z in once)}", "note",
            tuple((frames.place(r), chemical_symbols[z]) for r, z in zip(rows, once, strict=True))[:EXAMPLES],
            "its reference takes up that frame's energy, and no test can tell whether it was learnt",
        )
    ]  # fmt: skip
