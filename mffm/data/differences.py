"""Differences of two fidelities as labels of a third: what an explicit delta is trained on."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mffm.data import records
from mffm.data.layers import layer_folder, publish, write_layer
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.fidelity import Fidelity
from mffm.keys import PROPERTIES, Property


def add_difference(store_path: str | Path, high: str, low: str, name: str, layer_name: str) -> dict[Property, int]:
    """Add label(high) − label(low) of every property that a row has at both as labels of the fidelity ``name``.

    Subtracted in float64; as all forces of a store, those of the difference are kept in float32. What is there already
    stays, so that a later call with another ``layer_name`` takes in what was labelled since.

    Returns:
        property → number of rows that got a label; empty where all are there already.

    Raises:
        InputError: an unknown fidelity, the same one twice, no row with both, or a fidelity or layer of that name that
            is something else.
    """
    store = Store(store_path)
    wanted = _described(store, high, low, name)
    new = {p: store.has(high, p) & store.has(low, p) for p in PROPERTIES}
    if not any(mask.any() for mask in new.values()):
        counts = store.label_counts()
        shown = "; ".join(
            f"{f}: {', '.join(f'{n} {p}' for p, n in counts.get(f, {}).items()) or 'none'}" for f in (high, low)
        )
        raise InputError(
            f"{store.path}: no structure has a label of {high!r} and of {low!r} for the same property ({shown}); label "
            "some at both, and add them with `mffm ingest --add-labels`"
        )
    if name in store.fidelities:
        if store.fidelities[name] != wanted:
            raise InputError(
                f"{store.path}: fidelity {name!r} is there already as {store.fidelities[name].level_of_theory!r} "
                f"({store.fidelities[name].settings or 'no settings'}), not as {high} − {low}: choose another name"
            )
        new = {p: mask & ~store.has(name, p) for p, mask in new.items()}
    rows = np.flatnonzero(np.any(list(new.values()), axis=0))
    if not len(rows):
        return {}
    fidelities = store.fidelities if name in store.fidelities else store.fidelities.appended(wanted)

    def after(key: bytes) -> Iterator[tuple[int, bytes]]:
        begin = int(np.searchsorted(rows, int.from_bytes(key, "big"), "right")) if key else 0
        for row in rows[begin:].tolist():
            of_high, of_low = store.labels(row, high), store.labels(row, low)
            labels = {(0, p): of_high[p].astype(np.float64) - of_low[p] for p in PROPERTIES if new[p][row]}
            yield row, records.pack_labels(labels, int(store.n_atoms[row]))

    with layer_folder(store, layer_name) as folder:
        entry = write_layer(store, folder, layer_name, layer_name, [name], after)
        publish(store, folder, entry, fidelities, _source(store, high, low, layer_name))
    return {p: int(mask.sum()) for p, mask in new.items() if mask.any()}


def _described(store: Store, high: str, low: str, name: str) -> Fidelity:
    if high == low:
        raise InputError(f"{store.path}: {high} − {low} is zero everywhere; name two fidelities")
    of_high, of_low = store.fidelities[high], store.fidelities[low]
    return Fidelity(
        name,
        level_of_theory=f"{of_high.level_of_theory} − {of_low.level_of_theory}",
        code=f"{of_high.code or 'code not given'} − {of_low.code or 'code not given'}",
        settings=f"labels of {high} minus labels of {low}",
    )


def _source(store: Store, high: str, low: str, name: str) -> dict[str, str]:
    """Return the layer's source: its labels inherit the licences and citations of those that they were made from."""
    if name in store.source_names:
        raise InputError(f"{store.path}: has a source {name!r} already: choose another layer name")
    parents = {layer.source for f in (high, low) for layer in store.layers_of[f]}
    described = [source for source in store.sources if source["name"] in parents]
    return {"name": name} | {
        key: "; ".join(dict.fromkeys(source[key] for source in described if source[key]))
        for key in ("licence", "citation")
    }
