"""A frame: one structure with its labels at every fidelity that has any. A missing label is absent, never NaN."""

from dataclasses import dataclass, field

import numpy as np

from mffm.keys import LabelKey


@dataclass(slots=True)
class Frame:
    """One structure as readers deliver it and as the store keeps it.

    Attributes:
        atomic_numbers: [n_atoms] uint8.
        positions: [n_atoms, 3] float64, Å.
        cell: [3, 3] float64, Å, vectors are rows; zeros where there is no cell.
        pbc: [3] bool.
        labels: label by (fidelity, property), float64; shapes ``()``, ``[n_atoms, 3]``, ``[3, 3]`` as in ``mffm.keys``.
        frame_id: stable name of the structure within its store.
        group: key by which a split may keep frames together (molecule, composition); empty where there is none.
        split: split that the source gives, or empty.
        charge: total charge in e, or None where the source gives none.
        spin_multiplicity: 2S+1, or None where the source gives none.
        magnetic_moments: [n_atoms] collinear moments in µB, or None where the source gives none.
        weight: factor on the frame's labels in the loss.
        origin: "file:index", for messages.
    """

    atomic_numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    labels: dict[LabelKey, np.ndarray] = field(default_factory=dict)
    frame_id: str = ""
    group: str = ""
    split: str = ""
    charge: int | None = None
    spin_multiplicity: int | None = None
    magnetic_moments: np.ndarray | None = None
    weight: float = 1.0
    origin: str = ""

    @property
    def n_atoms(self) -> int:
        return len(self.atomic_numbers)

    @property
    def volume(self) -> float:
        """Cell volume in Å³; 0 where there is no cell."""
        return float(abs(np.linalg.det(self.cell)))
