"""What processes of an ingest, a labelling and a benchmark share."""

import os
import subprocess
import sys

import pytest

from mffm.data.workers import THREADS, one_thread_each

SAY = [sys.executable, "-c", "import os; print(os.environ.get('OMP_NUM_THREADS'), os.environ.get('MKL_NUM_THREADS'))"]


def said() -> str:
    return subprocess.run(SAY, capture_output=True, text=True, check=True).stdout.strip()


def test_processes_that_start_inside_have_one_thread_and_nothing_is_left(monkeypatch: pytest.MonkeyPatch):
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    before = dict(os.environ)
    with one_thread_each():
        assert said() == "1 1"
    assert dict(os.environ) == before
    assert said() == "7 None"
    with pytest.raises(KeyError), one_thread_each():
        raise KeyError
    assert dict(os.environ) == before
