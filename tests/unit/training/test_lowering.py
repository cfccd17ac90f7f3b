"""The compiled coupling against the operation as it runs eagerly."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Two in a row, so that one reads what another stored; a process of its own, as the compiler keeps what it is told.
PROGRAM = """
import numpy as np, torch
from mffm.models.couple import Couplings
from mffm.training import lowering
lowering.register()
rng = np.random.default_rng(0)
tensor = rng.normal(size=(4, 4, 4)) * (rng.random((4, 4, 4)) < 0.3)
parts = [(1, 1), (3, 1)]
couplings = Couplings(tensor, [(2, 2)], parts, parts)
back = Couplings(tensor[:, :, :1], parts, [(2, 2)])
x, y = ([torch.randn(m, 5, 24) for m, _ in parts] for _ in range(2))
def twice(x, y):
    return back(couplings([t + 1 for t in x], y))
expected = twice(x, y)
for t in [*x, *y]:
    torch._dynamo.mark_dynamic(t, 1)
found = torch.compile(twice)(x, y)
for a, b in zip(found, expected, strict=True):
    torch.testing.assert_close(a, b)
"""


@pytest.mark.slow
def test_compiled_coupling(tmp_path: Path) -> None:
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr[-4000:]
    wrappers = "".join(path.read_text() for path in tmp_path.rglob("*.py"))
    assert "_couple_" in wrappers, "a loop of its own"
    assert "mffm.couple" not in wrappers, "not the eager operation"
