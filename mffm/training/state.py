"""The state of a run besides its tensors: typed, JSON-able, restored strictly."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mffm.errors import InputError


@dataclass
class TrainState:
    """What a resume needs to go on as if nothing had happened.

    Attributes:
        step: finished optimiser updates.
        cursor: the plan's cursor after that step.
        plan_fingerprint: of everything that decides the order of the data.
        world_size: ranks that wrote the state; another number resumes with the same global batches, not
            bit-identically.
        systems_seen: fidelity → systems trained on.
        best: metric name → {"value", "step"}.
        validations_since_best: for early stopping.
        ema_updates: updates of the moving average.
        wandb_id: so that a resumed run goes on in the tracker.
    """

    step: int
    cursor: dict[str, Any]
    plan_fingerprint: str
    world_size: int
    systems_seen: dict[str, int] = field(default_factory=dict)
    best: dict[str, dict[str, float]] = field(default_factory=dict)
    validations_since_best: int = 0
    ema_updates: int = 0
    wandb_id: str = ""

    def note(self, metrics: Mapping[str, float], main: str, watched: Iterable[str], finish_start: int | None) -> None:
        """Note a validation: the best value of each metric, and for how long the main one has not become better.

        Where the plan ends on some fidelities alone, from the step ``finish_start`` on, the main metric does not look
        back beyond that step, and its patience begins there: a few frames of an expensive fidelity would now and then
        choose weights that are far from trained.
        """
        is_before = finish_start is not None and self.step < finish_start
        self.validations_since_best = 0 if is_before else self.validations_since_best + 1
        if self.step == finish_start:
            self.best.pop(main, None)
        for key in watched:
            if math.isfinite(metrics[key]) and (key not in self.best or metrics[key] < self.best[key]["value"]):
                self.best[key] = {"value": metrics[key], "step": self.step}
                if key == main:
                    self.validations_since_best = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any], place: str) -> "TrainState":
        """Restore a state.

        Raises:
            InputError: keys are missing or unknown.
        """
        expected = set(cls.__dataclass_fields__)
        if set(content) != expected:
            raise InputError(
                f"{place}: keys differ from this version's: {sorted(set(content) ^ expected)}; resume with the "
                "version that wrote it"
            )
        return cls(**content)
