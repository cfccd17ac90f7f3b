"""Reading many frames at once into packed arrays: the store's fast path."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mffm.data import records
from mffm.keys import ENERGY, FORCES, STRESS

if TYPE_CHECKING:
    from mffm.data.store import Layer, Store


_NO_STRESS = bytes(72)


class Packed(NamedTuple):
    """Frames of one fidelity, one array per field, atoms of all frames in a row; the fast way to read many.

    A label that a frame lacks is 0 here; ``has_energy``, ``has_forces`` and ``has_stress`` [n] bool are the truth.
    """

    n_atoms: np.ndarray  # [n] int64
    atomic_numbers: np.ndarray  # [sum n_atoms] uint8
    positions: np.ndarray  # [sum n_atoms, 3] float64, Å
    cells: np.ndarray  # [n, 3, 3] float64, Å
    pbc: np.ndarray  # [n, 3] bool
    energy: np.ndarray  # [n] float64, eV
    forces: np.ndarray  # [sum n_atoms, 3] float32, eV/Å
    stress: np.ndarray  # [n, 3, 3] float64, eV/Å³
    has_energy: np.ndarray
    has_forces: np.ndarray
    has_stress: np.ndarray


def read_packed(store: "Store", rows: np.ndarray, fidelity: str) -> Packed:
    """Return ``rows`` at ``fidelity`` as ``Packed``; see ``Store.read``."""
    store.fidelities.index(fidelity)
    n_atoms = store.n_atoms[rows].astype(np.int64)
    numbers, positions, cells, pbc = _geometries(store, rows, n_atoms)
    energy = np.zeros(len(rows))
    has = np.zeros((3, len(rows)), bool)
    forces: list[bytes | memoryview] = [b""] * len(rows)
    stress: list[bytes | memoryview] = [_NO_STRESS] * len(rows)
    for layer in store.layers_of[fidelity]:
        _labels(layer, fidelity, rows, energy, forces, stress, has)
    if not has[1].all():
        for i in np.flatnonzero(~has[1]).tolist():
            forces[i] = bytes(12 * int(n_atoms[i]))
    return Packed(
        n_atoms,
        numbers,
        positions,
        cells,
        pbc,
        energy,
        np.frombuffer(b"".join(forces), "<f4").reshape(-1, 3),
        np.frombuffer(b"".join(stress), "<f8").reshape(-1, 3, 3),
        *has,
    )


def _geometries(store: "Store", rows: np.ndarray, n_atoms: np.ndarray) -> tuple[np.ndarray, ...]:
    keys = rows.astype(">u8").tobytes()
    shards = store.shard[rows].tolist()
    transactions = {shard: store.geometry_shards.transaction(shard).get for shard in set(shards)}
    header = records.GEOMETRY_HEADER.size
    at = records.POSITIONS_AT
    heads, numbers = [], []
    begin = 0
    for shard, n in zip(shards, n_atoms.tolist(), strict=True):
        record = transactions[shard](keys[begin : begin + 8])
        if record is None:
            store.geometry_shards.get(shard, int(rows[begin // 8]))  # raises with the file's name
        begin += 8
        middle = at + 24 * n
        heads.append(record[:middle])
        numbers.append(record[middle : middle + n])
    words = np.frombuffer(b"".join(heads), "<f8")  # a head is 10 words, then 3 words an atom
    length = 3 * n_atoms + at // 8
    start = np.cumsum(length) - length
    head = words[start[:, None] + np.arange(at // 8)]
    keep = np.ones(len(words), bool)
    keep[start[:, None] + np.arange(at // 8)] = False
    bits = head[:, :1].copy().view(np.uint8)[:, 4:5]
    return (
        np.frombuffer(b"".join(numbers), np.uint8),
        words[keep].reshape(-1, 3),
        head[:, header // 8 :].reshape(-1, 3, 3),
        (bits >> np.arange(3, dtype=np.uint8) & 1).astype(bool),
    )


def _labels(
    layer: "Layer",
    fidelity: str,
    rows: np.ndarray,
    energy: np.ndarray,
    forces: list[bytes | memoryview],
    stress: list[bytes | memoryview],
    has: np.ndarray,
) -> None:
    """Fill in the labels that one layer has and that no earlier layer had."""
    if not len(layer.rows):
        return
    k = layer.fidelities.index(fidelity)
    position = layer.positions(rows)
    present = np.where(position >= 0, layer.present[position], np.uint64(0))
    new = [
        ((present >> np.uint64(records.bit(k, p))) & np.uint64(1)).astype(bool) & ~has[j]
        for j, p in enumerate((ENERGY, FORCES, STRESS))
    ]
    energy[new[0]] = layer.energy[k, position[new[0]]]
    items = np.flatnonzero(new[1] | new[2])
    chosen = rows[items]
    shards = (np.searchsorted(layer.shard_starts, chosen, "right") - 1).tolist()
    transactions = {shard: layer.shards.transaction(shard).get for shard in set(shards)}
    keys = chosen.astype(">u8").tobytes()
    offsets = layer.layouts[fidelity].offsets
    with_forces, with_stress = new[1][items].tolist(), new[2][items].tolist()
    at = 0
    for i, shard, mask, wants_forces, wants_stress in zip(
        items.tolist(), shards, present[items].tolist(), with_forces, with_stress, strict=True
    ):
        record = transactions[shard](keys[at : at + 8])
        at += 8
        if record is None:
            layer.shards.get(shard, int(rows[i]))
        _, stress_at, forces_at, index, n_forces = offsets(mask)
        if wants_forces:
            size = (len(record) - forces_at) // n_forces
            begin = forces_at + size * index
            forces[i] = record[begin : begin + size]
        if wants_stress:
            stress[i] = record[stress_at : stress_at + 72]
    for j in range(3):
        has[j] |= new[j]
