"""What a store's manifest says of its content: counts, sizes, how large the labels are. Gathered shard by shard while
the shards are written, and added up in their order, so that the numbers do not depend on who wrote which.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mffm.data import records
from mffm.keys import ENERGY, FORCES, PROPERTIES, STRESS

if TYPE_CHECKING:
    from mffm.data.store import Store

Statistics = dict[str, Any]


def of_geometry(n_atoms: np.ndarray, element: np.ndarray) -> Statistics:
    """Return the statistics of structures.

    Args:
        n_atoms: [n_frames].
        element: atomic numbers, each once for every frame that has it.
    """
    return {
        "frames": len(n_atoms),
        "atoms": int(n_atoms.sum(dtype=np.int64)),
        "sizes": histogram(n_atoms),
        "elements": histogram(element),
    }


def histogram(values: np.ndarray) -> dict[str, int]:
    """Return value → how often, ascending; keys are text, as JSON has them."""
    found, counts = np.unique(values, return_counts=True)
    return {str(int(value)): int(count) for value, count in zip(found, counts, strict=True)}


class LabelStatistics:
    """Gathers the statistics of label records of one layer.

    Args:
        n_fidelities: of the layer.
    """

    def __init__(self, n_fidelities: int):
        self._layouts = [records.LabelLayout(k) for k in range(n_fidelities)]
        self._per_atom: list[list[float]] = [[] for _ in range(n_fidelities)]
        self._arrays: list[dict[str, list[float]]] = [
            {p: [0, 0, 0.0, 0.0] for p in (FORCES, STRESS)} for _ in range(n_fidelities)
        ]  # frames, components, sum of squares, largest

    def add(self, record: bytes | memoryview) -> None:
        """Take one record."""
        n_atoms, _, present = records.LABEL_HEADER.unpack_from(record)
        for k, layout in enumerate(self._layouts):
            if not present >> (3 * k) & 7:
                continue
            for prop, value in layout.unpack(record).items():
                if prop == ENERGY:
                    self._per_atom[k].append(float(value) / n_atoms)
                    continue
                flat = value.astype(np.float64).ravel()
                sums = self._arrays[k][prop]
                sums[0] += 1
                sums[1] += flat.size
                sums[2] += float(flat @ flat)
                sums[3] = max(sums[3], float(flat.max()), -float(flat.min()))

    def result(self, fidelities: Sequence[str]) -> Statistics:
        """Return fidelity → property → numbers; only what occurs."""
        found: Statistics = {}
        for name, per_atom, arrays in zip(fidelities, self._per_atom, self._arrays, strict=True):
            by_property: Statistics = {}
            if per_atom:
                values = np.array(per_atom)
                mean = float(values.mean())
                by_property[ENERGY] = {
                    "frames": len(values),
                    "mean": mean,
                    "squares": float(((values - mean) ** 2).sum()),
                    "least": float(values.min()),
                    "most": float(values.max()),
                }
            for prop, (frames, components, squares, largest) in arrays.items():
                if frames:
                    by_property[prop] = {
                        "frames": int(frames),
                        "components": int(components),
                        "squares": squares,
                        "largest": largest,
                    }
            if by_property:
                found[name] = by_property
        return found


def add_geometry(parts: Iterable[Statistics]) -> Statistics:
    """Return the statistics of all structures from those of the shards."""
    total: Statistics = {"frames": 0, "atoms": 0, "sizes": {}, "elements": {}}
    for part in parts:
        total["frames"] += part["frames"]
        total["atoms"] += part["atoms"]
        for name in ("sizes", "elements"):
            add_histogram(total[name], part[name])
    for name in ("sizes", "elements"):
        total[name] = dict(sorted(total[name].items(), key=lambda item: int(item[0])))
    return total


def add_histogram(total: dict[str, int], part: dict[str, int]) -> None:
    for key, count in part.items():
        total[key] = total.get(key, 0) + count


def add_labels(parts: Iterable[Statistics]) -> Statistics:
    """Return the statistics of a layer, or of several, from those of its shards."""
    total: Statistics = {}
    for part in parts:
        for fidelity, by_property in part.items():
            for prop, numbers in by_property.items():
                known = total.setdefault(fidelity, {}).get(prop)
                total[fidelity][prop] = dict(numbers) if known is None else _sum(prop, known, numbers)
    return {f: {p: total[f][p] for p in PROPERTIES if p in total[f]} for f in total}


def _sum(prop: str, a: Statistics, b: Statistics) -> Statistics:
    frames = a["frames"] + b["frames"]
    if prop != ENERGY:
        return {
            "frames": frames,
            "components": a["components"] + b["components"],
            "squares": a["squares"] + b["squares"],
            "largest": max(a["largest"], b["largest"]),
        }
    # Chan, Golub and LeVeque: means and squares about them, which sums of squares of -1e3 eV would lose.
    distance = b["mean"] - a["mean"]
    return {
        "frames": frames,
        "mean": a["mean"] + distance * b["frames"] / frames,
        "squares": a["squares"] + b["squares"] + distance**2 * a["frames"] * b["frames"] / frames,
        "least": min(a["least"], b["least"]),
        "most": max(a["most"], b["most"]),
    }


def rms(numbers: Statistics) -> float:
    """Return the root mean square of a property's components; of the energy per atom, about its mean."""
    return float(np.sqrt(numbers["squares"] / numbers.get("components", numbers["frames"])))


def of_store(store: "Store") -> tuple[Statistics, dict[str, Statistics]]:
    """Return the statistics of a store's structures and, by name, of its layers: from the manifest, or from the records
    where an older mffm wrote it.
    """
    geometry = store.manifest.get("statistics")
    if geometry is None:
        geometry = of_geometry(np.asarray(store.n_atoms), np.asarray(store.element))
    layers = {}
    for layer in store.layers:
        found = layer.meta.get("statistics")
        if found is None:
            seen = LabelStatistics(len(layer.fidelities))
            for row in layer.rows.tolist():
                seen.add(layer.record(row))
            found = seen.result(layer.fidelities)
        layers[layer.name] = found
    return geometry, layers
