"""What long commands tell where there is no terminal."""

import pytest

from mffm.cli import progress
from mffm.cli.progress import Stages


@pytest.fixture(name="now")
def _now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The clock, in seconds; the test moves it."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_have_the_rate_and_the_time_left(now: list[float], capfd: pytest.CaptureFixture[str]):
    with Stages() as shown:
        for second in range(65):
            now[0] = float(second)
            shown("labels", 100 + second, 200, "3 failed")  # a hundred were there at the start
    lines = capfd.readouterr().err.splitlines()
    assert lines == [
        "labels, 3 failed: 130 of 200, 1 a second, 1.2 min left",
        "labels, 3 failed: 160 of 200, 1 a second, 0.7 min left",
    ]
    assert (shown.done_now, shown.rate) == (64, 1.0)


def test_a_stage_of_unknown_length_and_the_next_one(now: list[float], capfd: pytest.CaptureFixture[str]):
    with Stages() as shown:
        for now[0], stage, done in ((0.0, "read", 0), (31.0, "read", 62), (40.0, "choose", 0), (69.0, "choose", 9)):
            shown(stage, done, None)
    assert capfd.readouterr().err.splitlines() == ["read: 62, 2 a second"]
