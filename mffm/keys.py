"""Names, shapes, units and signs of everything that mffm stores or predicts. Said here once; docstrings name the key.

Units inside are eV, Å, eV/Å and eV/Å³. Cell vectors are rows. Stress has ASE's sign: negative under compression,
``stress = (1/V) dE/dstrain``; it is a symmetric 3×3 tensor in the model and in the store. Only readers convert.

========== ================== ======= ===========================================================
key        shape              unit    note
========== ================== ======= ===========================================================
energy     [n_systems]        eV      total energy of one fidelity, element references included
forces     [n_atoms, 3]       eV/Å    minus the gradient of ``energy``
stress     [n_systems, 3, 3]  eV/Å³   ASE's sign
========== ================== ======= ===========================================================
"""

from typing import Literal

Property = Literal["energy", "forces", "stress"]

ENERGY: Property = "energy"
FORCES: Property = "forces"
STRESS: Property = "stress"
PROPERTIES: tuple[Property, ...] = (ENERGY, FORCES, STRESS)

# The (fidelity, property) pair under which a label is stored.
LabelKey = tuple[str, Property]

SPLITS = ("train", "val", "test")

N_ELEMENTS = 118  # atomic numbers 1..118 are accepted; arrays indexed by Z have length N_ELEMENTS + 1

# How errors are reported: (unit, factor from internal units).
REPORT_UNITS: dict[str, tuple[str, float]] = {
    "energy": ("meV/atom", 1e3),
    "forces": ("meV/Å", 1e3),
    "stress": ("meV/Å³", 1e3),
}
