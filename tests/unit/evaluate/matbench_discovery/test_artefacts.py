"""Files of a submission: what is written is what the suite reads."""

import gzip
import hashlib
import json
import math
from pathlib import Path

import pytest
import yaml

from mffm.errors import InputError
from mffm.evaluate.matbench_discovery import artefacts


def test_predictions_come_back_and_missing_ones_are_empty(tmp_path: Path):
    path = tmp_path / "2026-01-01-discovery.csv.gz"
    artefacts.write_predictions(path, {"wbm-1-1": -0.123456, "wbm-1-2": None, "wbm-1-3": float("nan")})
    assert (
        gzip.decompress(path.read_bytes()).decode()
        == "material_id,e_form_per_atom\nwbm-1-1,-0.1235\nwbm-1-2,\nwbm-1-3,\n"
    )
    found = artefacts.read_predictions(path)
    assert found["wbm-1-1"] == -0.1235
    assert math.isnan(found["wbm-1-2"])
    first = path.read_bytes()
    artefacts.write_predictions(path, {"wbm-1-1": -0.123456, "wbm-1-2": None, "wbm-1-3": None})
    assert path.read_bytes() == first  # no time stamp in the archive
    entry = artefacts.file_entry(path, tmp_path)
    assert entry["md5"] == hashlib.md5(first).hexdigest()
    assert (entry["name"], entry["size"]) == (path.name, len(first))


def test_a_file_without_the_columns_is_refused(tmp_path: Path):
    artefacts.write_gzip(tmp_path / "a.csv.gz", "id,energy\n1,2\n")
    with pytest.raises(InputError, match="columns energy, id; expected material_id"):
        artefacts.read_predictions(tmp_path / "a.csv.gz")


def test_geometries_are_one_object_a_line(tmp_path: Path):
    record = {"material_id": "a", "structure": {"sites": []}, "energy": -1.5, "converged": True, "n_steps": 3, "x": 1}
    artefacts.write_geometries(tmp_path / "g.jsonl.gz", [record, {**record, "material_id": "b"}])
    lines = gzip.decompress((tmp_path / "g.jsonl.gz").read_bytes()).decode().splitlines()
    assert [json.loads(line)["material_id"] for line in lines] == ["a", "b"]
    assert set(json.loads(lines[0])) == {"material_id", "structure", "energy", "converged", "n_steps"}


def test_the_yaml_names_what_is_left_to_fill_in():
    submission = {"model_name": "Mine", "model_key": "mine-1", "hyperparams": {"architecture": {"layers": 2}}}
    metrics = {"discovery": {"unique_prototypes": artefacts.rounded({"F1": 0.71234, "TP": 12}, 3)}}
    text, missing = artefacts.model_yaml(submission, metrics, {"max_force": 0.05, "max_steps": 500})
    found = yaml.safe_load(text)
    assert found["metrics"]["discovery"]["unique_prototypes"] == {"F1": 0.712, "TP": 12}
    assert found["hyperparams"] == {"architecture": {"layers": 2}, "evaluation": {"max_force": 0.05, "max_steps": 500}}
    assert "authors" in missing
    assert text.startswith("# to be filled in before it is submitted: authors, ")
    complete = dict.fromkeys(artefacts.REQUIRED, "x")
    assert artefacts.model_yaml(complete, {}, {})[1] == []
    with pytest.raises(InputError, match="keys nickname are not in the suite's schema"):
        artefacts.model_yaml({**submission, "nickname": "x"}, {}, {})
