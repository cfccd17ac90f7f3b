"""Relaxed geometries against DFT's: RMSD and symmetry (``metrics/geo_opt.py``, ``structure/symmetry.py``)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pymatgen.core import Structure

NO_MATCH = 1.0  # RMSD of a structure that is missing or does not match: the matcher's site tolerance
SYMPRECS = (1e-5, 1e-2)  # the leaderboard shows the first


@dataclass(frozen=True)
class Symmetry:
    """Space-group number and number of symmetry operations."""

    space_group: int
    n_operations: int


@dataclass(frozen=True)
class Comparison:
    """One relaxed structure against DFT's.

    Attributes:
        rmsd: no unit, None where there is no structure or no match.
        predicted, label: None where symmetry was not found, or there is no structure.
    """

    rmsd: float | None
    predicted: Symmetry | None
    label: Symmetry | None


def rmsd(predicted: "Structure", label: "Structure") -> float | None:
    """Return the RMS distance of matched sites over (V/N)^(1/3), None without a match.

    ``scale=False`` and ``stol=1``: volumes count and far sites still match (issue 230 of the suite).
    """
    from pymatgen.analysis.structure_matcher import StructureMatcher

    found = StructureMatcher(stol=NO_MATCH, scale=False).get_rms_dist(predicted, label)
    return None if found is None else float(found[0])


def symmetry(structure: "Structure", symprec: float) -> Symmetry | None:
    """Return what moyopy finds, None where it fails: the suite leaves such structures out of the symmetry metrics."""
    import moyopy
    from moyopy.interface import MoyoAdapter

    try:
        found = moyopy.MoyoDataset(MoyoAdapter.from_structure(structure), symprec=symprec)
    except Exception:  # noqa: BLE001 - moyopy raises what its Rust side names
        return None
    return Symmetry(int(found.number), int(found.operations.num_operations))


def metrics(comparisons: Sequence[Comparison]) -> dict[str, float]:
    """Return mean RMSD, MAE of the number of operations, and shares of changed symmetry.

    Symmetry is counted over structures where it was found for both; it changed where the space group did, up or down by
    the number of operations.
    """
    both = [(c.predicted, c.label) for c in comparisons if c.predicted is not None and c.label is not None]
    change = np.array([p.n_operations - label.n_operations for p, label in both])
    changed = np.array([p.space_group != label.space_group for p, label in both], dtype=bool)

    def share(which: np.ndarray) -> float:
        return float(which.mean()) if len(both) else float("nan")

    return {
        "rmsd": float(np.mean([NO_MATCH if c.rmsd is None else c.rmsd for c in comparisons])),
        "n_sym_ops_mae": float(np.abs(change).mean()) if len(both) else float("nan"),
        "symmetry_decrease": share(changed & (change < 0)),
        "symmetry_match": share(~changed),
        "symmetry_increase": share(changed & (change > 0)),
        "n_structures": len(both),
    }
