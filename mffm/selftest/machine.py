"""What the self-test needs of the place where it runs; ``launch.machine`` has it for SLURM and for one machine."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mffm.config.recipe import Recipe
from mffm.executor import State


class CheckFailedError(Exception):
    """A check did not pass; the message is the reason in the table."""


class NotApplicableError(Exception):
    """A check has nothing to test here, or what it needs has failed."""


class TrainingJob(Protocol):
    """A training run that was started."""

    folder: Path

    def state(self) -> State:
        """Return how the job stands; ``waiting`` also between a requeue and the next start."""
        ...

    def step(self) -> int:
        """Return the last logged step."""
        ...

    def kill_rank(self, rank: int) -> None:
        """Send SIGKILL to the training process of a rank.

        Raises:
            RuntimeError: this machine cannot be asked to.
        """
        ...

    def warn(self) -> None:
        """Send SIGUSR2, as the scheduler does before it preempts."""
        ...

    def start_now(self) -> None:
        """Ask the scheduler not to hold a requeued job back."""
        ...

    def starts(self) -> int:
        """Return how often rank 0 was started."""
        ...

    def why(self) -> str:
        """Return the report of the rank that died first, or the last line of an error log."""
        ...

    def cancel(self) -> None:
        """End the job."""
        ...


class Machine(Protocol):
    """A cluster, or this machine."""

    n_ranks: int
    on_gpu: bool
    description: str

    def train(self, recipe: Recipe, ranks: int) -> TrainingJob:
        """Start a new run."""
        ...

    def resume(self, folder: Path, ranks: int) -> TrainingJob:
        """Go on with the run in a folder."""
        ...

    def run(self, module: str, arguments: Sequence[str], ranks: int, folder: Path, seconds: float) -> str | None:
        """Run ``python -m module arguments`` on every rank, at most so long; return None, or why it failed."""
        ...
