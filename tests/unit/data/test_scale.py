"""What the size of a set costs a process that reads it: nothing that the process has for itself."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]
TOOL = ROOT / "tools" / "synthetic_store.py"


def tool(*arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two stores, the second of ten times as many frames; their pools were made by an earlier start."""
    folder = tmp_path_factory.mktemp("scale")
    for frames in (150_000, 1_500_000):
        tool("write", folder / str(frames), "--frames", frames)
        tool("probe", folder / str(frames))
    return folder / "150000", folder / "1500000"


@pytest.mark.slow
@pytest.mark.parametrize("start", ["here", "fork", "spawn"])
def test_private_memory_does_not_depend_on_the_size_of_the_set(stores, start):
    """Ten times the frames, the same private bytes within 5 %; columns in memory would be 25 MB more."""
    small, large = (json.loads(tool("probe", store, "--steps", 8, "--start", start)) for store in stores)
    assert small["private_bytes"] > 1e7
    assert abs(large["private_bytes"] / small["private_bytes"] - 1) < 0.05


def test_kept_pools_are_the_pools(stores, tmp_path, monkeypatch):
    """Columns that were kept equal those that are made anew, for any choice of frames, and give the same plan."""
    from mffm.config.recipe import PlanConfig
    from mffm.data import pools as module
    from mffm.data.plan import Plan
    from mffm.data.store import Store

    store = Store(stores[0])
    for entry in (
        {"fidelity": "pbe"},
        {"fidelity": "pbe", "split": "val", "max_frames": 700, "properties": ["energy"]},
    ):
        config = PlanConfig(pools=[entry], edge_budget=5000, oversize="skip")
        (made,) = module.build_pools(store, config, store.fidelities, 5.0)
        assert not isinstance(made.rows, np.memmap)
        monkeypatch.setattr(module, "LARGE", 1000)
        (kept,) = module.build_pools(store, config, store.fidelities, 5.0)
        (again,) = module.build_pools(Store(stores[0]), config, store.fidelities, 5.0)
        monkeypatch.undo()
        for pool in (kept, again):
            assert isinstance(pool.rows, np.memmap)
            for name in module.COLUMNS:
                assert np.array_equal(getattr(pool, name), getattr(made, name))
            assert (pool.label_counts, pool.sizes, pool.digest) == (made.label_counts, made.sizes, made.digest)
            assert Plan([pool], config, 0).fingerprint == Plan([made], config, 0).fingerprint


def test_a_store_that_cannot_be_written_keeps_its_pools_elsewhere_or_in_memory(stores, tmp_path, monkeypatch):
    from mffm.config.recipe import PlanConfig
    from mffm.data import pools as module
    from mffm.data.store import Store

    monkeypatch.setattr(module, "LARGE", 1000)
    real = Path.mkdir

    def refused(path, *arguments, **options):
        if stores[0] in path.parents:
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refused)
    store = Store(stores[0])
    config = PlanConfig(pools=[{"fidelity": "pbe", "properties": ["forces"]}], edge_budget=5000)
    (pool,) = module.build_pools(store, config, store.fidelities, 5.0)
    assert not isinstance(pool.rows, np.memmap)
    monkeypatch.setenv("MFFM_CACHE", str(tmp_path / "cache"))
    (pool,) = module.build_pools(store, config, store.fidelities, 5.0)
    assert isinstance(pool.rows, np.memmap)
    assert list((tmp_path / "cache").glob("*/pools/*/pool.json"))
