"""Train MACE by its own mace_run_train until the clock says so. Runs in MACE's environment; tools/bench_training.py."""

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from clock import Clock, read_job
from mace.cli import run_train
from mace.tools import checkpoint

train = importlib.import_module("mace.tools.train")  # mace.tools has a function of that name


def flags(job: dict[str, Any]) -> list[str]:
    n_epochs = max(2, job["steps"] * job["batch"] // job["n_train"]) if job["steps"] else 1000
    given = {
        "name": "run", "work_dir": job["folder"], "model": "MACE", "r_max": job["cutoff"], "device": "cpu",
        "train_file": job["train"], "valid_file": job["val"], "E0s": "average", "default_dtype": "float32",
        "energy_key": "energy", "forces_key": "forces", "stress_key": "stress",
        "batch_size": job["batch"], "valid_batch_size": 10, "max_num_epochs": n_epochs,
        "start_swa": n_epochs * 4 // 5, "seed": job["seed"], "plot": False, **job["options"],
    }  # fmt: skip
    return [f"--{k}={v}" for k, v in given.items()] + ["--swa", "--ema", "--amsgrad", "--restart_latest"]


def main() -> None:
    job = read_job()
    held: dict[str, Any] = {}

    def copy(path: Path) -> None:
        with held["ema"].average_parameters():
            torch.save(held["model"], f"{path}.model")

    clock = Clock(job, copy)
    whole, take_step, save = run_train.tools.train, train.take_step, checkpoint.CheckpointIO.save

    def timed(**arguments: Any) -> None:
        held.update(model=arguments["model"], ema=arguments["ema"], resumed=arguments["start_epoch"] > 0)
        whole(**{**arguments, "save_all_checkpoints": True})
        clock.finish()

    def stepped(**arguments: Any) -> Any:
        if clock.zero is None:  # behind a validation of the untrained model
            clock.start(held["resumed"], n_parameters=sum(p.numel() for p in held["model"].parameters()))
        done = take_step(**arguments)
        clock.tick()
        return done

    def saved(self: Any, content: Any, epochs: int, keep_last: bool = False) -> None:
        save(self, content, epochs, keep_last)
        clock.saved()
        for path in Path(self.directory).glob("*.pt"):  # MACE keeps either the best or all; a resume needs the newest
            if path != Path(self.old_path):
                path.unlink()
        self.old_path = None

    run_train.tools.train, train.take_step, checkpoint.CheckpointIO.save = timed, stepped, saved
    sys.argv[1:] = flags(job)
    run_train.main()


if __name__ == "__main__":
    main()
