"""Journals: every cut and every flipped byte is found; the newest counts, a label always."""

from pathlib import Path

import numpy as np
import pytest

from mffm.label.journal import Journal, Ledger, Limits, Record, read
from mffm.label.level import Label


def record(index: int, attempt: int = 1, error_class: str = "", **more: object) -> Record:
    status = "failed" if error_class else "ok"
    return Record(index, f"f-{index}", attempt, status, error_class, **more)  # type: ignore[arg-type]


def some_label(index: int) -> Label:
    rng = np.random.default_rng(index)
    stress = None if index % 2 else rng.normal(size=(3, 3))
    return Label(rng.normal(), None if index == 2 else rng.normal(size=(3, 3)), stress, {"t1_diagnostic": 0.01})


def written(folder: Path, n: int = 3) -> Path:
    journal = Journal(folder, "one")
    for index in range(n):
        journal.append(record(index), some_label(index))
    journal.close()
    return folder / "one.journal"


def test_labels_come_back_as_they_were(tmp_path: Path) -> None:
    found = list(read(written(tmp_path)))
    assert [r.index for r, _, _ in found] == [0, 1, 2]
    for index, (_, labels, _) in enumerate(found):
        expected = some_label(index)
        assert labels["energy"] == expected.energy
        assert set(labels) == {p for p in ("energy", "forces", "stress") if getattr(expected, p) is not None}
        for prop in set(labels) - {"energy"}:
            np.testing.assert_array_equal(labels[prop], getattr(expected, prop))


def test_every_cut_and_every_damaged_byte_is_found(tmp_path: Path) -> None:
    path = written(tmp_path)
    whole = path.read_bytes()
    starts = [offset for _, _, offset in read(path)]
    for length in range(starts[2], len(whole)):
        path.write_bytes(whole[:length])
        assert [r.index for r, _, _ in read(path)] == [0, 1]
    for at in range(starts[2], len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert [r.index for r, _, _ in read(path)] == [0, 1]


def test_a_label_counts_before_failures_and_of_these_the_newest(tmp_path: Path) -> None:
    first, second = Journal(tmp_path, "a"), Journal(tmp_path, "b")
    first.append(record(0, 1), some_label(0))
    first.append(record(1, 2, "lost", error="second"), None)
    second.append(record(0, 2, "lost"), None)
    second.append(record(1, 1, "lost", error="first"), None)
    second.append(record(3, 1, "lost"), None)
    second.append(record(3, 2), some_label(3))
    first.close()
    second.close()
    for paths in (["a", "b"], ["b", "a"]):
        ledger = Ledger([tmp_path / f"{name}.journal" for name in paths], 5)
        assert ledger.labelled.tolist() == [0, 3]
        assert {index: one.error for index, one in ledger.failures.items()} == {1: "second"}
        assert [float(labels["energy"]) for _, labels in ledger.labels([3, 0])] == [
            some_label(3).energy,
            some_label(0).energy,
        ]


@pytest.mark.parametrize(
    ("one", "limits", "is_final"),
    [
        (record(0), Limits(), True),
        (record(0, 1, "input"), Limits(), True),
        (record(0, 1, "convergence"), Limits(), True),
        (record(0, 1, "lost"), Limits(), False),
        (record(0, 2, "lost"), Limits(), True),
        (record(0, 1, "resource", limit={"seconds": 5.0}), Limits(5.0), True),
        (record(0, 1, "resource", limit={"seconds": 5.0}), Limits(6.0), False),
        (record(0, 1, "resource", limit={"seconds": 5.0}), Limits(), False),
        (record(0, 1, "resource", limit={"gigabytes": 1.0}), Limits(9.0, 1.0), True),
        (record(0, 1, "resource"), Limits(), False),
    ],
)
def test_only_what_may_end_otherwise_is_tried_again(one: Record, limits: Limits, is_final: bool) -> None:
    assert one.is_final(limits, most_attempts=2) == is_final
