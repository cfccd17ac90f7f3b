"""A study with every judge: a tiny one over shipped cells, from the YAML to the page."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from mffm.config.base import load
from mffm.config.data import DataConfig
from mffm.config.study import load_study
from mffm.data.ingest import ingest
from mffm.errors import InputError
from mffm.study import report
from mffm.study.gate import gates
from mffm.study.grid import Grid, expand
from mffm.study.relative import pair_errors
from mffm.study.run import StudyRun

from .conftest import OneProcess

ROOT = Path(__file__).parents[3]
PROPERTIES = ["energy", "forces", "stress"]


@pytest.fixture(scope="module")
def solids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of configs/data/solids.yaml, with edges within the tests' cutoff."""
    folder = tmp_path_factory.mktemp("solids")
    config = load(DataConfig, ROOT / "configs" / "data" / "solids.yaml", ["cutoffs=[4.0]"])
    ingest(config, ROOT / "configs" / "data", folder / "store", progress=False)
    return folder / "store"


@pytest.fixture
def make_solids(solids: Path, tmp_path: Path, tiny_recipe: Callable[..., dict[str, Any]]) -> Callable[..., Path]:
    """Return a function that writes a study YAML of three methods over the store."""

    def make(**changes: Any) -> Path:
        high = {"fidelity": "r2scan_gpaw", "properties": PROPERTIES, "elements_first": True}
        low = {"fidelity": "pbe_gpaw", "properties": PROPERTIES}
        base = tiny_recipe(solids, tmp_path / "never")
        base["data"]["plan"] = {"pools": [low, {**low, "split": "uncovered"}, high], "edge_budget": 2000}
        base["model"]["heads"]["base"] = "pbe_gpaw"
        base["train"] |= {"steps": 2, "validate_every": 2, "save_every": 2, "best": "val/loss", "preflight": False}
        (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
        alone = {"model.heads": {"kind": "shared"}, "model.conditioning.kind": "none"}
        cells = {
            "file": str(ROOT / "data" / "alloys.extxyz"), "group": "pseudo_binary", "where": "ideal",
            "uncovered": ["MgCaO", "AlBP"],
        }  # fmt: skip
        study = {
            "name": "solids", "recipe": "base.yaml", "high": "r2scan_gpaw", "n_high": [12], "seeds": [0],
            "properties": ["forces", "stress"], "relative_energies": True,
            "mixing": {**cells, "energy": "energy_r2scan", "order": "n_second", "others": {"PBE": "energy_pbe"}},
            "eos": {**cells, "against": "hf_all"},
            "stages": {"low": {"changes": {**alone, "data.plan.pools": [low]}}},
            "methods": {
                "delta": {"title": "delta head"},
                "low_only": {"refit": "low"},
                "hf_all": {
                    "n_high": ["all"],
                    "changes": {**alone, "data.plan.pools": [high, {**high, "split": "uncovered"}]},
                },
            },
            "baselines": ["delta"],
        }  # fmt: skip
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**study, **changes}, sort_keys=False))
        return path

    return make


def grid_of(path: Path) -> Grid:
    return expand(load_study(path), path, path.parent / "out")


def test_nothing_that_is_judged_trains(make_solids: Callable[..., Path]):
    grid = grid_of(make_solids())
    store = grid.store
    cells = {c.method: c for c in grid.cells}
    ids = {method: {store.frame_id(int(row)) for row in cell.high_rows} for method, cell in cells.items()}
    assert len(ids["delta"]) == 12
    assert ids["delta"] == ids["low_only"]
    held = ("MgCaO", "AlBP", "-MgO-", "-CaO-", "-AlP-", "-BP-")
    assert not [i for i in ids["delta"] if any(h in i for h in held)], "high labels of what they must not cover"
    assert len([i for i in ids["hf_all"] if any(h in i for h in held)]) == 26
    ideal = [i for i in ids["hf_all"] if i.startswith("alloy") and i.endswith("-0")]
    assert not ideal, "judged by their mixing energies"
    composition = store.composition(cells["delta"].high_rows)
    everything = store.composition(store.rows(split="train"))
    assert ((composition.sum(0) > 0) == (everything.sum(0) > 0)).all(), "an element without a high label"
    assert 15 not in np.flatnonzero(everything.sum(0)), "P is in held-out cells alone"


