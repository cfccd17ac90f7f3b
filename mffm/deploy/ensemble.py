"""Several potentials of one level of theory, for structures of ASE: their mean, and how far they are apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms

from mffm.data.neighbors import NeighborList
from mffm.deploy.at_fidelity import DTYPES, AtFidelity, Results
from mffm.errors import InputError, known
from mffm.release import Loaded, load

MEANS = ("energy", "free_energy", "energies", "forces", "stress")


class Ensemble:
    """Potentials folded to one fidelity, in the place of a single one (``AtFidelity``).

    Args:
        releases: two or more folders of releases or runs, or what ``mffm.release.load`` returns for them.
        fidelity, dtype, device, weights, d3: of each; see ``AtFidelity``.

    Raises:
        InputError: fewer than two, the same weights twice, other cutoffs or levels of theory; what ``AtFidelity``
            raises.
    """

    def __init__(
        self,
        releases: Sequence[str | Path | Loaded],
        fidelity: str,
        dtype: str = "float32",
        device: str | torch.device = "cpu",
        weights: str = "best",
        d3: Mapping[str, Any] | None = None,
    ):
        if dtype not in DTYPES:
            raise InputError(f"dtype {dtype!r}: known are {known(DTYPES)}")
        loaded = [r if isinstance(r, Loaded) else load(r, weights, device, DTYPES[dtype]) for r in releases]
        require_ensemble(loaded, [fidelity])
        self.members = [AtFidelity(one, fidelity, dtype, device, d3=d3) for one in loaded]
        self.is_conservative = all(member.is_conservative for member in self.members)

    @property
    def cutoff(self) -> float:
        """Å"""
        return self.members[0].cutoff

    def describe(self) -> dict[str, Any]:
        """Return what predictions depend on besides the structure, as JSON."""
        return {"members": [member.describe() for member in self.members]}

    def check(self, atoms: Atoms) -> None:
        """Refuse a structure that one of the members cannot calculate; see ``AtFidelity.check``."""
        for member in self.members:
            member.check(atoms)

    def predict(
        self, structures: Sequence[Atoms], lists: Sequence[NeighborList] | None = None
    ) -> list[Results | InputError]:
        """Return the means of ASE's results, and standard deviations of the members about them, of each structure.

        Args:
            lists: neighbor list of each structure within the cutoff, where it is known.

        Returns:
            what ``AtFidelity.predict`` returns, energy_std (eV, of the total energy) and forces_std [n, 3] (eV/Å), with
            n_members - 1 in the denominator; an error where one of the members has one.
        """
        found = [member.predict(structures, lists) for member in self.members]
        return [_together(results) for results in zip(*found, strict=True)]


def require_ensemble(loaded: Sequence[Loaded], fidelities: Sequence[str]) -> None:
    """Refuse potentials that are no ensemble at these fidelities.

    Raises:
        InputError: fewer than two, the same weights twice, other cutoffs or levels of theory.
    """
    if len(loaded) < 2:
        raise InputError(f"an ensemble of {len(loaded)}: give two releases or more, of other seeds for instance")
    first = loaded[0]
    seen: dict[str, Path] = {}
    for one in loaded:
        if one.weights_sha256 in seen:
            raise InputError(f"{one.path}: has the weights of {seen[one.weights_sha256]}; give each member once")
        seen[one.weights_sha256] = one.path
        if one.potential.cutoff != first.potential.cutoff:
            raise InputError(
                f"{one.path}: cutoff {one.potential.cutoff:g} Å, in {first.path} {first.potential.cutoff:g} Å; "
                "members of an ensemble have one cutoff"
            )
        for name in fidelities:
            mine, others = (x.fidelities[x.fidelities.names[x.fidelities.index(name)]] for x in (one, first))
            if mine != others:
                raise InputError(
                    f"{one.path}: fidelity {name!r} is {mine.level_of_theory} ({mine.code}), in {first.path} "
                    f"{others.level_of_theory} ({others.code}); an ensemble predicts one level of theory"
                )


def _together(members: Sequence[Results | InputError]) -> Results | InputError:
    results: list[Results] = []
    for one in members:
        if isinstance(one, InputError):
            return one
        results.append(one)
    means: Results = {}
    for name in MEANS:
        values = [one[name] for one in results if name in one]
        if len(values) == len(results):
            means[name] = np.mean(values, axis=0) if np.ndim(values[0]) else float(np.mean(values))
    means["energy_std"] = float(np.std([one["energy"] for one in results], ddof=1))
    means["forces_std"] = np.std([one["forces"] for one in results], axis=0, ddof=1)
    return means
