"""The small report of a property: JSON for programs, Markdown for people, and a plot."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from mffm.errors import InputError
from mffm.release import write_json


def write(
    folder: Path,
    name: str,
    title: str,
    found: Mapping[str, Any],
    rows: Sequence[tuple[str, str]],
    draw: Callable[[Path], None],
    made_by: Mapping[str, Any],
) -> list[Path]:
    """Write ``name.json``, ``name.md`` and ``name.png``; return their paths.

    Args:
        found: what the JSON holds; arrays become lists, keys end in their unit.
        rows: (quantity, value with its unit) for the table.
        draw: writes the plot to a path.
        made_by: what the numbers depend on: potential, fidelity, settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{end}" for end in ("json", "md", "png")]
    write_json(paths[0], {"property": name, "made_by": plain(made_by), **plain(found)})
    lines = [f"# {title}", "", "| quantity | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    settings = ", ".join(f"{key} {value}" for key, value in made_by.items() if value is not None)
    lines += ["", f"![{name}]({paths[2].name})", "", f"Made by: {settings}."]
    paths[1].write_text("\n".join(lines) + "\n")
    draw(paths[2])
    return paths


def plain(value: Any) -> Any:
    """Return a value as JSON holds it: arrays and their scalars as lists and numbers, what is not finite as null."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def charge_and_spin(atoms: Atoms) -> dict[str, Any]:
    """Return charge and spin multiplicity as ``atoms.info`` has them for calculators that take them; 0: not given."""
    spin = atoms.info.get("spin_multiplicity", atoms.info.get("spin", 0))
    return {"charge": atoms.info.get("charge", 0), "spin_multiplicity": spin}


def require_volume(atoms: Atoms, what: str) -> None:
    """Raises:
    InputError: the structure is not periodic in all directions.
    """
    if not atoms.pbc.all() or atoms.cell.rank < 3:
        raise InputError(
            f"{what}: {atoms.get_chemical_formula()} is not periodic in all directions (pbc {atoms.pbc.tolist()}); "
            "give a crystal with its cell"
        )
