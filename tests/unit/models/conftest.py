"""A brute-force batch builder (an oracle independent of vesin and of the loader) and tiny potentials of every kind."""

import itertools
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mffm.batch import Batch
from mffm.config.model import ConditioningConfig, HeadsConfig, ModelConfig
from mffm.models.potential import Potential

CUTOFF = 4.0
FIDELITIES = ("gfn2", "pbe", "ccsdt")
System = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # numbers, positions, cell

BACKBONES = {
    "default": {},
    "invariant": {"lmax": 0, "l_message": 0, "body_order": 2},
    "quartic": {"lmax": 3, "l_message": 2, "body_order": 4, "ff_expansion": 1},
    "linear": {"radial_hidden": 0, "body_order": 3},
    "single": {"lmax": 4, "l_message": 0, "layers": 1},
    "escn": {"kind": "escn", "lmax": 2, "mmax": 1, "sphere_channels": 8, "hidden_channels": 6, "n_radial": 8},
    "sevennet": {
        "kind": "sevennet", "elements": ["C", "H", "O", "Si"], "parity": True, "envelope_from": None, "n_radial": 4,
        "irreps": ["4x0e", "4x0e+2x1o+2x2e", "4x0e"], "radial_hidden": [6], "denominators": [3.0, 4.0],
        "self_connections": ["nequip", "linear"],
        "modalities": 2, "modal_sites": ["embed", "send", "receive", "output"],
    },
}  # fmt: skip
TINY = {"cutoff": CUTOFF, "channels": 8, "edge_channels": 4, "radial_hidden": 8, "n_radial": 4}
TINY_FOREIGN = {"escn": {"cutoff": CUTOFF, "edge_channels": 4}, "sevennet": {"cutoff": CUTOFF}}


def edges(
    positions: np.ndarray, cell: np.ndarray | None, cutoff: float
) -> list[tuple[int, int, tuple[int, ...], np.ndarray]]:
    """Return every (receiver, sender, shift, vector) with 0 < length < cutoff, by trying all images in reach."""
    shifts: list[tuple[int, ...]] = [(0, 0, 0)]
    if cell is not None:
        spread = np.linalg.norm(positions[:, None] - positions, axis=-1).max()
        widths = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)  # distances of opposite faces
        reach = [int(np.ceil((cutoff + spread) / width)) for width in widths]
        shifts = list(itertools.product(*(range(-n, n + 1) for n in reach)))
    found = []
    for shift in shifts:
        offset = np.zeros(3) if cell is None else np.array(shift) @ cell
        vectors = positions[None] - positions[:, None] + offset
        lengths = np.linalg.norm(vectors, axis=-1)
        for i, j in zip(*np.nonzero((lengths < cutoff) & (lengths > 1e-9)), strict=True):
            found.append((int(i), int(j), shift, vectors[i, j]))
    return found


