"""DFT-D3 from simple-dftd3 (LGPL) as a term without parameters: energies, forces and virials are the library's.

Grimme et al. 2010 (zero damping), 2011 (Becke-Johnson damping). The dispersion of a system depends on its geometry
alone, so in training it is a constant: added to the prediction, with no gradient in the weights, and the learned part
learns the rest of the labels. Results are kept by geometry, so that an epoch computes each frame once.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from ase.geometry import complete_cell
from ase.units import Bohr, Hartree
from torch import Tensor, nn

from mffm.batch import Batch
from mffm.config.model import D3Config
from mffm.errors import InputError, known
from mffm.models.terms import TermOutput

LAST_ELEMENT = 103  # beyond it simple-dftd3 1.7.0 gives zeros, NaN or a segmentation fault
PAIR_CUTOFF, OTHER_CUTOFF = 60.0, 40.0  # bohr, the library's own: of pairs; of triples and coordination numbers
WIDTH = 4.0  # bohr before a cutoff in which energies fall smoothly to 0; the library's own 0 makes forces jump
MARGIN = 5.0  # Å around atoms along a direction that is not periodic
KEPT_ATOMS = 1_000_000  # of kept results: 50 to 100 MB


class Dispersion(NamedTuple):
    """Of one system: atom energies [n], eV; forces [n, 3], eV/Å; virial dE/dstrain [3, 3], eV; all float64."""

    atom_energies: np.ndarray
    forces: np.ndarray
    virial: np.ndarray


def damping(config: D3Config, place: str) -> Any:
    """Return the library's damping parameters.

    Raises:
        InputError: simple-dftd3 is not installed, or has no parameters of the functional.
    """
    try:
        from dftd3.interface import RationalDampingParam, ZeroDampingParam
    except ImportError as error:
        raise InputError(f"{place} needs simple-dftd3 ({error}); install it: pip install 'mffm[d3]'") from error
    kind = RationalDampingParam if config.damping == "bj" else ZeroDampingParam
    try:
        return kind(method=config.functional, atm=config.three_body)
    except RuntimeError as error:
        raise InputError(
            f"{place}.functional {config.functional!r}: simple-dftd3 has no parameters of it with damping "
            f"{config.damping}; write it as the library does: pbe, r2scan, b3lyp"
        ) from error


def dispersion(
    config: D3Config, place: str, numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray
) -> Dispersion:
    """Return the dispersion of one system.

    Args:
        numbers: [n]. positions: [n, 3], Å. cell: [3, 3], Å, rows; of directions that are not periodic it may be zero.
        pbc: [3] bool.

    Raises:
        InputError: as for ``damping``; an element above 103.
    """
    param = damping(config, place)
    from dftd3.interface import DispersionModel

    if numbers.max() > LAST_ELEMENT:
        raise InputError(f"{place}: atomic number {numbers.max()}; DFT-D3 has elements 1 to {LAST_ELEMENT}")
    if pbc.any():
        positions, cell = _inside(positions, cell, pbc)
        model = DispersionModel(numbers, positions / Bohr, cell / Bohr, pbc)
    else:
        model = DispersionModel(numbers, positions / Bohr)
    pair = PAIR_CUTOFF if config.cutoff is None else config.cutoff / Bohr
    model.set_realspace_cutoff(pair, min(pair, OTHER_CUTOFF), OTHER_CUTOFF, WIDTH, WIDTH)
    total = model.get_dispersion(param, grad=True)
    pairs = model.get_pairwise_dispersion(param)
    energies = (pairs["additive pairwise energy"] + pairs["non-additive pairwise energy"]).sum(1)
    return Dispersion(energies * Hartree, -total["gradient"] * (Hartree / Bohr), total["virial"] * Hartree)


def _inside(positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and cell with all atoms inside along the directions that are not periodic.

    The library wraps atoms into the cell along every direction, periodic or not, and so tears a slab apart.
    """
    whole = complete_cell(np.where(pbc[:, None], cell, 0.0))
    for k in np.flatnonzero(~pbc):  # a unit vector, orthogonal to all others
        along = positions @ whole[k]
        positions = positions + whole[k] * (MARGIN - along.min())
        whole[k] *= np.ptp(along) + 2 * MARGIN
    return positions, whole


class D3(nn.Module):
    """DFT-D3 of the fidelities that have it; a ``Term`` with derivatives of its own.

    Args:
        configs: fidelity → functional and damping.
        fidelities: names in the order of ``Batch.fidelity_idx``.

    Raises:
        InputError: an unknown fidelity; as for ``damping``.
    """

    def __init__(self, configs: Mapping[str, D3Config], fidelities: Sequence[str]):
        super().__init__()
        self.own_derivatives = True
        for name, config in configs.items():
            if name not in fidelities:
                raise InputError(f"model.d3 names fidelity {name!r}; fidelities of this potential: {known(fidelities)}")
            damping(config, f"model.d3.{name}")
        self._configs = [(name, configs.get(name)) for name in fidelities]
        self.cutoff = max((c.cutoff or PAIR_CUTOFF * Bohr for c in configs.values()), default=0.0)
        self._kept: OrderedDict[bytes, Dispersion] = OrderedDict()
        self._n_kept = 0

    def forward(self, batch: Batch, edge_vectors: Tensor) -> TermOutput:
        """Return the terms of a batch from its positions, cells and pbc."""
        sizes = batch.n_atoms.tolist()
        numbers, positions = batch.atomic_numbers.cpu().numpy(), batch.positions.detach().cpu().numpy()
        cells, pbc = batch.cell.cpu().numpy(), batch.pbc.cpu().numpy()
        energies, forces = np.zeros(len(numbers)), np.zeros((len(numbers), 3))
        virials = np.zeros((len(sizes), 3, 3))
        stop = 0
        for i, (n, fidelity) in enumerate(zip(sizes, batch.fidelity_idx.tolist(), strict=True)):
            start, stop = stop, stop + n
            name, config = self._configs[fidelity]
            if config is not None:
                found = self._of(name, config, numbers[start:stop], positions[start:stop], cells[i], pbc[i])
                energies[start:stop], forces[start:stop], virials[i] = found
        like = edge_vectors
        return TermOutput(*(torch.from_numpy(x).to(like.device, like.dtype) for x in (energies, forces, virials)))

    def _of(
        self, name: str, config: D3Config, numbers: np.ndarray, positions: np.ndarray, cell: np.ndarray, pbc: np.ndarray
    ) -> Dispersion:
        key = blake2b(name.encode(), digest_size=16)
        for array in (numbers, positions, cell, pbc):
            key.update(np.ascontiguousarray(array).tobytes())
        found = self._kept.get(key.digest())
        if found is None:
            geometry = (numbers, positions.astype(np.float64), cell.astype(np.float64), pbc)
            found = dispersion(config, f"model.d3.{name}", *geometry)
            self._kept[key.digest()] = found
            self._n_kept += len(numbers)
            while self._n_kept > KEPT_ATOMS and len(self._kept) > 1:
                self._n_kept -= len(self._kept.popitem(last=False)[1].atom_energies)
        return found
