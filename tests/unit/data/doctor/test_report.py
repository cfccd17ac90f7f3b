"""What the doctor writes, how it exits, and how plain files are read."""

import json
import subprocess
import sys

import numpy as np
import pytest

from mffm.data.doctor import examine
from mffm.data.doctor.inputs import open_inputs
from mffm.data.ingest import ingest
from mffm.errors import InputError


def doctor(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", "mffm", "doctor", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


def test_exit_codes_and_files(molecules, write_frames, tmp_path):
    good = write_frames("good.extxyz", molecules)
    done = doctor(good, "--out", "good", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "60 frames: 0 errors, 0 warnings, 0 notes" in done.stdout
    for name in ("doctor.md", "doctor.json", "energies.png", "forces.png", "structures.png"):
        assert (tmp_path / "good" / name).stat().st_size > 0
    far = dict(molecules[7], energy=molecules[7]["energy"] + 30.0)
    outlier = write_frames("outlier.extxyz", [*molecules[:7], far, *molecules[8:]])
    assert doctor(outlier, "--no-plots", cwd=tmp_path).returncode == 0
    done = doctor(outlier, "--strict", "--no-plots", cwd=tmp_path)
    assert done.returncode == 1
    assert "warning: energy_outliers: unnamed: 1 of 60 energies" in done.stdout
    wrong = write_frames("wrong.extxyz", [f | {"forces": -f["forces"]} for f in molecules])
    assert doctor(wrong, "--no-plots", cwd=tmp_path).returncode == 1
    done = doctor("absent.extxyz", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: absent.extxyz: no such file\n"


def test_report_says_the_same_twice(molecules, write_frames, turned, tmp_path):
    """doctor.json and doctor.md hold every finding with its evidence."""
    path = write_frames("set.extxyz", [*molecules, dict(turned(molecules[4]), energy=-1100.0)])
    diagnosis = examine([path], folder=tmp_path / "out", with_plots=False)
    content = json.loads((tmp_path / "out" / "doctor.json").read_text())
    text = (tmp_path / "out" / "doctor.md").read_text()
    assert content["version"] == 1
    assert content["counts"] == {"error": 1, "warning": 0, "note": 1}
    assert content["n_frames"] == 61
    assert content["coverage"]["labels"] == {"set.extxyz": {"unnamed": {"energy": 61, "forces": 61, "stress": 0}}}
    for found, finding in zip(content["findings"], diagnosis.findings, strict=True):
        assert (found["check"], found["severity"]) == (finding.check, finding.severity)
        assert finding.message in text
        assert finding.remedy in text
        for entry, (place, what) in zip(found["evidence"], finding.evidence, strict=True):
            assert (entry["place"], entry["found"]) == (place, what)
            assert f"| {place} | {what} |" in text


def test_levels_of_a_plain_file(write_frames, molecules):
    """Each energy key is a fidelity, with the forces of its name; keys that are named count alone."""
    frames = [
        {k: v for k, v in f.items() if k != "energy"}
        | {"info": {"energy_pbe": f["energy"], "energy_ccsdt": f["energy"] - 2}, "forces_pbe": f["forces"]}
        | {"columns": ("forces_pbe",)}
        for f in molecules
    ]
    path = write_frames("two.extxyz", frames)
    with open_inputs([path]) as found:
        assert len(list(found.measured())) == 60
        assert found.fidelities == ["ccsdt", "pbe"]
        first = found.frame(0)
    assert set(first.labels) == {("ccsdt", "energy"), ("pbe", "energy"), ("pbe", "forces")}
    assert examine([path]).findings == []
    assert examine([path], keys={"energy": "energy_pbe"}).fidelities == ["pbe"]
    with pytest.raises(InputError, match=r"--energy total: no frame of .* has it"):
        examine([path], keys={"energy": "total"})


def test_structures_without_labels(write_frames, molecules):
    bare = [{k: v for k, v in f.items() if k not in ("energy", "forces")} for f in molecules]
    diagnosis = examine([write_frames("bare.extxyz", bare)])
    assert {(f.check, f.severity) for f in diagnosis.findings} == {("keys", "note"), ("missing_labels", "warning")}


def test_frames_come_back_as_they_were(write_frames, molecules, crystals):
    """What a check asks for by its row is what the file had, charge, split and group too."""
    frames = [f | {"info": {"charge": -1, "split": "val", "mp_id": "mp-3"}} for f in crystals]
    with open_inputs([write_frames("a.extxyz", molecules), write_frames("b.extxyz", frames)]) as found:
        sources = [source for _, _, source, _ in found.measured()]
        for row in (61, 3, 79, 60, 0):
            again, given = found.frame(row), molecules[row] if row < 60 else crystals[row - 60]
            assert sources[row] == ("a.extxyz" if row < 60 else "b.extxyz")
            assert found.place(row).endswith(f"{sources[row]}:{row % 60}")
            assert np.allclose(again.positions, given["positions"], atol=1e-9)
            assert np.allclose(again.cell, given.get("cell", 0), atol=1e-9)
            assert again.atomic_numbers.tolist() == given["numbers"].tolist()
            for (_, prop), value in again.labels.items():
                assert np.allclose(value, given[prop], rtol=1e-6, atol=1e-8)
            about = (again.charge, again.split, again.group)
            assert about == ((None, "", "") if row < 60 else (-1, "val", "mp-3"))


def test_workers_find_the_same(write_frames, molecules, turned, data_config, tmp_path):
    """Of a file and of a store, in which order the processes finish."""
    frames = [*molecules * 6, turned(molecules[4]) | {"energy": -1100.0}, molecules[5] | {"energy": "nan"}]
    path = write_frames("data.extxyz", frames)
    ingest(data_config(), tmp_path, progress=False)
    for inputs in ([path], [tmp_path / "store"]):
        alone, together = examine(inputs), examine(inputs, workers=2)
        assert alone == together
        assert alone.findings
