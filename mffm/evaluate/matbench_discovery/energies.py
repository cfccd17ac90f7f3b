"""From a total energy to a formation energy: MP2020 corrections and elemental references.

A formation energy of the suite is (E + MP2020 correction − Σ n_i µ_i) / N with the *uncorrected* Materials Project
energies µ_i of the elements (2023-02-07). The correction is that of the predicted energy in the predicted structure
(Wang et al., Sci. Rep. 11, 15496 (2021)). A potential that was trained on corrected energies, such as CHGNet, must not
be corrected again.
"""

import gzip
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mffm.errors import InputError

if TYPE_CHECKING:
    from pymatgen.core import Structure

# U of MPRelaxSet in eV, for oxides and fluorides; WBM was computed with it, and the corrections ask for it.
HUBBARD_U = {"Co": 3.32, "Cr": 3.7, "Fe": 5.3, "Mn": 3.9, "Mo": 4.38, "Ni": 6.2, "V": 3.25, "W": 6.2}
ANIONS_WITH_U = ("O", "F")


def read_references(path: Path) -> dict[str, float]:
    """Return element → energy of the elemental reference, eV/atom, from the suite's file of pymatgen entries."""
    with gzip.open(path, "rt") as file:
        entries = json.load(file)
    return {e: v["energy"] / sum(v["composition"].values()) for e, v in entries.items()}


def formation_energy(symbols: Iterable[str], energy: float, references: Mapping[str, float]) -> float:
    """Return the energy per atom relative to the elements, eV/atom.

    Raises:
        InputError: an element without a reference.
    """
    counts = Counter(symbols)
    missing = sorted(set(counts) - set(references))
    if missing:
        raise InputError(f"no elemental reference energy of {', '.join(missing)}; known: {len(references)} elements")
    return (energy - sum(n * references[s] for s, n in counts.items())) / sum(counts.values())


def hubbards(symbols: Iterable[str]) -> dict[str, float]:
    """Return the U values, eV, with which Materials Project settings treat a composition."""
    from pymatgen.core import Element

    present = set(symbols)
    most_electronegative = max(present, key=lambda s: Element(s).X)
    if most_electronegative not in ANIONS_WITH_U:
        return {}
    return {s: HUBBARD_U[s] for s in sorted(present) if s in HUBBARD_U}


@lru_cache(maxsize=1)
def _compatibility() -> Any:
    from pymatgen.entries.compatibility import MaterialsProject2020Compatibility

    return MaterialsProject2020Compatibility(check_potcar=False)


def corrected_energy(structure: "Structure", energy: float) -> float | None:
    """Return a total energy with MP2020 corrections, eV; None where the scheme rejects the entry.

    On the 972 structures of the WBM subset this gives the published corrections within 1 meV/atom but for two
    silicides; pymatgen's assignment of anions changed after 2023.5 (issue 358 of the suite).
    """
    from pymatgen.entries.computed_entries import ComputedStructureEntry

    u = hubbards(site.specie.symbol for site in structure)
    run_type = "GGA+U" if u else "GGA"
    parameters = {"run_type": run_type, "is_hubbard": bool(u), "hubbards": u}
    entry = ComputedStructureEntry(structure, energy, parameters=parameters)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # guesses of oxidation states that fail, one line a structure
        processed = _compatibility().process_entry(entry, clean=True, inplace=False)
    return None if processed is None else float(processed.energy)
