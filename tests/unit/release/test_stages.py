"""A release does not depend on how a run was dealt out: any ZeRO stage, raw or averaged weights."""

import shutil
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from mffm.release import inspection, load, save


@pytest.mark.slow
def test_from_a_checkpoint_of_any_stage(
    make_recipe: Callable[..., Path], run_mffm: Callable[..., CompletedProcess[str]], tmp_path: Path
):
    found = {}
    for stage in (0, 1, 3):
        run = tmp_path / f"stage-{stage}"
        recipe = make_recipe(f"stage-{stage}", run=str(run), deepspeed={"zero_stage": stage})
        done = run_mffm("train", str(recipe))
        assert done.returncode == 0, done.stderr
        shutil.rmtree(run / "weights")  # as after a kill: nothing but checkpoints
        for weights in ("raw", "last"):
            release = save(run / "checkpoints" / "step-00000006", tmp_path / f"{stage}-{weights}", weights)
            loaded = load(release)
            found[stage, weights] = inspection.stored_outputs(loaded).values["pbe"]
            assert loaded.spec.provenance["recipe"]["deepspeed"]["zero_stage"] == stage
    for (_, weights), values in found.items():
        for one, other in zip(values, found[0, weights], strict=True):
            np.testing.assert_allclose(one.forces, other.forces, atol=2e-5)
            assert one.interaction_energy == pytest.approx(other.interaction_energy, abs=1e-4)
    raw, averaged = (found[0, weights][7].forces for weights in ("raw", "last"))
    assert abs(raw - averaged).max() > 1e-4