def build_batch(
    systems: Sequence[System],
    fidelity_idx: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    cutoff: float = CUTOFF,
    extra_slots: int = 0,
) -> Batch:
    """Return systems as a batch without labels; every row gets so many further unused slots."""
    lists = [edges(p, c, cutoff) for _, p, c in systems]
    offsets = np.cumsum([0] + [len(n) for n, _, _ in systems])
    n_atoms = int(offsets[-1])
    counts = np.zeros(n_atoms, int)
    slots: dict[tuple[int, int, int, tuple[int, ...]], int] = {}
    for s, found in enumerate(lists):
        for i, j, shift, _ in found:
            slots[s, i, j, shift] = counts[offsets[s] + i]
            counts[offsets[s] + i] += 1
    # Two groups, with rows that are padded on purpose: the atom with the fewest neighbors is in the first group too.
    atom_of_row = np.argsort(-counts, kind="stable")
    if n_atoms > 2:
        atom_of_row = np.concatenate([atom_of_row[:1], atom_of_row[-1:], atom_of_row[1:-1]])
    first = min(2, n_atoms)
    groups = [
        (n, max(int(counts[rows].max()), 1) + extra_slots)
        for n, rows in ((first, atom_of_row[:first]), (n_atoms - first, atom_of_row[first:]))
        if n
    ]
    widths = np.repeat([k for _, k in groups], [n for n, _ in groups])
    row_of_atom = np.argsort(atom_of_row)
    start = (np.cumsum(widths) - widths)[row_of_atom]
    receivers = np.repeat(atom_of_row, widths)
    n_slots = len(receivers)
    neighbors, reverse, mask = receivers.copy(), np.arange(n_slots), np.zeros(n_slots, bool)
    vectors = np.zeros((n_slots, 3))
    vectors[:, 0] = 2 * cutoff
    for s, found in enumerate(lists):
        for i, j, shift, vector in found:
            slot = start[offsets[s] + i] + slots[s, i, j, shift]
            neighbors[slot], mask[slot], vectors[slot] = offsets[s] + j, True, vector
            reverse[slot] = start[offsets[s] + j] + slots[s, j, i, tuple(-n for n in shift)]
    zero = np.zeros(len(systems), dtype=np.int64)
    cells = np.stack([np.zeros((3, 3)) if c is None else c for _, _, c in systems])
    sizes = np.diff(offsets)

    def tensor(array: np.ndarray, kind: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(array).to(kind)

    return Batch(
        atomic_numbers=tensor(np.concatenate([n for n, _, _ in systems]), torch.int64),
        positions=tensor(np.concatenate([p for _, p, _ in systems]), dtype),
        cell=tensor(cells, dtype),
        neighbors=tensor(neighbors, torch.int64),
        receivers=tensor(receivers, torch.int64),
        neighbor_mask=tensor(mask, torch.bool),
        edge_vectors=tensor(vectors, dtype),
        reverse=tensor(reverse, torch.int64),
        groups=tuple(groups),
        row_of_atom=tensor(row_of_atom, torch.int64),
        atom_of_row=tensor(atom_of_row, torch.int64),
        system_idx=tensor(np.repeat(np.arange(len(systems)), sizes), torch.int64),
        fidelity_idx=tensor(zero if fidelity_idx is None else np.array(fidelity_idx), torch.int64),
        n_atoms=tensor(sizes, torch.int64),
        pbc=tensor(np.array([[c is not None] * 3 for _, _, c in systems]), torch.bool),
        volume=tensor(np.abs(np.linalg.det(cells)), dtype),
        charge=tensor(zero, torch.int64),
        spin_multiplicity=tensor(zero, torch.int64),
        labels={},
        masks={},
        weights={},
        rows=tensor(zero, torch.int64),
    )


def molecule(seed: int = 0, n: int = 5) -> System:
    """A loose random molecule without short contacts: all neighbors within the cutoff, none of the pairs symmetric."""
    rng = np.random.default_rng(seed)
    positions = rng.normal(size=(1, 3))
    while len(positions) < n:
        trial = positions[rng.integers(len(positions))] + rng.normal(size=3)
        if np.linalg.norm(positions - trial, axis=1).min() > 0.9:
            positions = np.vstack([positions, trial])
    return rng.choice([1, 6, 8], size=n), positions, None


def crystal(seed: int = 1) -> System:
    """Two atoms in a triclinic cell smaller than the cutoff: an atom neighbors its own images."""
    rng = np.random.default_rng(seed)
    cell = np.array([[2.9, 0.1, 0.0], [0.9, 3.1, 0.2], [-0.3, 0.4, 3.3]])
    positions = np.array([[0.0, 0.0, 0.0], [0.45, 0.52, 0.55]]) @ cell + rng.normal(scale=0.1, size=(2, 3))
    return np.array([14, 8]), positions, cell


def make_config(
    backbone: str = "default", conditioning: str = "none", heads: str = "shared", zero_init: bool = False
) -> ModelConfig:
    return ModelConfig(
        backbone={**TINY_FOREIGN.get(backbone, TINY), **BACKBONES[backbone]},
        conditioning=ConditioningConfig(kind=conditioning, dim=3, zero_init=zero_init),
        heads=HeadsConfig(kind=heads, hidden=[6], base="pbe" if heads == "delta" else None),
    )


@cache
def make_potential(backbone: str = "default", conditioning: str = "none", heads: str = "shared") -> Potential:
    """A tiny float64 potential in which no parameter is zero; cached, so tests do not change it."""
    torch.manual_seed(0)
    potential = Potential(make_config(backbone, conditioning, heads), FIDELITIES, avg_neighbors=6.0, scale=1.3).double()
    with torch.no_grad():
        for parameter in potential.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if heads == "delta":  # the base has no correction
            correction = potential.learned.heads.correction
            for last in (correction.weights[-1], correction.biases[-1]):
                last[FIDELITIES.index("pbe")] = 0
    return potential.eval()


@pytest.fixture
def kit() -> SimpleNamespace:
    """The functions of this file: test modules cannot import each other."""
    return SimpleNamespace(
        batch=build_batch,
        molecule=molecule,
        crystal=crystal,
        config=make_config,
        potential=make_potential,
        cutoff=CUTOFF,
        fidelities=FIDELITIES,
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every law runs on the default backbone with every conditioning and every kind of heads, on each of the others
    with each conditioning and each kind of heads: they meet the backbone at its ends, whatever its sizes.
    """
    if "potential" in metafunc.fixturenames:
        conditionings = ("none", "onehot", "embedding", "film")
        whole = itertools.product(["default"], conditionings, ("shared", "independent", "delta"))
        pairs = list(zip(conditionings, ("shared", "delta", "independent", "shared"), strict=True))
        some = [(name, *pair) for name in BACKBONES if name != "default" for pair in pairs]
        some.remove(("sevennet", "film", "shared"))  # which is none of SevenNet's
        metafunc.parametrize("potential", [*whole, *some], indirect=True, ids="-".join)


@pytest.fixture
def potential(request: pytest.FixtureRequest) -> Potential:
    return make_potential(*request.param)