def test_judged_by_all(make_solids: Callable[..., Path]):
    path = make_solids()
    run = StudyRun(grid_of(path), path.parent / "out", OneProcess(), say=lambda line: None)
    assert run.train() == {}
    judged = run.judge()
    summary = report.summarise(run.grid, judged, gates(run.grid), {})
    paths = report.write(run.grid, summary, run.folder)
    assert [p.name for p in paths] == ["report.md", "report.json", "learning_curves.png", "mixing.png"]
    written = json.loads(paths[1].read_text())["judges"]
    assert list(written) == ["relative_energies", "mixing", "eos"]
    assert [p["n_high"] for p in written["mixing"]["methods"]["hf_all"]] == [126]
    assert written["mixing"]["others"]["PBE"]["r2"]["mean"] > 0.99
    assert written["relative_energies"]["pairs"]["ood"] == 18
    assert set(written["eos"]["methods"]) == {"delta", "low_only"}
    page = paths[0].read_text()
    for text in ("## Mixing energies", "![mixing energies](mixing.png)", "## Energy differences at equal composition",
                 "## Lattice constants and bulk moduli", "MAE in % of hf_all (126 frames)"):  # fmt: skip
        assert text in page, text

    kept = run.folder / "errors" / "delta" / "n12-s0.json"
    content = json.loads(kept.read_text())
    content["found"]["mixing"]["MgCaO"] = [1.0, 1.0, 1.0]
    kept.write_text(json.dumps(content))
    assert run.judge()[0].found["mixing"]["MgCaO"] == [1.0, 1.0, 1.0], "judged twice"
    content["key"]["judges"]["mixing"] = "another file"
    kept.write_text(json.dumps(content))
    assert run.judge()[0].found["mixing"] == judged[0].found["mixing"], "an old result was used"


def test_what_trains_is_not_judged(make_solids: Callable[..., Path]):
    with pytest.raises(InputError, match="trains or validates on split 'uncovered', which is the ood split"):
        grid_of(make_solids(ood="uncovered"))
    cells = {"file": str(ROOT / "data" / "crystals.extxyz"), "group": "structure", "energy": "energy_r2scan"}
    with pytest.raises(InputError, match=r"mixing.order: .* has no info key 'n_second'"):
        grid_of(make_solids(mixing={**cells, "order": "n_second"}))
    content = yaml.safe_load(make_solids().read_text())
    del content["mixing"]["where"]
    with pytest.raises(InputError, match="n_second is 0, 1, 1, 1, 2"):
        grid_of(make_solids(mixing=content["mixing"]))


def test_cells_that_a_training_reads_are_refused(make_solids: Callable[..., Path], tmp_path: Path):
    lines = (ROOT / "data" / "alloys.extxyz").read_text().splitlines(keepends=True)
    frames = ["".join(lines[i : i + 10]) for i in range(0, len(lines), 10)]
    trained = [f.replace("ideal=F", "ideal=T") for f in frames if "MgCaO" in f and ("-1 " in f.split("structure")[0])]
    ends = [f for f in frames if "MgCaO-0-0 " in f or "MgCaO-4-0 " in f]
    (tmp_path / "trained.extxyz").write_text("".join([*trained, *ends]))
    mixing = {"file": "trained.extxyz", "group": "pseudo_binary", "energy": "energy_r2scan", "order": "n_second"}
    with pytest.raises(InputError, match=r"3 of the structures to be judged .* first alloy-rocksalt-MgCaO-1-1 in 'unc"):
        grid_of(make_solids(mixing=mixing))


def test_a_weak_low_fidelity_must_be_named(make_solids: Callable[..., Path]):
    methods = {"delta": {"changes": {"data.plan.pools": [
        {"fidelity": "pbe_gpaw"}, {"fidelity": "gfn1"}, {"fidelity": "r2scan_gpaw", "elements_first": True},
    ]}}}  # fmt: skip
    changes = {"methods": methods, "stages": {}, "eos": None}
    with pytest.raises(InputError, match=r"gfn1 says little of r2scan_gpaw: .* or name it in `weak`"):
        gates(grid_of(make_solids(**changes)))
    assert {g.low for g in gates(grid_of(make_solids(**changes, weak=["gfn1"])))} == {"pbe_gpaw", "gfn1"}


def test_pairs_of_one_composition_by_hand():
    compositions = np.array([[4, 4], [4, 4], [8, 0], [4, 4]])
    errors = np.array([1.0, 1.8, 100.0, 1.0])
    assert sorted(pair_errors(compositions, errors)) == pytest.approx([0.0, 0.1, 0.1])
