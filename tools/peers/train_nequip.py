"""Train NequIP by its own nequip-train until the clock says so. Runs in NequIP's environment; tools/bench_training.py.

The recipe is the repository's configs/tutorial.yaml (model, loss, optimiser, average) with the schedule of its
configs/3bpa.yaml, made for 450 frames of a molecule: the tutorial's, for a demonstration, asks for gains of 20 % in
5 epochs and would stop learning after minutes. Eager, which its documentation advises on a CPU.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml
from clock import Clock, read_job
from lightning.pytorch.callbacks import Callback
from nequip.scripts import train

MONITORED = "val0_epoch/weighted_sum"


class Timer(Callback):
    """The clock as Lightning's callback."""

    def __init__(self, job: str):
        self.clock = Clock(json.loads(Path(job).read_text()), self._copy)
        self.copying = False  # a copy is no checkpoint to go on from

    def _copy(self, path: Path) -> None:
        self.copying = True
        self.trainer.save_checkpoint(f"{path}.ckpt")
        self.copying = False

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.trainer = trainer
        n = sum(p.numel() for p in pl_module.model.parameters())
        self.clock.start(resumed=trainer.global_step > 0, n_parameters=n)

    def on_train_batch_end(self, *_: Any) -> None:
        self.clock.tick()

    def on_save_checkpoint(self, *_: Any) -> None:
        if not self.copying:
            self.clock.saved()

    def on_train_end(self, *_: Any) -> None:
        self.clock.finish()


def config(job: dict[str, Any]) -> dict[str, Any]:
    symbols, options, folder = job["symbols"], job["options"], job["folder"]
    stress = job["stress"]
    kind = "EnergyForceStress" if stress else "EnergyForce"
    maes = {"total_energy_mae": 1.0, "forces_mae": 1.0} | ({"stress_mae": 1.0} if stress else {})
    metrics = {"_target_": f"nequip.train.{kind}Metrics", "coeffs": maes}
    loader = {"_target_": "torch.utils.data.DataLoader", "num_workers": 0}
    return {
        "run": ["train"],
        "data": {
            "_target_": "nequip.data.datamodule.ASEDataModule", "seed": job["seed"],
            "train_file_path": job["train"], "val_file_path": job["val"],
            "transforms": [
                {"_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper", "model_type_names": symbols},
                {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": job["cutoff"]},
            ],
            "train_dataloader": {**loader, "batch_size": job["batch"], "shuffle": True},
            "val_dataloader": {**loader, "batch_size": 10},
            "stats_manager": {
                "_target_": "nequip.data.CommonDataStatisticsManager", "dataloader_kwargs": {"batch_size": 10},
                "type_names": symbols,
            },
        },
        "trainer": {
            "_target_": "lightning.Trainer", "accelerator": "cpu", "max_epochs": 100000, "logger": False,
            "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0,
            "callbacks": [
                {"_target_": "train_nequip.Timer", "job": str(Path(folder) / "job.json")},
                {
                    "_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "monitor": MONITORED, "dirpath": folder,
                    "filename": "best", "save_last": True,
                },
            ],
        },
        "training_module": {
            "_target_": "nequip.train.EMALightningModule", "ema_decay": 0.999,
            "loss": {
                "_target_": f"nequip.train.{kind}Loss", "per_atom_energy": True,
                "coeffs": {"total_energy": 1.0, "forces": 1.0} | ({"stress": 1.0} if stress else {}),
            },
            "val_metrics": metrics, "train_metrics": metrics, "test_metrics": metrics,
            "optimizer": {"_target_": "torch.optim.Adam", "lr": 0.01, "amsgrad": True},
            "lr_scheduler": {
                "scheduler": {
                    "_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau", "patience": 20, "factor": 0.8,
                    "threshold": 0.0,
                },
                "monitor": MONITORED, "interval": "epoch", "frequency": 1,
            },
            "model": {
                "_target_": "nequip.model.NequIPGNNModel", "compile_mode": "eager", "seed": job["seed"],
                "model_dtype": "float32", "type_names": symbols, "r_max": job["cutoff"], "num_bessels": 8,
                "bessel_trainable": False, "polynomial_cutoff_p": 6, "num_layers": 4, "l_max": 1, "parity": True,
                "num_features": 32, "radial_mlp_depth": 2, "radial_mlp_width": 64,
                "avg_num_neighbors": "${training_data_stats:num_neighbors_mean}",
                "per_type_energy_scales": "${training_data_stats:per_type_forces_rms}",
                "per_type_energy_shifts": {s: job["references"][s] for s in symbols},
                "per_type_energy_scales_trainable": False, "per_type_energy_shifts_trainable": False,
                **options.get("model", {}),
            },
        },
        "global_options": {"allow_tf32": False},
    }  # fmt: skip


def main() -> None:
    job = read_job()
    folder = Path(job["folder"])
    content = config(job)
    last = folder / "last.ckpt"
    if last.exists():
        content["ckpt_path"] = str(last)
    (folder / "nequip.yaml").write_text(yaml.safe_dump(content))
    sys.argv[1:] = ["-cp", str(folder), "-cn", "nequip", f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
    train.main()


if __name__ == "__main__":
    main()
