"""What a potential says of structures, a row each on disk as it goes: latent features, or energies.

A file of rows is named by all that they depend on: the same question again reads it, an interrupted one goes on, and
another criterion on the same pool asks nothing twice.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mffm.data.neighbors import NeighborList, neighbor_list
from mffm.deploy.at_fidelity import AtFidelity
from mffm.errors import InputError
from mffm.release import write_json
from mffm.select.pool import Structure

EDGE_BUDGET = 20_000  # as of ``mffm predict``

Quantity = Literal["features", "energies"]
_DTYPES = {"features": "<f4", "energies": "<f8"}


def measure(
    at: AtFidelity,
    quantity: Quantity,
    structures: Sequence[Structure],
    place: Callable[[int], str],
    made_of: Any,
    folder: Path,
    progress: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """Return rows of numbers, one for each structure, from ``folder`` where they are there.

    Args:
        quantity: "features": means over atoms of what the head's last linear map takes [n, width] float32;
            "energies": energies without and with element references [n, 2] float64, eV.
        place: where a structure of an index is, for messages.
        made_of: JSON that tells these structures from others.
        progress: called with the number of rows that are there.

    Raises:
        InputError: a structure that the potential cannot calculate; the message says where it is.
    """
    key = {"quantity": quantity, "structures": made_of, "n": len(structures), **at.describe(), "potential": None}
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    path, note = folder / f"{name}.rows", folder / f"{name}.json"
    width = _width(at, quantity)
    dtype = np.dtype(_DTYPES[quantity])
    size = width * dtype.itemsize
    if not (note.is_file() and path.is_file()):
        path.write_bytes(b"")
        short = {**key, "structures": f"{name} is a digest of these too", "potential": str(at.path)}
        write_json(note, {**short, "width": width, "dtype": dtype.str})
    done = min(path.stat().st_size // size, len(structures))
    with path.open("r+b") as file:
        file.truncate(done * size)  # a kill may have left a part of a row
        file.seek(done * size)
        progress(done)
        for rows in _rows(at, quantity, structures, place, done):
            file.write(rows.astype(dtype).tobytes())
            file.flush()
            done += len(rows)
            progress(done)
    return np.fromfile(path, dtype).reshape(len(structures), width)


def _width(at: AtFidelity, quantity: Quantity) -> int:
    return 2 if quantity == "energies" else at.potential.learned.heads.mlp.weights[-1].shape[-2]


def _rows(
    at: AtFidelity, quantity: Quantity, structures: Sequence[Structure], place: Callable[[int], str], start: int
) -> Iterator[np.ndarray]:
    """Yield rows [n, width] of batches of about ``EDGE_BUDGET`` edges, from a structure on."""
    waiting: list[tuple[int, NeighborList]] = []
    n_edges = 0
    for index in range(start, len(structures)):
        one = structures[index]
        try:
            at.check(one.atoms())
            _, positions, cell, pbc = one.geometry
            found = neighbor_list(positions, cell, pbc, at.cutoff)
        except InputError as error:
            raise InputError(
                f"{place(index)} ({one.formula}): {error}; leave it out of the pool (--elements)"
            ) from error
        size = len(found[0]) + len(one.geometry[0])
        if waiting and n_edges + size > EDGE_BUDGET:
            yield _asked(at, quantity, structures, place, waiting)
            waiting, n_edges = [], 0
        waiting.append((index, found))
        n_edges += size
    if waiting:
        yield _asked(at, quantity, structures, place, waiting)


def _asked(
    at: AtFidelity,
    quantity: Quantity,
    structures: Sequence[Structure],
    place: Callable[[int], str],
    waiting: Sequence[tuple[int, NeighborList]],
) -> np.ndarray:
    chosen = [structures[index] for index, _ in waiting]
    batch = at.pack(
        [one.geometry for one in chosen], [(one.charge, one.spin) for one in chosen], [found for _, found in waiting]
    )
    if quantity == "features":
        sums = batch.system_sums(at.potential.last_inputs(batch).double())
        rows = (sums / batch.n_atoms.unsqueeze(1)).cpu().numpy()
    else:
        prediction = at.potential(batch, forces=False)
        total, _ = at.totals(batch, prediction)
        rows = np.stack([prediction.energy.double().cpu().numpy(), total.cpu().numpy()], 1)
    bad = np.flatnonzero(~np.isfinite(rows).all(1))
    if len(bad):
        index = waiting[int(bad[0])][0]
        raise InputError(
            f"{place(index)} ({structures[index].formula}): what the potential gives is not finite; leave "
            "the structure out of the pool"
        )
    return rows
