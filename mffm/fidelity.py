"""Fidelities: levels of theory whose energies may be compared with each other, and their fixed order."""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

from mffm.errors import InputError, known


@dataclass(frozen=True)
class Fidelity:
    """One level of theory with its code and settings.

    PBE from PySCF, GPAW and VASP are three fidelities until a comparison shows otherwise.
    """

    name: str
    level_of_theory: str
    code: str = ""
    settings: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


class FidelityTable:
    """Fidelities in a frozen order: name ↔ index. A new fidelity is appended; the order never changes."""

    def __init__(self, fidelities: Iterable[Fidelity]):
        self._fidelities = tuple(fidelities)
        self._index = {f.name: i for i, f in enumerate(self._fidelities)}
        if len(self._index) != len(self._fidelities):
            names = [f.name for f in self._fidelities]
            twice = sorted({n for n in names if names.count(n) > 1})
            raise InputError(f"fidelity named twice: {', '.join(twice)}; give every fidelity a name of its own")

    def __len__(self) -> int:
        return len(self._fidelities)

    def __iter__(self) -> Iterator[Fidelity]:
        return iter(self._fidelities)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def __getitem__(self, name: str) -> Fidelity:
        return self._fidelities[self.index(name)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FidelityTable) and self._fidelities == other._fidelities

    def __hash__(self) -> int:
        return hash(self._fidelities)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self._fidelities)

    def index(self, name: str) -> int:
        """Return the index of a fidelity.

        Raises:
            InputError: the name is unknown; the message lists the known ones.
        """
        if name not in self._index:
            raise InputError(f"unknown fidelity {name!r}; known fidelities: {known(self._index)}")
        return self._index[name]

    def appended(self, fidelity: Fidelity) -> "FidelityTable":
        """Return a table with one more fidelity at the end."""
        return FidelityTable((*self._fidelities, fidelity))

    def to_list(self) -> list[dict[str, str]]:
        return [f.to_dict() for f in self._fidelities]

    @classmethod
    def from_list(cls, rows: Iterable[dict[str, str]]) -> "FidelityTable":
        return cls(Fidelity(**row) for row in rows)
