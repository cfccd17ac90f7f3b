"""A probe: edges with the answer of the potential as it is, which travels with an export and is asked at every load."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mffm.data.neighbors import neighbor_list
from mffm.deploy.edges.model import Description
from mffm.errors import InputError
from mffm.release.outputs import make_structures
from mffm.release.spec import PotentialSpec

OF_OUTPUTS = (1, 4, 5)  # a dimer, a molecule, and a crystal smaller than the cutoff
_RELATIVE = {"float64": 1e-9, "float32": 2e-5}  # of the largest number: sums in another order
_NAMES = ("energy", "energies", "gradient")

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def inputs(spec: PotentialSpec, description: Description, dtype: torch.dtype, device: torch.device | str) -> Inputs:
    """Return three structures side by side as one list of edges, with every fourth atom left out of the energy."""
    structures = make_structures(spec)
    vectors, index, numbers = [], [], []
    start = 0
    for s in (structures[i] for i in OF_OUTPUTS):
        receivers, senders, shifts = neighbor_list(s.positions, s.cell, s.pbc, description.cutoff)
        vectors.append(s.positions[senders] - s.positions[receivers] + shifts @ s.cell)
        index.append(np.stack([receivers, senders]) + start)
        start += len(s.numbers)
        numbers.append(np.where(np.isin(s.numbers, description.numbers), s.numbers, description.numbers[0]))
    return (
        torch.as_tensor(np.concatenate(vectors), dtype=dtype, device=device),
        torch.as_tensor(np.concatenate(numbers), device=device),
        torch.as_tensor(np.concatenate(index, axis=1), device=device),
        torch.arange(start, device=device) % 4 != 3,
    )


def make(run: Callable[..., Sequence[Tensor]], given: Inputs, dtype: str) -> dict[str, Any]:
    """Return the probe as JSON: inputs, the answer of ``run`` and the tolerance, in eV and eV/Å."""
    answer = dict(zip(_NAMES, (t.detach().double().cpu() for t in run(*given)), strict=True))
    size = max(1.0, float(answer["gradient"].abs().max()))
    return {
        "inputs": [t.cpu().tolist() for t in given],
        "answer": {name: t.tolist() for name, t in answer.items()},
        "tolerance": size * _RELATIVE[dtype],
    }


def tensors(probe: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> Inputs:
    """Return the probe's inputs."""
    rij, z, index, mask = probe["inputs"]
    return (
        torch.tensor(rij, dtype=dtype, device=device), torch.tensor(z, device=device),
        torch.tensor(index, device=device), torch.tensor(mask, device=device),
    )  # fmt: skip


def require_answer(run: Callable[..., Sequence[Tensor]], probe: dict[str, Any], given: Inputs, place: str) -> None:
    """Refuse what does not answer the probe as the potential did.

    Raises:
        InputError: with the largest difference and the tolerance.
    """
    found = run(*given)
    for name, value in zip(_NAMES, found, strict=True):
        wanted = torch.tensor(probe["answer"][name], dtype=torch.float64)
        same = tuple(value.shape) == tuple(wanted.shape)
        worst = float((value.double().cpu() - wanted).abs().max()) if same else float("nan")
        if not worst <= probe["tolerance"]:
            raise InputError(
                f"{place}: {name} of the probe in it differs by {worst:.3g} from the release's answer, tolerance "
                f"{probe['tolerance']:.3g}; it does not compute this potential here: export it again"
            )
