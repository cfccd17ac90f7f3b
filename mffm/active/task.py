"""The fine-tuning of a round as a process: ``python -m mffm.active.task ROUND RELEASE``; goes on where it stopped."""

import sys
from pathlib import Path
from typing import NoReturn

from mffm.errors import EXIT_INTERRUPTED

RECIPE, RUN = "recipe.yaml", "run"


def main() -> NoReturn:
    """Begin or resume the run in a round's folder; leave with the exit code of a training."""
    from mffm import distributed
    from mffm.training import faults, finetune, loop

    place, release = Path(sys.argv[1]), sys.argv[2]

    def train() -> loop.Outcome:
        if (place / RUN / "checkpoints" / "latest").exists():
            return loop.resume(place / RUN)
        return loop.train(finetune.recipe_of(release, place / RECIPE))

    outcome = faults.process(train)
    distributed.stop()
    faults.leave(EXIT_INTERRUPTED if outcome.ended == "interrupted" else 0)


if __name__ == "__main__":
    main()
