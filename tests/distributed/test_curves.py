"""The loss curves of one recipe on 1 and on 2 ranks coincide within what another order of summation does."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).parents[2]
STEPS = 50


@pytest.mark.slow
def test_one_and_two_ranks_coincide_within_the_noise_floor(make_recipe: Callable[..., Path], tmp_path: Path):
    path = make_recipe(deepspeed={"zero_stage": 1})
    recipe = yaml.safe_load(path.read_text())
    del recipe["data"]["plan"]["edges_per_microbatch"]
    path.write_text(yaml.safe_dump(recipe))
    output, picture = tmp_path / "curves.json", tmp_path / "ranks.png"
    command = [sys.executable, str(ROOT / "tools" / "rank_curves.py"), "--recipe", str(path), "--steps", str(STEPS)]
    command += ["--json", str(output), "--output", str(picture)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    content = json.loads(output.read_text())
    curves = {name: np.array(curve) for name, curve in content["curves"].items()}
    assert set(curves) == {"1x1", "1x2", "1x3", "1x4", "2"}
    assert all(len(curve) == STEPS for curve in curves.values())
    ones = [curve for name, curve in curves.items() if name != "2"]
    spread = np.max([np.abs(a - b) for a, b in itertools.combinations(ones, 2)], axis=0)
    floor = np.maximum(np.maximum.accumulate(spread), 2.0**-23 * curves["1x1"])
    assert floor[-1] < 1e-3 * curves["1x1"][-1], "the floor must be rounding, else the test would say nothing"
    assert (np.abs(curves["2"] - curves["1x1"]) <= 3 * floor).all()
    assert curves["2"][-1] < curves["2"][0], "it must have learned something"
    assert picture.stat().st_size > 5000
