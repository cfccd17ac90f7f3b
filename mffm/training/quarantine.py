"""A sick step is stopped before it touches the weights, written down as a replay bundle, and looked at frame by frame.

quarantine/step-00000123/
    bundle.json          reason, store, and (row, fidelity, properties) of every system of the step
    model.safetensors    the weights that the step began with
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from mffm.batch import reference_energy
from mffm.config.base import validate
from mffm.config.recipe import LossConfig
from mffm.data.loader import collate
from mffm.data.plan import StepPlan
from mffm.data.pools import bit
from mffm.data.store import Store
from mffm.distributed import Ranks
from mffm.errors import InputError
from mffm.keys import ENERGY, FORCES, PROPERTIES, Property
from mffm.loss import Loss
from mffm.release import PotentialSpec, read_json, read_weights, write_json, write_weights
from mffm.training.setup import Setup

WINDOW = 100  # steps whose median a spike is measured against
FEWEST = 20  # steps before a spike can be told


class SickStepError(Exception):
    """The loss or the gradient of a step is not finite, or the loss spikes. Raised on all ranks alike."""


class LossWatch:
    """Tells whether a step is sick from its global loss; the same answer on every rank."""

    def __init__(self, spike_factor: float | None):
        self.spike_factor = spike_factor
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def check(self, loss: float, gradient_norm: float) -> None:
        """Remember a healthy loss.

        Raises:
            SickStepError: with the reason.
        """
        if not math.isfinite(loss):
            raise SickStepError("the loss is not finite")
        if not math.isfinite(gradient_norm):
            raise SickStepError("the gradient is not finite")
        if self.spike_factor is not None and len(self._recent) >= FEWEST:
            usual = median(self._recent)
            if usual > 0 and loss > self.spike_factor * usual:
                raise SickStepError(
                    f"the loss {loss:.4g} is {loss / usual:.1f} times the median of the last {len(self._recent)} steps "
                    f"(train.spike_factor: {self.spike_factor:g})"
                )
        self._recent.append(loss)


def write_bundle(
    run: Path, setup: Setup, plan: StepPlan, step: int, reason: str, ranks: Ranks, weights: Mapping[str, Tensor]
) -> InputError:
    """Write the replay bundle of a step, begun with these weights, and return the error that stops the run."""
    folder = run / "quarantine" / f"step-{step:08d}"
    if ranks.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        systems = [
            {
                "row": int(row),
                "fidelity": setup.fidelities.names[f],
                "properties": [p for p in PROPERTIES if live & int(bit(p))],
            }
            for row, f, live in zip(plan.rows, plan.fidelity_idx, plan.live.tolist(), strict=True)
        ]
        write_weights(folder / "model.safetensors", weights)
        beside = None if setup.store.beside is None else str(setup.store.beside.resolve())
        store = {"store": str(setup.store.path.resolve()), "layers": setup.recipe.data.layers, "beside": beside}
        write_json(folder / "bundle.json", {"step": step, "reason": reason, **store, "systems": systems})
    return InputError(
        f"step {step}: {reason}; look at its {len(plan)} systems one by one with `mffm replay {folder}`, then mend or "
        f"leave out the frames, or lower optim.lr, and go on from the last checkpoint"
    )


@dataclass(frozen=True)
class Replayed:
    """One system of a bundle, alone: its share of the loss and its largest errors (NaN where there is no label)."""

    row: int
    frame_id: str
    fidelity: str
    n_atoms: int
    loss: float
    energy_error: float  # meV/atom
    force_error: float  # meV/Å, largest component
    force_label: float  # meV/Å, largest component

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss)


def replay(bundle: Path | str) -> tuple[str, list[Replayed]]:
    """Run every system of a bundle alone, on one process; return the reason and the systems, the worst first.

    Raises:
        InputError: not a bundle, or its run or store is gone.
    """
    bundle = Path(bundle)
    content = read_json(bundle / "bundle.json")
    run = bundle.parent.parent
    spec = PotentialSpec.read(run / "potential")
    potential = spec.build()
    potential.load_state_dict(read_weights(bundle / "model.safetensors"))
    potential.eval()
    beside = content.get("beside")  # labels that a release predicted, in a fine-tuning
    store = Store(content["store"], content["layers"], None if beside is None else Path(beside))
    table = spec.reference_table()
    # Factors would blur which frame is sick, and a term of weight 0 would hide it.
    section = {**spec.provenance["recipe"]["loss"], "weights": {}}
    for prop in PROPERTIES:
        section[prop] = {**section[prop], "weight": section[prop]["weight"] or 1.0}
    config = validate(LossConfig, section, str(run / "potential" / "provenance.json"))
    replayed = []
    for system in content["systems"]:
        index = spec.fidelities.index(system["fidelity"])
        batch = collate(
            store, [system["row"]], [index], spec.fidelities, [system["properties"]], spec.model.backbone.cutoff
        )
        prediction = potential(batch, forces=True, stress="stress" in system["properties"])
        reference = torch.nan_to_num(reference_energy(batch, table))
        used: dict[tuple[int, Property], int] = {(index, p): 1 for p in system["properties"]}
        loss = Loss(config, spec.fidelities.names, used)
        n_atoms = int(batch.n_atoms[0])
        counts: dict[tuple[int, Property], float] = {
            (index, p): {ENERGY: 1, FORCES: 3 * n_atoms}.get(p, 9) for p in system["properties"]
        }
        value, _ = loss(prediction, batch, reference, loss.divisors(counts, {}, "per_fidelity"))
        energy, force, label = math.nan, math.nan, math.nan
        if batch.masks[ENERGY][0]:
            energy = 1e3 * float(prediction.energy[0] - (batch.labels[ENERGY] - reference)[0]) / n_atoms
        if batch.masks[FORCES][0]:
            label = 1e3 * float(batch.labels[FORCES].abs().max())
            force = 1e3 * float((prediction.forces - batch.labels[FORCES]).abs().max())
        replayed.append(
            Replayed(
                system["row"],
                store.frame_id(system["row"]),
                system["fidelity"],
                n_atoms,
                float(value),
                energy,
                force,
                label,
            )
        )
    order = np.argsort([-r.loss if r.is_finite else -math.inf for r in replayed], kind="stable")
    return content["reason"], [replayed[i] for i in order]
