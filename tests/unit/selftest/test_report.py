"""The table: counts, Markdown, JSON, and text that looks like markup."""

import json
from pathlib import Path

from rich.console import Console

from mffm.selftest.report import Report, Result


def make() -> Report:
    return Report(
        "this machine",
        [
            Result("one", "passed", "3 GB/s", "sums are right", 1.2),
            Result("two", "failed", "", "rank [1] | died", 0.4),
            Result("three", "n/a", reason="one rank"),
        ],
        expect=["12 atoms/s"],
        environment=[{"rank": "0", "torch": "2.13"}, {"rank": "1", "torch": "2.13"}],
        seconds=3.4,
    )


def test_summary_and_terminal():
    report = make()
    assert report.summary() == "this machine: 1 passed, 1 failed, 1 not applicable, 3 s"
    assert [r.name for r in report.failed] == ["two"]
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table())
    shown = console.export_text()
    assert "rank [1] | died" in shown
    assert "n/a" in shown


def test_files_for_a_bug_report(tmp_path: Path):
    content, text = make().write(tmp_path)
    read = json.loads(content.read_text())
    assert [(r["name"], r["outcome"]) for r in read["results"]] == [
        ("one", "passed"),
        ("two", "failed"),
        ("three", "n/a"),
    ]
    lines = text.read_text().splitlines()
    assert "| two | failed |  | rank [1] \\| died | 0 |" in lines
    assert "- 12 atoms/s" in lines
    assert "| 1 | 2.13 |" in lines
