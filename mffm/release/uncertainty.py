"""Last-layer uncertainty of energies, per fidelity: how far a structure is from the training set as the head sees it.

LLPR (Bigi, Chong, Ceriotti, Grasselli, MLST 5 (2024) 045018, doi:10.1088/2632-2153/ad805f): with f_i the inputs of the
last linear map of atom i, F = Σ_i f_i of a system, N its atoms and C = Σ (F/N)(F/N)ᵀ over the training systems,

    σ² = α² Fᵀ (C + ς² 1)⁻¹ F        of the total energy, eV²

α makes σ right on average on the validation split, α = √(π/2) mean(|residual| / σ); ς² is the one of a grid under which
the residuals are the likeliest. Few labels leave C without rank, so that ς² decides then, not rounding.

The potential is folded to the fidelity before: a delta head's last map takes base and correction together.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mffm.batch import Batch, reference_energy
from mffm.config.base import validate
from mffm.config.recipe import Recipe
from mffm.data.plan import build_pools
from mffm.data.store import Store
from mffm.errors import InputError, known
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY
from mffm.models.potential import Potential
from mffm.release.loading import Loaded
from mffm.release.systems import systems_at

MAX_TRAINING, MAX_VALIDATION = 20_000, 5_000  # systems; evenly spaced ones of more
MIN_VALIDATION = 10  # labels that two numbers may be fitted to
_GRID = 10.0 ** np.arange(-12, 2)  # ς² over the mean eigenvalue of C


class Systems(NamedTuple):
    """Of systems, in float64: rows [n] of the store; n_atoms [n]; residuals [n] = prediction − label of the total
    energy, eV, NaN where there is no label or reference; inputs [n, width], the F above.
    """

    rows: np.ndarray
    n_atoms: np.ndarray
    residuals: np.ndarray
    inputs: np.ndarray


@dataclass(frozen=True)
class LastLayer:
    """σ of one fidelity: factor [width, width] float64, σ = |factor · F|."""

    fidelity: str
    factor: Tensor

    def std(self, plain: Potential, batch: Batch) -> Tensor:
        """Return the standard deviation of each system's total energy. [n_systems] float64, eV

        Args:
            plain: the potential folded to the fidelity.
            batch: systems at index 0, the only fidelity of ``plain``.
        """
        inputs = batch.system_sums(plain.last_inputs(batch).double())
        return torch.linalg.vector_norm(inputs @ self.factor.to(inputs).t(), dim=1)

    def of(self, inputs: np.ndarray) -> np.ndarray:
        """Return the same for F [n, width]."""
        return np.asarray(np.linalg.norm(inputs @ self.factor.numpy().T, axis=1))


def of(loaded: Loaded, fidelity: str) -> LastLayer:
    """Return the uncertainty that a release has for a fidelity.

    Raises:
        InputError: it has none, or one of another potential.
    """
    loaded.fidelities.index(fidelity)
    tensors = {} if loaded.contents is None else loaded.contents.uncertainty
    factor = tensors.get(f"{fidelity}.factor")
    if factor is None:
        have = known(name.removesuffix(".factor") for name in tensors)
        raise InputError(
            f"{loaded.path}: no uncertainty at {fidelity!r}; it has one at: {have}; mffm release RUN NEW --uncertainty "
            "fits it"
        )
    width = factor.shape[-1]
    if factor.shape != (width, width) or factor.dtype != torch.float64 or not bool(factor.isfinite().all()):
        raise InputError(f"{loaded.path}: the uncertainty at {fidelity!r} is not a square matrix of numbers")
    return LastLayer(fidelity, factor)


def fit(loaded: Loaded, store: Store) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Fit σ for every fidelity that has validation labels.

    Args:
        store: the one that the potential was trained on.

    Returns:
        tensors by name, and a report for ``uncertainty.json``.

    Raises:
        InputError: another store, or no fidelity has enough validation labels.
    """
    stated = loaded.spec.provenance.get("store_fingerprint")
    if stated != store.fingerprint:
        raise InputError(
            f"{store.path}: fingerprint {store.fingerprint[:12]}, but {loaded.path} was trained on {str(stated)[:12]}: "
            "the uncertainty needs that store, with the same label layers"
        )
    recipe = validate(Recipe, loaded.spec.provenance.get("recipe", {}), f"{loaded.path}: the recipe in provenance.json")
    # A fine-tuning may have had labels that its release predicted, and fidelities that its store does not know.
    stored = [pool for pool in recipe.data.plan.pools if pool.source in (None, *store.source_names)]
    table = FidelityTable(store.fidelities[name] for name in dict.fromkeys(pool.fidelity for pool in stored))
    plan = recipe.data.plan.model_copy(update={"pools": stored})
    pools = build_pools(store, plan, table, loaded.spec.model.backbone.cutoff)
    tensors: dict[str, Tensor] = {}
    report: dict[str, Any] = {}
    for name in loaded.fidelities.names:
        own = [pool for pool in pools if pool.fidelity == name]
        trained = np.unique(
            np.concatenate([pool.rows for pool in own if ENERGY in pool.properties] or [np.zeros(0, int)])
        )
        validation = trained[:0]
        if name in store.fidelities:
            validation = store.rows(split=recipe.data.validation_split, fidelity=name, prop=ENERGY)
        if not len(trained) or len(validation) < MIN_VALIDATION:
            report[name] = {"reason": f"{len(trained)} training and {len(validation)} validation labels of the energy"}
            continue
        judged = systems(loaded, store, _spaced(validation, MAX_VALIDATION), name)
        if (n := int(np.isfinite(judged.residuals).sum())) < MIN_VALIDATION:
            report[name] = {"reason": f"{n} validation labels whose elements have references"}
            continue
        inputs = systems(loaded, store, _spaced(trained, MAX_TRAINING), name)
        factor, numbers = fit_factor(inputs, judged)
        tensors[f"{name}.factor"] = torch.from_numpy(factor)
        report[name] = {**numbers, "validation_split": recipe.data.validation_split}
    if not tensors:
        reasons = "; ".join(f"{name}: {entry['reason']}" for name, entry in report.items())
        raise InputError(f"{loaded.path}: no uncertainty can be fitted: {reasons}; it needs {MIN_VALIDATION}")
    return tensors, {"method": "LLPR, doi:10.1088/2632-2153/ad805f", "fidelities": report}


