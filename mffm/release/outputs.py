"""Reference outputs: what a release predicts for ten structures, stored with it in float64.

They tell whether another version of the code, another machine, or an export still computes the same potential. The
structures are made from the release's elements, not taken from its data, whose licence may not allow it: an atom, a
dimer, molecules, crystals (one smaller than the cutoff), a slab and a wire, with bonds near the sums of covalent radii.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from ase.data import covalent_radii

from mffm.batch import reference_energy
from mffm.config.model import DensityConfig
from mffm.data.loader import pack
from mffm.errors import InputError, known
from mffm.models.potential import Potential
from mffm.release.spec import PotentialSpec, code_version

AT_LOAD = (1, 5)  # the dimer and the smallest crystal: the check costs a load little, and covers edges and images
_PERIODIC = {5: 3, 6: 3, 7: 3, 8: 2, 9: 1}  # structure → periodic directions
_SIZES = (1, 2, 3, 5, 9, 2, 6, 12, 6, 4)
_FLOOR = 1e-9  # of the largest number: float64 sums in another order; rounding leaves 1e-13
_FLOOR_SINGLE = 2e-6  # of the largest number, float32
_MARGIN = 20.0  # times what float32 was off by where the outputs were written


@dataclass(frozen=True)
class Structure:
    """Numbers [n], positions [n, 3] Å, cell [3, 3] Å (rows), pbc [3]; charge in e, spin multiplicity (0: not given)."""

    numbers: np.ndarray
    positions: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    charge: int = 0
    spin_multiplicity: int = 0

    @property
    def geometry(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        return self.numbers, self.positions, self.cell, self.pbc


@dataclass(frozen=True)
class Values:
    """Predictions for a structure.

    Attributes:
        energy: eV, with element references; None where the fidelity lacks one of an element.
        interaction_energy: eV, without them; None where who predicts does not tell it.
        forces: [n, 3], eV/Å.
        stress: [3, 3], eV/Å³; None without three periodic directions, or where the potential has none.
    """

    energy: float | None
    interaction_energy: float | None
    forces: np.ndarray
    stress: np.ndarray | None


class Predictor(Protocol):
    """Whatever computes a release: itself, an export, a calculator."""

    def __call__(self, structures: Sequence[Structure], fidelity: str) -> Sequence[Values]: ...


@dataclass(frozen=True)
class Difference:
    """The largest difference of one structure, fidelity and property, and the tolerance; eV per atom, eV/Å, eV/Å³."""

    structure: int
    fidelity: str
    quantity: str
    value: float
    tolerance: float

    @property
    def is_within(self) -> bool:
        return self.value <= self.tolerance  # False for NaN

    def __str__(self) -> str:
        unit = {"forces": "eV/Å", "stress": "eV/Å³"}.get(self.quantity, "eV/atom")
        return (
            f"structure {self.structure} at {self.fidelity!r}: {self.quantity} differs by {self.value:.3g} {unit}, "
            f"tolerance {self.tolerance:.3g}"
        )


@dataclass
class Outputs:
    """Structures, values by fidelity in the same order, and the tolerances of each dtype.

    Attributes:
        tolerances: "float64" or "float32" → quantity → eV per atom, eV/Å or eV/Å³.
        written_by: versions of the code.
    """

    structures: list[Structure]
    values: dict[str, list[Values]]
    tolerances: dict[str, dict[str, float]]
    written_by: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        rows = []
        for i, s in enumerate(self.structures):
            row = {
                "numbers": s.numbers.tolist(), "positions": s.positions.tolist(), "cell": s.cell.tolist(),
                "pbc": s.pbc.tolist(), "charge": s.charge, "spin_multiplicity": s.spin_multiplicity,
            }  # fmt: skip
            row["fidelities"] = {
                name: {
                    "energy": values[i].energy,
                    "interaction_energy": values[i].interaction_energy,
                    "forces": values[i].forces.tolist(),
                    "stress": None if values[i].stress is None else values[i].stress.tolist(),  # type: ignore[union-attr]
                }
                for name, values in self.values.items()
            }
            rows.append(row)
        units = "eV, Å, eV/Å, eV/Å³; rows of a cell are vectors; stress has ASE's sign"
        return {"units": units, "tolerances": self.tolerances, "written_by": self.written_by, "structures": rows}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], place: str) -> "Outputs":
        """Return what ``to_dict`` gave.

        Raises:
            InputError: something is missing or has another shape.
        """
        try:
            structures: list[Structure] = []
            values: dict[str, list[Values]] = {name: [] for name in content["structures"][0]["fidelities"]}
            for row in content["structures"]:
                numbers = np.array(row["numbers"], np.int64)
                structures.append(
                    Structure(
                        numbers,
                        np.array(row["positions"], np.float64).reshape(len(numbers), 3),
                        np.array(row["cell"], np.float64).reshape(3, 3),
                        np.array(row["pbc"], bool).reshape(3),
                        int(row["charge"]),
                        int(row["spin_multiplicity"]),
                    )
                )
                for name, own in values.items():
                    found = row["fidelities"][name]
                    forces = np.array(found["forces"], np.float64).reshape(len(numbers), 3)
                    stress = found["stress"]
                    stress = None if stress is None else np.array(stress, np.float64).reshape(3, 3)
                    energy = None if found["energy"] is None else float(found["energy"])
                    own.append(Values(energy, float(found["interaction_energy"]), forces, stress))
            tolerances = {d: {q: float(t) for q, t in own.items()} for d, own in content["tolerances"].items()}
            return cls(structures, values, tolerances, dict(content.get("written_by", {})))
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise InputError(f"{place}: outputs.json lacks what it should have ({error!r}); get it again") from error


def predict(potential: Potential, spec: PotentialSpec, structures: Sequence[Structure], fidelity: str) -> list[Values]:
    """Return what a potential, on the CPU or elsewhere and in its own dtype, gives; forces and stress as float64."""
    own = next(potential.parameters())
    index = spec.fidelities.index(fidelity)
    batch = pack(
        [s.geometry for s in structures],
        [index] * len(structures),
        spec.model.backbone.cutoff,
        own.dtype,
        charge=[s.charge for s in structures],
        spin_multiplicity=[s.spin_multiplicity for s in structures],
    ).to(own.device)
    prediction = potential(batch, forces=True, stress=potential.has_stress)
    references = reference_energy(batch, spec.reference_table(own.device)).tolist()
    assert prediction.forces is not None
    forces = prediction.forces.double().cpu().numpy()
    stress = None if prediction.stress is None else prediction.stress.double().cpu().numpy()
    found, start = [], 0
    for i, s in enumerate(structures):
        energy = float(prediction.energy[i])
        total = None if np.isnan(references[i]) else energy + references[i]
        own_stress = stress[i] if stress is not None and s.pbc.all() else None
        found.append(Values(total, energy, forces[start : start + len(s.numbers)], own_stress))
        start += len(s.numbers)
    return found


def predictor(potential: Potential, spec: PotentialSpec) -> Predictor:
    """Return ``predict`` of one potential."""
    return lambda structures, fidelity: predict(potential, spec, structures, fidelity)


def compute(potential: Potential, spec: PotentialSpec) -> Outputs:
    """Return the reference outputs of a potential in eval mode; its dtype is changed and put back.

    The tolerance of float64 is for sums taken in another order. That of float32 is 20 times what float32 is off by
    here, on the CPU, and at least 2e-6 of the largest number.
    """
    before = next(potential.parameters()).dtype
    structures = make_structures(spec)
    names = spec.fidelities.names
    double = {name: predict(potential.double(), spec, structures, name) for name in names}
    single = {name: predict(potential.float(), spec, structures, name) for name in names}
    potential.to(before)
    for name, values in double.items():
        for i, found in enumerate(values):
            if not (np.isfinite(found.interaction_energy or 0.0) and np.isfinite(found.forces).all()):
                raise InputError(f"structure {i} of the reference outputs at {name!r}: the predictions are not finite")
    result = Outputs(structures, double, {"float64": {}, "float32": {}}, code_version())
    for name in names:
        for stored, found in zip(double[name], single[name], strict=True):
            for quantity, value, size in differences(stored, found):
                for dtype, floor, margin in (("float64", _FLOOR, 0.0), ("float32", _FLOOR_SINGLE, _MARGIN)):
                    own = result.tolerances[dtype]
                    own[quantity] = max(own.get(quantity, 0.0), floor * max(size, 1.0), margin * value)
    return result


def compare(stored: Outputs, predict: Predictor, dtype: str = "float64", only: Sequence[int] = ()) -> list[Difference]:
    """Return how far predictions are from the stored ones, for every structure, fidelity and quantity.

    Args:
        predict: what is compared: an export, a calculator, ``predictor`` of a potential.
        dtype: whose tolerances apply.
        only: structures; all where empty.
    """
    chosen = list(only) or list(range(len(stored.structures)))
    tolerances, found = stored.tolerances[dtype], []
    for name, values in stored.values.items():
        predictions = predict([stored.structures[i] for i in chosen], name)
        for i, prediction in zip(chosen, predictions, strict=True):
            for quantity, value, _ in differences(values[i], prediction):
                found.append(Difference(i, name, quantity, value, tolerances[quantity]))
    return found


def require_same(stored: Outputs, potential: Potential, spec: PotentialSpec, place: str) -> None:
    """Refuse a potential that does not predict what is stored for two of the structures, in float64 on the CPU.

    Raises:
        InputError: with the structure, the fidelity, the quantity, the difference and the tolerance.
    """
    before = next(potential.parameters()).dtype
    if set(stored.values) != set(spec.fidelities.names):
        raise InputError(f"{place}: outputs.json has fidelities {known(stored.values)}, not those of the release")
    try:
        found = compare(stored, predictor(potential.double(), spec), only=AT_LOAD)
    except (KeyError, IndexError) as error:
        raise InputError(f"{place}: outputs.json lacks what it should have ({error!r}); get it again") from error
    potential.to(before)
    refuse_differences(found, stored, place)


def refuse_differences(found: Sequence[Difference], stored: Outputs, place: str) -> None:
    """Refuse predictions beyond the tolerances.

    Raises:
        InputError: naming the worst.
    """
    beyond = [d for d in found if not d.is_within]
    if beyond:
        worst = max(beyond, key=lambda d: np.nan_to_num(d.value / d.tolerance, nan=np.inf))
        versions = ", ".join(f"{k} {v}" for k, v in stored.written_by.items() if k in ("mffm", "torch"))
        raise InputError(
            f"{place}: predictions differ from the reference outputs in it: {worst}; this installation does not "
            f"compute this potential: use the versions that wrote it ({versions}), and report it"
        )


def differences(stored: Values, found: Values) -> Iterator[tuple[str, float, float]]:
    """Yield quantity, largest difference, largest stored number; energies per atom. NaN where one of the two lacks."""
    n_atoms = len(stored.forces)
    pairs: list[tuple[str, Any, Any, int]] = [("forces", stored.forces, found.forces, 1)]
    if stored.energy is not None:
        pairs.append(("energy", stored.energy, found.energy, n_atoms))
    if found.interaction_energy is not None:
        pairs.append(("interaction_energy", stored.interaction_energy, found.interaction_energy, n_atoms))
    if stored.stress is not None:
        pairs.append(("stress", stored.stress, found.stress, 1))
    for quantity, a, b, divisor in pairs:
        size = float(np.abs(a).max()) / divisor
        if quantity == "energy":  # a total is references, which are added exactly, and a small interaction
            size = max(abs(float(stored.interaction_energy or 0.0)) / n_atoms, 1e-3 * size)
        value = float("nan") if b is None or np.shape(b) != np.shape(a) else float(np.abs(np.subtract(a, b)).max())
        yield quantity, value / divisor, size


def make_structures(spec: PotentialSpec) -> list[Structure]:
    """Return the ten structures of a release; they hold each of its elements where the crystals have room for them."""
    rng = np.random.default_rng(10)
    covered = sorted(np.flatnonzero(~np.isnan(spec.references.array(spec.fidelities.names)).all(axis=0)).tolist())
    elements = covered or [1, 6, 8]  # trained without energies: any will do
    sizes = list(_SIZES)
    sizes[7] = max(sizes[7], len(elements) - sum(_SIZES[:7]))
    deck: list[int] = []
    while len(deck) < sum(sizes):
        deck += rng.permutation(elements).tolist()
    has_charge = isinstance(spec.model.backbone, DensityConfig) and spec.model.backbone.charge_and_spin
    structures = []
    for i, size in enumerate(sizes):
        numbers, deck = np.array(deck[:size], np.int64), deck[size:]
        positions, cell = _arranged(numbers, _PERIODIC.get(i, 0), rng)
        charge, spin = ((-1, 0, 1)[i % 3], 1 + i % 2) if has_charge else (0, 0)
        pbc = np.arange(3) < _PERIODIC.get(i, 0)
        structures.append(Structure(numbers, positions, cell, pbc, charge, spin))
    return structures


def _arranged(numbers: np.ndarray, periodic: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and cell: each atom bonded to one before it, no pair closer than 0.9 of its covalent radii."""
    radii = np.where(np.isfinite(covalent_radii[numbers]), covalent_radii[numbers], 1.5)
    edge = (len(numbers) * (2.4 * float(radii.mean())) ** 3) ** (1 / 3)
    while True:
        cell = np.zeros((3, 3))
        skewed = edge * (np.eye(3) + rng.uniform(-0.15, 0.15, (3, 3)))
        cell[:periodic] = skewed[:periodic]
        images = np.array(list(np.ndindex(3, 3, 3))) - 1
        shifts = np.unique(images * (np.arange(3) < periodic), axis=0) @ cell
        placed = _placed(radii, shifts, rng)
        if placed is not None:
            return placed, cell
        edge *= 1.06


def _placed(radii: np.ndarray, shifts: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Return positions [n, 3], or None where the cell is too small. shifts: [n_images, 3]."""
    own = shifts[np.abs(shifts).sum(1) > 0]
    if len(own) and np.linalg.norm(own, axis=1).min() < 1.8 * radii.max():
        return None
    positions = np.zeros((1, 3))
    for i in range(1, len(radii)):
        for _ in range(200):
            anchor = rng.integers(i)
            direction = rng.normal(size=3)
            length = rng.uniform(1.0, 1.25) * (radii[i] + radii[anchor])
            trial = positions[anchor] + length * direction / np.linalg.norm(direction)
            apart = np.linalg.norm(trial + shifts[:, None] - positions, axis=2).min(0)
            if (apart > 0.9 * (radii[i] + radii[:i])).all():
                positions = np.vstack([positions, trial])
                break
        else:
            return None
    return positions
