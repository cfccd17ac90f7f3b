"""The parity plot of two ranks' validation: a file in the run's folder, in W&B and in TensorBoard."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import forked
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def test_two_ranks_give_one_plot_to_every_tracker(make_recipe: Callable[..., Path], tmp_path: Path):
    recipe = make_recipe(log={"wandb": "offline", "tensorboard": True}, train={"steps": 4, "validate_every": 2})
    done = forked.ranks(2, ["-m", "mffm", "train", str(recipe)])
    assert done.returncode == 0, done.stderr[-4000:]
    run = tmp_path / "run"
    plot = (run / "plots" / "validation.png").read_bytes()
    assert plot.startswith(b"\x89PNG")

    (folder,) = (run / "wandb").glob("offline-run-*")
    inspect = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(folder)]
    shown = subprocess.run(inspect, capture_output=True, text=True, timeout=60, check=True).stdout
    rows = [json.loads(line) for line in shown.splitlines() if "validation/parity" in line]
    assert rows
    assert "image-file" in json.dumps(rows)
    (media,) = (folder / "files" / "media" / "images").rglob("*.png")
    assert media.read_bytes() == plot

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("validation/parity")] == [4]
