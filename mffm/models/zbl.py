"""Screened repulsion of nuclei at short range (Ziegler, Biersack and Littmark, 1985), as a term without parameters."""

import torch
from ase.data import covalent_radii
from torch import Tensor, nn

from mffm.batch import Batch
from mffm.blocks import Blocks
from mffm.models.angular import Constant
from mffm.models.contraction import sum_over_received, sum_over_sent
from mffm.models.density import envelope
from mffm.models.terms import TermOutput

COULOMB = 14.3996454  # e²/(4πε0), eV Å
SCREENING = 0.8854 * 0.529177211  # Å
# φ(x) = Σ a exp(-b x)
AMPLITUDES = (0.18175, 0.50986, 0.28022, 0.02817)
EXPONENTS = (3.19980, 0.94229, 0.40290, 0.20162)
ENVELOPE_POWER = 6


class Zbl(nn.Module):
    """E = Σ over pairs of Z_i Z_j e² / (4πε0 r) φ(r / a) × envelope; a = 0.8854 a0 / (Z_i^0.23 + Z_j^0.23).

    The envelope ends, with two derivatives, at the sum of the covalent radii (as MACE's), so bonds hardly feel it.

    Args:
        cutoff: Å, of the neighbor list; no pair reaches further.
    """

    def __init__(self, cutoff: float):
        super().__init__()
        self.cutoff = cutoff
        self.own_derivatives = False
        self._radii = Constant(torch.from_numpy(covalent_radii.copy()))

    def forward(self, batch: Batch, edge_vectors: Tensor) -> TermOutput:
        numbers = batch.atomic_numbers
        z = numbers.to(edge_vectors.dtype)
        radii = self._radii.like(edge_vectors)[numbers]
        receivers, senders = batch.receivers, batch.neighbors
        r = edge_vectors.square().sum(-1).sqrt()
        power = z.pow(0.23)
        x = r * ((power[receivers] + power[senders]) / SCREENING)
        screening = sum(a * torch.exp(-b * x) for a, b in zip(AMPLITUDES, EXPONENTS, strict=True))
        end = (radii[receivers] + radii[senders]).clamp_max(self.cutoff)
        energies = 0.5 * COULOMB * z[receivers] * z[senders] / r * screening * envelope(r / end, ENVELOPE_POWER)
        energies = energies.unsqueeze(-1)
        atoms = sum_over_received(energies, batch)
        if isinstance(batch, Blocks):  # of each pair only one direction
            atoms = atoms + sum_over_sent(energies, batch)
        return TermOutput(atoms.squeeze(-1))
