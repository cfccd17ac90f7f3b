"""The edge form with its checks: one interface for a release as it is, exported, and compiled."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.data import atomic_numbers, chemical_symbols
from torch import Tensor

from mffm.config.model import DensityConfig, EscnConfig
from mffm.deploy.at_fidelity import DTYPES, AtFidelity
from mffm.deploy.edges.form import EdgeForm, EdgeValues
from mffm.errors import InputError
from mffm.models.density import DensityBackbone
from mffm.release import Loaded, code_version

UNITS = "eV, Å; rij = x_j - x_i; gradient = d energy / d rij in eV/Å"
Run = Callable[..., Sequence[Tensor]]  # (rij, z, edge_index, mask) → the fields of EdgeValues


@dataclass(frozen=True)
class Description:
    """What a potential in edge form is.

    Attributes:
        fidelity: level of theory.
        elements: symbols, by atomic number.
        cutoff: Å.
        n_layers: message-passing layers: the energy of an atom depends on atoms up to ``n_layers`` edges away.
        dtype: "float32" or "float64", of edges and derivatives; energies are float64.
        source: the release.
        weights_sha256: of its weights.
        charge, spin_multiplicity: of every system, 0 where not given.
        versions: of mffm, torch and Python.
        units: of all numbers.
    """

    fidelity: str
    elements: tuple[str, ...]
    cutoff: float
    n_layers: int
    dtype: str
    source: str
    weights_sha256: str
    charge: int = 0
    spin_multiplicity: int = 0
    versions: dict[str, str] = field(default_factory=code_version)
    units: str = UNITS

    @property
    def reach(self) -> float:
        """Å; an atom further than this from another one does not know of it."""
        return self.n_layers * self.cutoff

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "elements": list(self.elements)}

    @classmethod
    def from_dict(cls, content: dict[str, Any], place: str) -> "Description":
        """Return what ``to_dict`` gave.

        Raises:
            InputError: something is missing or superfluous.
        """
        try:
            found = cls(**{**content, "elements": tuple(content["elements"])})
            found.numbers  # noqa: B018 - known symbols
            ok = found.cutoff > 0 and found.n_layers >= 1 and found.dtype in DTYPES
        except (TypeError, KeyError) as error:
            raise InputError(f"{place}: its description is not one of mffm ({error!r}); export it again") from error
        if not ok:
            raise InputError(f"{place}: its description makes no sense; export it again")
        return found

    @property
    def numbers(self) -> list[int]:
        """Atomic numbers of the elements."""
        return [atomic_numbers[symbol] for symbol in self.elements]


class EdgeModel:
    """A potential in edge form; see ``mffm.deploy.edges``.

    Args:
        run: the edge form, without checks.
        form: "eager", "exported" or "compiled".
        path: of the release, or of the exported file.

    Attributes:
        dtype: of ``rij`` and ``gradient``.
        can_exchange: it takes an ``exchange``.
    """

    def __init__(self, run: Run, description: Description, device: torch.device | str, form: str, path: Path):
        self._run, self.description, self.device = run, description, torch.device(device)
        self.form, self.path = form, path
        self.can_exchange = isinstance(run, EdgeForm) and isinstance(run.potential.learned.backbone, DensityBackbone)
        self.dtype = DTYPES[description.dtype]
        self._covered = torch.zeros(max(len(chemical_symbols), 256), dtype=torch.bool, device=self.device)
        self._covered[description.numbers] = True

    @property
    def cutoff(self) -> float:
        """Å"""
        return self.description.cutoff

    def __call__(
        self,
        rij: Tensor,
        z: Tensor,
        edge_index: Tensor,
        mask: Tensor,
        exchange: Callable[[Tensor], Tensor] | None = None,
    ) -> EdgeValues:
        """Return energies and derivatives.

        Args:
            rij: [n_edges, 3] in ``dtype``, Å, x_j - x_i, none longer than the cutoff. For every atom on which the sum
                depends, all of its edges, both directions of a pair being two edges.
            z: [n_atoms] int64, atomic numbers.
            edge_index: [2, n_edges] int64: i, whose neighbor j is, then j.
            mask: [n_atoms] bool: whose energies count.
            exchange: see ``mffm.edges.Edges``; where ``can_exchange``.

        Raises:
            InputError: a dtype, shape or device that is not this; an index that is no atom; an unknown element; an edge
                of no length or beyond the cutoff; values that are not finite.
        """
        self._check(rij, z, edge_index, mask)
        assert exchange is None or self.can_exchange
        with_exchange = () if exchange is None else (exchange,)
        values = EdgeValues(*self._run(rij, z, edge_index, mask, *with_exchange))
        if not bool(values.energy.isfinite() & values.gradient.isfinite().all()):
            shortest = float(rij.square().sum(1).min().sqrt()) if len(rij) else float("inf")
            raise InputError(f"energy or its derivatives are not finite; the shortest edge has {shortest:.2g} Å")
        return values

    def _check(self, rij: Tensor, z: Tensor, edge_index: Tensor, mask: Tensor) -> None:
        n_edges, n_atoms = len(rij) if rij.ndim else 0, len(z) if z.ndim else 0
        for name, tensor, shape, dtype in (
            ("rij", rij, (n_edges, 3), self.dtype),
            ("z", z, (n_atoms,), torch.int64),
            ("edge_index", edge_index, (2, n_edges), torch.int64),
            ("mask", mask, (n_atoms,), torch.bool),
        ):
            if (tuple(tensor.shape), tensor.dtype, tensor.device.type) != (shape, dtype, self.device.type):
                raise InputError(
                    f"{name}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
                    f"expected {dtype} {list(shape)} on {self.device}"
                )
        if n_atoms == 0:
            raise InputError("z: no atoms; leave the call out where a domain has none")
        if n_edges:
            low, high = (int(v) for v in edge_index.aminmax())
            if low < 0 or high >= n_atoms:
                raise InputError(f"edge_index: index {low if low < 0 else high}; there are {n_atoms} atoms")
            shortest, longest = (float(v) ** 0.5 for v in rij.square().sum(1).aminmax())
            if not (shortest > 0 and longest <= self.cutoff * (1 + 1e-6)):
                raise InputError(
                    f"rij: edges of {shortest:.4g} to {longest:.4g} Å; expected more than 0 and at most the cutoff, "
                    f"{self.cutoff:g} Å: make the list with this cutoff, in Å, without an atom as its own neighbor"
                )
        low, high = (int(v) for v in z.aminmax())
        known = self._covered[z] if low >= 0 and high < len(self._covered) else torch.zeros_like(mask)
        if not bool(known.all()):
            wrong = int(z[~known][0])
            name = chemical_symbols[wrong] if 0 < wrong < len(chemical_symbols) else f"with atomic number {wrong}"
            raise InputError(
                f"z: element {name} is unknown at fidelity {self.description.fidelity!r}; "
                f"known elements: {' '.join(self.description.elements)}"
            )


def layers_of(config: Any) -> int:
    """Return how many edges away an atom of a backbone sees."""
    return config.layers + 1 if isinstance(config, EscnConfig) else config.layers  # eSCN-MD embeds edges first


def form_of(at: AtFidelity, charge: int = 0, spin_multiplicity: int = 0) -> tuple[EdgeForm, Description]:
    """Return the module of a potential, and its description.

    Raises:
        InputError: the potential has no edge form.
    """
    place = f"{at.path} at {at.fidelity!r}"
    if not at.is_conservative:
        raise InputError(f"{place}: forces come from direct heads; the edge form is of conservative potentials")
    if "d3" in at.potential.terms:
        raise InputError(
            f"{place}: DFT-D3 has no edge form, it reaches further than the cutoff; release a potential without it and "
            "add it in the foreign code (LAMMPS: pair_style dispersion/d3)"
        )
    elements = at.spec.references.elements(at.fidelity)
    if not elements:
        raise InputError(f"{place}: no element references: this fidelity was trained without energies")
    backbone = at.spec.model.backbone
    if (charge, spin_multiplicity) != (0, 0):
        if not (isinstance(backbone, DensityConfig) and backbone.charge_and_spin):
            raise InputError(f"{place}: takes no charge and no spin multiplicity; leave them out")
        one = np.array([atomic_numbers[elements[0]]]), np.zeros((1, 3)), np.zeros((3, 3)), np.zeros(3, bool)
        at.potential.check(at.pack([one], [(charge, spin_multiplicity)]))
    references = at.spec.reference_table(at.device)[at.spec.fidelities.index(at.fidelity)]
    form = EdgeForm(at.potential, references, charge, spin_multiplicity).eval()
    return form, Description(
        at.fidelity, tuple(elements), at.cutoff, layers_of(backbone), str(at.dtype).removeprefix("torch."),
        str(at.path), at.weights_sha256, charge, spin_multiplicity,
    )  # fmt: skip


def of_release(
    release: str | Path | Loaded,
    fidelity: str,
    dtype: str = "float64",
    device: str | torch.device = "cpu",
    charge: int = 0,
    spin_multiplicity: int = 0,
) -> EdgeModel:
    """Return the edge form of a release, or of a run's best weights, as it is.

    Args:
        fidelity: level of theory; there is no default.
        charge, spin_multiplicity: of every system, for potentials that take them.

    Raises:
        InputError: see ``AtFidelity``; the potential has no edge form (direct heads, DFT-D3).
    """
    form, description = form_of(AtFidelity(release, fidelity, dtype, device), charge, spin_multiplicity)
    return EdgeModel(form, description, device, "eager", Path(description.source))
