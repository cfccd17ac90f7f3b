"""The labelling scripts as modules, and what they need to run."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
DATA = ROOT / "data"
# Where the scripts and fake_levels are found, here and in spawned workers.
sys.path[:0] = [str(ROOT / "tools"), str(Path(__file__).parent)]


@pytest.fixture(scope="session")
def label_codes() -> None:
    """Skip, with the remedy, where PySCF and tblite (the ``label`` extra) are missing."""
    missing = [name for name in ("pyscf", "tblite") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: labels cannot be computed; pip install -e '.[label]'")
