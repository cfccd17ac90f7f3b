"""Commands on a GPU start as interpreters of their own: what a parent has seen of a device does not outlive a fork."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def run_mffm() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return the function that runs the command line."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "mffm", *arguments], capture_output=True, text=True, **options)

    return run
