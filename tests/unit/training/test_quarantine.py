"""A step with a sick label is stopped, written down, and the replay names the frame."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mffm.cli import app
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.training.quarantine import LossWatch, SickStepError, replay

# A fit would take the wrong energy in.
GFN2_REFERENCES = {"H": -13.73, "C": -57.64, "N": -78.47, "O": -110.9}


def test_watch_tells_spikes_and_what_is_not_finite():
    watch = LossWatch(spike_factor=5.0)
    for _ in range(19):
        watch.check(1.0, 1.0)
    watch.check(100.0, 1.0)  # too few steps to tell
    with pytest.raises(SickStepError, match=r"6.0 times the median"):
        watch.check(6.0, 1.0)
    watch.check(4.0, 1.0)
    with pytest.raises(SickStepError, match="loss is not finite"):
        watch.check(float("nan"), 1.0)
    with pytest.raises(SickStepError, match="gradient is not finite"):
        LossWatch(None).check(1.0, float("inf"))


def test_replay_names_the_frame_with_the_wrong_label(
    make_recipe: Callable[..., Path], tmp_path: Path, molecule_store: Path, build_store: Callable, run_mffm: Callable
):
    """One training frame gets an energy that is 5 keV off, in the middle of a run."""
    source = (molecule_store.parent / "molecules.extxyz").read_text()
    victim = Store(molecule_store).frame_id(int(Store(molecule_store).rows(split="train", fidelity="gfn2")[7]))
    lines = [
        re.sub(r"energy_gfn2=(\S+)", lambda m: f"energy_gfn2={float(m[1]) + 5000}", line)
        if f"frame_id={victim} " in line
        else line
        for line in source.splitlines(keepends=True)
    ]
    store = build_store(tmp_path / "sick", "".join(lines))
    recipe = make_recipe(
        data={"store": str(store)},
        references={"given": {"gfn2": GFN2_REFERENCES}},
        train={"steps": 60, "validate_every": 60, "save_every": 60, "log_every": 20, "spike_factor": 8.0},
    )
    done = run_mffm("train", str(recipe))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "times the median" in done.stderr
    (bundle,) = (tmp_path / "run" / "quarantine").iterdir()
    reason, systems = replay(bundle)
    assert "times the median" in reason
    assert systems[0].frame_id == victim
    assert systems[0].loss > 5 * systems[1].loss
    shown = CliRunner().invoke(app, ["replay", str(bundle)])
    assert shown.exit_code == 0
    assert systems[0].frame_id in shown.output


def test_not_a_bundle(tmp_path: Path):
    with pytest.raises(InputError, match=r"bundle.json: no such file"):
        replay(tmp_path)
