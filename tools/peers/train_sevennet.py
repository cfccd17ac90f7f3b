"""Train SevenNet by its own trainer until the clock says so, on one fidelity or several.

In its environment; tools/bench_training.py and tools/study_sevennet.py.
"""

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
    """Return a preset with this job's data and length: ``base`` where the options name none.

    An option ``model`` takes the architecture of another preset; what a preset says of fidelities is kept.
    """
    presets = Path(processing_epoch.__file__).parents[1] / "presets"
    options = job["options"]
    found = yaml.safe_load((presets / f"{options.get('preset', 'base')}.yaml").read_text())
    if "model" in options:
        switches = {key: value for key, value in found["model"].items() if key.startswith("use_modal_")}
        found["model"] = yaml.safe_load((presets / f"{options['model']}.yaml").read_text())["model"] | switches
    found["model"]["chemical_species"] = "Auto"
    if job["cutoff"] is not None:
        found["model"]["cutoff"] = job["cutoff"]
    n_epochs = max(2, job["steps"] * job["batch"] // job["n_train"]) if job["steps"] else 1000
    length = {"gamma": 0.99 ** (EPOCHS / n_epochs)}
    if found["train"]["scheduler"] == "linearlr":
        length = found["train"]["scheduler_param"] | {"total_iters": n_epochs}
    found["train"].update(options.get("train", {}))
    found["train"].update(
        random_seed=job["seed"], epoch=n_epochs, scheduler_param=length,
        per_epoch=max(1, min(10, n_epochs // 50)), is_train_stress=job["stress"],
    )  # fmt: skip
    if not job["stress"]:
        kept = [record for record in found["train"]["error_record"] if record[0] != "Stress"]
        found["train"]["error_record"] = kept
    if newest:
        found["train"]["continue"] = {"checkpoint": str(newest)}
    found["data"].update(options.get("data", {}))
    for key in [key for key in found["data"] if key.startswith("load_")]:
        del found["data"][key]
    train, val = (files if isinstance(files, list) else [files] for files in (job["train"], job["val"]))
    found["data"].update(batch_size=job["batch"], load_trainset_path=train, load_validset_path=val)
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
