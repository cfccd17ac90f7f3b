"""Which split a structure is in."""

import hashlib

import numpy as np

from mffm.config.data import SplitSpec
from mffm.errors import InputError


class Splitter:
    """Names the split of a structure; a pure function of the structure (or its group), never of its labels or its
    row.
    """

    def __init__(self, spec: SplitSpec, names: list[str]):
        self.spec = spec
        self.names = names  # grows with the names that the source gives
        for name in [*spec.fractions, *spec.holdout]:
            if name not in names:
                names.append(name)
        self.holdout = {group: split for split, groups in spec.holdout.items() for group in groups}
        self._edges = np.cumsum(list(spec.fractions.values()))
        self._fraction_names = list(spec.fractions)

    def split(self, given: str, group: str, geometry: bytes) -> int:
        name = given or self.holdout.get(group, "")
        if not name:
            name = self.draw(group.encode() if self.spec.by == "group" else geometry)
        if name not in self.names:
            if len(self.names) == 255:
                raise InputError(
                    f"splits.key: more than 255 splits, the last {name!r}; name an info key with few values"
                )
            self.names.append(name)
        return self.names.index(name)

    def draw(self, unit: bytes) -> str:
        """Return the split of a unit by the fractions."""
        digest = hashlib.blake2b(unit, digest_size=8, salt=b"%d" % self.spec.seed).digest()
        u = int.from_bytes(digest, "little") / 2**64
        return self._fraction_names[min(int(np.searchsorted(self._edges, u, "right")), len(self._edges) - 1)]