def fit_factor(trained: Systems, validation: Systems) -> tuple[np.ndarray, dict[str, Any]]:
    """Return the factor [width, width] with σ = |factor · F|, and how it was chosen."""
    per_atom = trained.inputs / trained.n_atoms[:, None]
    eigenvalues, vectors = np.linalg.eigh(per_atom.T @ per_atom)
    eigenvalues = eigenvalues.clip(min=0.0)
    labelled = np.isfinite(validation.residuals)
    residuals, inputs = validation.residuals[labelled], validation.inputs[labelled] @ vectors
    best: tuple[float, float, float, float] | None = None
    for relative in _GRID:
        regularisation = relative * float(eigenvalues.mean())
        raw = np.sqrt((np.square(inputs) / (eigenvalues + regularisation)).sum(1))
        alpha = math.sqrt(math.pi / 2) * float(np.mean(np.abs(residuals) / raw))
        likelihood = negative_log_likelihood(residuals, alpha * raw)
        if best is None or likelihood < best[0]:
            best = likelihood, alpha, regularisation, float(relative)
    assert best is not None
    likelihood, alpha, regularisation, relative = best
    factor = alpha / np.sqrt(eigenvalues + regularisation)[:, None] * vectors.T
    return np.ascontiguousarray(factor), {
        "n_training": len(trained.rows),
        "n_validation": int(labelled.sum()),
        "width": factor.shape[0],
        "alpha": alpha,
        "regularisation": regularisation,
        "regularisation_of_mean_eigenvalue": relative,
        "negative_log_likelihood": likelihood,
    }


def negative_log_likelihood(residuals: np.ndarray, std: np.ndarray) -> float:
    """Return the mean negative log-likelihood of residuals [n] under normal distributions of widths [n], eV."""
    return float(np.mean(0.5 * np.square(residuals / std) + np.log(std))) + 0.5 * math.log(2 * math.pi)


def systems(loaded: Loaded, store: Store, rows: np.ndarray, fidelity: str) -> Systems:
    """Return inputs of the last layer and residuals of rows of a store at one fidelity."""
    plain = loaded.potential.folded(fidelity).eval().requires_grad_(False)
    table = loaded.spec.reference_table(next(plain.parameters()).device)
    found: dict[str, list[np.ndarray]] = {name: [] for name in Systems._fields}
    for batch in systems_at(loaded, store, rows, fidelity, fidelity):
        batch = batch.to(table.device)
        references = reference_energy(batch, table)
        single = batch.with_fidelity(torch.zeros_like(batch.fidelity_idx))
        energy = plain(single, forces=False).energy + references
        residuals = torch.where(batch.masks[ENERGY], energy - batch.labels[ENERGY], torch.nan)
        inputs = batch.system_sums(plain.last_inputs(single).double())
        parts = (batch.rows, batch.n_atoms, residuals, inputs)
        for values, part in zip(found.values(), parts, strict=True):
            values.append(part.cpu().numpy())
    return Systems(*(np.concatenate(values) for values in found.values()))


def kept(
    tensors: Mapping[str, Tensor], report: Mapping[str, Any], fidelity: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what belongs to one fidelity."""
    own = {name: tensor for name, tensor in tensors.items() if name == f"{fidelity}.factor"}
    fidelities = {name: entry for name, entry in report.get("fidelities", {}).items() if name == fidelity}
    return own, {**report, "fidelities": fidelities} if report else {}


def _spaced(rows: np.ndarray, most: int) -> np.ndarray:
    return np.asarray(rows[:: -(-len(rows) // most)])
