"""Train a recipe of mffm until the clock says so; the clock ticks where the moving average is updated."""

from pathlib import Path
from typing import Any

from clock import Clock, read_job

from mffm.config.base import load
from mffm.config.recipe import Recipe
from mffm.release import write_weights
from mffm.training import loop


def main() -> None:
    job = read_job()
    run = Path(job["folder"]) / "run"
    held: dict[str, Any] = {}
    clock = Clock(job, lambda path: write_weights(run / "weights" / f"{path.name}.safetensors", held["ema"].weights))

    class Timed(loop.MovingAverage):
        def __init__(self, named_parameters: Any, decay: float):
            named = dict(named_parameters)
            super().__init__(named.items(), decay)
            held["ema"] = self
            n = sum(p.numel() for p in named.values())
            clock.start(resumed=(run / "checkpoints" / "latest").exists(), n_parameters=n)

        def update(self, named_parameters: Any) -> None:
            super().update(named_parameters)
            clock.tick()

    save = loop.checkpoint.save

    def saved(*arguments: Any) -> None:
        save(*arguments)
        clock.saved()

    loop.MovingAverage, loop.checkpoint.save = Timed, saved
    if (run / "checkpoints" / "latest").exists():
        outcome = loop.resume(run)
    else:
        more = [f"seed={job['seed']}", f"run={run}", f"train.steps={job['steps'] or 10**6}"]
        changes = [*job["options"]["changes"], *more]
        outcome = loop.train(load(Recipe, job["options"]["recipe"], changes))
    if outcome.ended != "interrupted":
        clock.finish()


if __name__ == "__main__":
    main()
