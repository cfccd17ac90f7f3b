"""Train SevenNet by its own trainer until the clock says so. In its environment; tools/bench_training.py."""

import sys
from pathlib import Path
from typing import Any

import yaml
from clock import Clock, read_job
from sevenn.main import sevenn as command
from sevenn.scripts import processing_epoch
from sevenn.train.trainer import Trainer

EPOCHS = 200  # of sevenn's preset `base`, whose learning rate falls by 0.99 an epoch


def config(job: dict[str, Any], newest: Path | None) -> dict[str, Any]:
    """Return the preset ``base`` or, for its architecture, ``sevennet-l3i5``, with this job's data and length."""
    presets = Path(processing_epoch.__file__).parents[1] / "presets"
    found = yaml.safe_load((presets / "base.yaml").read_text())
    options = job["options"]
    if "model" in options:
        found["model"] = yaml.safe_load((presets / f"{options['model']}.yaml").read_text())["model"]
    found["model"].update(cutoff=job["cutoff"], chemical_species="Auto")
    n_epochs = max(2, job["steps"] * job["batch"] // job["n_train"]) if job["steps"] else 1000
    found["train"].update(options.get("train", {}))
    found["train"].update(
        random_seed=job["seed"], epoch=n_epochs, scheduler_param={"gamma": 0.99 ** (EPOCHS / n_epochs)},
        per_epoch=max(1, min(10, n_epochs // 50)), is_train_stress=job["stress"],
    )  # fmt: skip
    if not job["stress"]:
        found["train"]["error_record"] = [["Energy", "RMSE"], ["Force", "RMSE"], ["TotalLoss", "None"]]
    if newest:
        found["train"]["continue"] = {"checkpoint": str(newest)}
    found["data"].update(options.get("data", {}))
    found["data"].update(
        batch_size=job["batch"], load_trainset_path=[job["train"]], load_validset_path=[job["val"]],
    )  # fmt: skip
    found["data"].pop("load_testset_path")
    return found


def main() -> None:
    job = read_job()
    folder = Path(job["folder"])
    held: dict[str, Any] = {}
    epochs, write = processing_epoch.processing_epoch_v2, Trainer.write_checkpoint

    def copy(path: Path) -> None:
        write(held["trainer"], f"{path}.pth", config=held["config"], epoch=0)

    clock = Clock(job, copy)

    def timed(settings: dict[str, Any], trainer: Trainer, loaders: Any, start_epoch: int, **more: Any) -> None:
        held.update(trainer=trainer, config=settings)
        step = trainer.optimizer.step

        def stepped(*arguments: Any, **keywords: Any) -> Any:
            done = step(*arguments, **keywords)
            clock.tick()
            return done

        trainer.optimizer.step = stepped
        n = sum(p.numel() for p in trainer.model.parameters())
        clock.start(resumed=start_epoch > 1, n_parameters=n)
        epochs(settings, trainer, loaders, start_epoch, **more)
        clock.finish()

    def saved(self: Trainer, path: str, **more: Any) -> None:
        write(self, path, **more)
        if "best" not in path:
            clock.saved()
            for old in folder.glob("checkpoint_*.pth"):
                if old != Path(path) and "best" not in old.name:
                    old.unlink()

    processing_epoch.processing_epoch_v2 = timed
    Trainer.write_checkpoint = saved
    found = [p for p in folder.glob("checkpoint_*.pth") if p.stem.split("_")[1].isdigit() and p.stem != "checkpoint_0"]
    newest = max(found, key=lambda p: int(p.stem.split("_")[1]), default=None)
    (folder / "input.yaml").write_text(yaml.safe_dump(config(job, newest)))
    sys.argv[1:] = ["train", str(folder / "input.yaml"), "-w", str(folder)]
    command.main()


if __name__ == "__main__":
    main()
