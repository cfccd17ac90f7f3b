"""Labels that a release predicts for training structures, in a layer beside the store: a replay without the data."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mffm import distributed
from mffm.batch import reference_energy
from mffm.data import records
from mffm.data.layers import write_beside
from mffm.data.pools import choose
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY, FORCES, STRESS, Property
from mffm.release import Loaded, licence_chain, read_json, systems_at

FOLDER = "replay"  # of a run
SOURCE = "predictions-of-the-release"

Labels = dict[tuple[int, Property], np.ndarray]


def beside(
    base: Loaded, store: Store, names: Sequence[str], folder: Path, properties: Sequence[Property], most: int | None
) -> Store:
    """Return the store with a layer of predictions at these fidelities, written into the folder where it is not there.

    Structures are those of the training split whose elements the fidelity knows; ``most`` of them, chosen by a hash.
    A fidelity that knows the elements of none has no labels. The store itself is not touched. Every rank calls this,
    rank 0 writes.

    Raises:
        InputError: no fidelity knows the elements of any structure.
    """
    made_from = {
        "weights_sha256": base.weights_sha256, "store": store.fingerprint, "fidelities": list(names),
        "properties": list(properties), "most": most,
    }  # fmt: skip
    if distributed.ranks_from_environment().is_main and _made_from(folder) != made_from:
        shutil.rmtree(folder, ignore_errors=True)  # of a start with another release
        _write(base, store, names, folder, properties, most, made_from)
    distributed.barrier()
    return opened(store, folder)


def _made_from(folder: Path) -> dict[str, Any] | None:
    path = folder / "beside.json"
    return read_json(path).get("made_from") if path.is_file() else None


def opened(store: Store, folder: Path, fingerprint: str | None = None) -> Store:
    """Return the store with the layer in the folder.

    Args:
        fingerprint: of the layer; None: any.

    Raises:
        InputError: there is none, or another one.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, the labels of the replay are gone; start the run anew")
    found = Store(store.path, [layer.name for layer in store.layers], folder.resolve())
    if fingerprint not in (None, found.layers[0].fingerprint):
        raise InputError(f"{folder}: not the labels that the run began with; restore them, or start the run anew")
    return found


def _write(
    base: Loaded, store: Store, names: Sequence[str], folder: Path, properties: Sequence[Property], most: int | None,
    made_from: dict[str, Any],
) -> None:  # fmt: skip
    labels: dict[int, Labels] = {}
    rows = store.rows(split="train")
    compositions = store.composition(rows)
    for k, name in enumerate(names):
        covered = rows[base.spec.references.covers(name, compositions)]
        if not len(covered):
            continue
        for row, own in _predictions(base, store, choose(store, covered, 0, most), name, properties):
            labels.setdefault(row, {}).update({(k, prop): value for prop, value in own.items()})
    if not labels:
        known_ones = "; ".join(f"{n}: {' '.join(base.spec.references.elements(n)) or 'none'}" for n in names)
        raise InputError(
            f"fine_tune.replay: predictions: no training structure of {store.path} consists of elements that "
            f"{base.path} knows ({known_ones}); take replay: data, or none"
        )
    order = sorted(labels)

    def after(key: bytes) -> Iterator[tuple[int, bytes]]:
        begin = int(np.searchsorted(order, int.from_bytes(key, "big"), "right")) if key else 0
        for row in order[begin:]:
            yield row, records.pack_labels(labels[row], int(store.n_atoms[row]))

    chain = licence_chain(base.spec.provenance)
    source = {
        "name": SOURCE,
        "licence": "; ".join(dict.fromkeys(str(s.get("licence", "")) for s in chain)),
        "citation": f"predictions of {base.path.name}",
    }
    write_beside(store, folder, FidelityTable(base.fidelities[n] for n in names), source, after, made_from)


def _predictions(
    base: Loaded, store: Store, rows: np.ndarray, name: str, properties: Sequence[Property]
) -> Iterator[tuple[int, dict[Property, np.ndarray]]]:
    table, index = base.spec.reference_table(), base.fidelities.index(name)
    stress = STRESS in properties and base.potential.has_stress
    of_any = store.fidelities.names[0]  # whose labels nothing reads
    for batch in systems_at(base, store, rows, of_any, name):
        prediction = base.potential(batch, forces=FORCES in properties, stress=stress)
        energies = prediction.energy + reference_energy(batch, table)
        assert int(batch.fidelity_idx[0]) == index
        forces = None if prediction.forces is None else torch.split(prediction.forces, batch.n_atoms.tolist())
        for i, row in enumerate(batch.rows.tolist()):
            own: dict[Property, np.ndarray] = {ENERGY: energies[i].numpy()}
            if forces is not None:
                own[FORCES] = forces[i].numpy()
            if prediction.stress is not None and float(batch.volume[i]) > 0:
                own[STRESS] = prediction.stress[i].double().numpy()
            yield row, own
