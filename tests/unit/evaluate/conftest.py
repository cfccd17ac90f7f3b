"""Where the public reference data lie."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def public_data() -> Path:
    """Folder of the published sets; tests that need it are skipped where it is not at hand."""
    if "MFFM_DATA" not in os.environ:
        pytest.skip("MFFM_DATA (folder of the published sets) is not set")
    return Path(os.environ["MFFM_DATA"])
