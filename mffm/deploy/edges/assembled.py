"""From structures to edges, and from values of edges to forces and the virial."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mffm.data.neighbors import NeighborList, neighbor_list
from mffm.deploy.edges.form import EdgeValues
from mffm.deploy.edges.model import EdgeModel
from mffm.errors import InputError
from mffm.release.outputs import Predictor, Structure, Values


class Assembled(NamedTuple):
    """Values of atoms; float64.

    Attributes:
        energy: eV, of the atoms that count, with element references.
        energies: [n_atoms], eV; 0 for those that do not count.
        forces: [n_atoms, 3], eV/Å, minus the derivatives of ``energy``.
        virial: [3, 3], eV, d energy / d strain, symmetric.
    """

    energy: float
    energies: np.ndarray
    forces: np.ndarray
    virial: np.ndarray


def evaluate(
    model: EdgeModel,
    numbers: np.ndarray,
    positions: np.ndarray,
    cell: np.ndarray,
    pbc: np.ndarray,
    neighbors: NeighborList | None = None,
    counted: np.ndarray | None = None,
) -> Assembled:
    """Return the values of one structure.

    Args:
        numbers: [n_atoms]. positions: [n_atoms, 3], Å. cell: [3, 3], rows, Å. pbc: [3] bool.
        neighbors: the list within the cutoff, where it is known.
        counted: [n_atoms] bool, whose energies count; all where None.

    Raises:
        InputError: see ``EdgeModel`` and ``neighbor_list``.
    """
    receivers, senders, shifts = neighbors or neighbor_list(positions, cell, pbc, model.cutoff)
    vectors = positions[senders] - positions[receivers]
    if pbc.any():
        vectors += shifts @ cell
    mask = np.ones(len(numbers), bool) if counted is None else counted
    return assemble(model, vectors, numbers, np.stack([receivers, senders]), mask)


def assemble(
    model: EdgeModel, vectors: np.ndarray, numbers: np.ndarray, edge_index: np.ndarray, mask: np.ndarray
) -> Assembled:
    """Return the values of a list of edges; arguments as those of ``EdgeModel``, in float64 and on the CPU."""
    rij = torch.as_tensor(vectors, dtype=torch.float64).to(device=model.device, dtype=model.dtype)
    index = torch.as_tensor(edge_index, dtype=torch.int64, device=model.device)
    z = torch.as_tensor(numbers, dtype=torch.int64, device=model.device)
    counted = torch.as_tensor(mask, device=model.device)
    values = model(rij, z, index, counted)
    energies = torch.where(counted, values.energies, 0.0)
    forces, virial = forces_and_virial(values, rij, index, len(z))
    return Assembled(float(values.energy), energies.cpu().numpy(), forces.cpu().numpy(), virial.cpu().numpy())


def forces_and_virial(values: EdgeValues, rij: Tensor, edge_index: Tensor, n_atoms: int) -> tuple[Tensor, Tensor]:
    """Return forces [n_atoms, 3], eV/Å, and d energy / d strain [3, 3], eV; float64."""
    gradient = values.gradient.double()
    zero = gradient.new_zeros(n_atoms, 3)
    forces = zero.index_add(0, edge_index[0], gradient).index_add(0, edge_index[1], gradient, alpha=-1)
    virial = rij.double().T @ gradient
    return forces, 0.5 * (virial + virial.T)


def predictor(model: EdgeModel) -> Predictor:
    """Return what ``mffm.release.outputs.compare`` compares.

    Raises:
        InputError: when called, for another fidelity.
    """

    def predict(structures: Sequence[Structure], fidelity: str) -> list[Values]:
        if fidelity != model.description.fidelity:
            raise InputError(f"fidelity {fidelity!r}: this is an edge form of {model.description.fidelity!r}")
        found = []
        for s in structures:
            values = evaluate(model, *s.geometry)
            volume = abs(np.linalg.det(s.cell)) if s.pbc.all() else None
            stress = None if volume is None else values.virial / volume
            found.append(Values(values.energy, None, values.forces, stress))
        return found

    return predict
