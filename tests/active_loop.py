"""Configurations of the closed loop on labels that another store holds back, and what it ends with."""

import json
from pathlib import Path
from typing import Any

import yaml

from mffm.config.base import validate
from mffm.config.data import DataConfig
from mffm.data.ingest import ingest
from mffm.data.store import Store


def pool(folder: Path, oracle: Path) -> Path:
    """Return a store of the oracle's structures with GFN2-xTB labels alone."""
    config = {
        "store": str(folder / "pool"),
        "fidelities": {"gfn2": {"level_of_theory": "GFN2-xTB"}},
        "sources": [
            {
                "name": "molecules", "path": str(oracle.parent / "molecules.extxyz"), "frame_key": "frame_id",
                "group_key": "molecule", "licence": "MIT",
                "labels": {"gfn2": {"energy": "energy_gfn2", "forces": "forces_gfn2"}},
            }
        ],
        "splits": {"fractions": {"train": 0.6, "val": 0.2, "test": 0.2}},
        "cutoffs": [4.0],
    }  # fmt: skip
    ingest(validate(DataConfig, config, "test"), folder, progress=False)
    return folder / "pool"


def write(folder: Path, oracle: Path, release: Path, /, **changes: Any) -> Path:
    """Write a configuration, with a store of its own beside it, and return its path."""
    folder.mkdir()
    recipe = {
        "name": "tuned",
        "data": {
            "store": "-",
            "plan": {
                "pools": [{"fidelity": "ccsdt", "properties": ["energy"]}], "edge_budget": 600,
                "edges_per_microbatch": 300,
            },
        },
        "train": {
            "steps": 4, "validate_every": 2, "save_every": 2, "log_every": 1, "threads": 1,
            "best": "val/ccsdt/energy_mae",
        },
        "optim": {"warmup_steps": 2}, "log": {"wandb": "disabled"},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = {
        "name": "loop", "release": str(release), "asked": "pbe", "store": str(pool(folder, oracle)),
        "label": {"level": f"store:{oracle}@ccsdt"}, "rounds": 2, "n": 4, "validation": 4, "test": 6,
        "recipe": "recipe.yaml", **changes,
    }  # fmt: skip
    path = folder / "active.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def ends(config: Path) -> dict[str, Any]:
    """Return what must not depend on kills: chosen structures, labels, weights, errors of every round."""
    store = Store(config.parent / "pool")
    rows = store.rows(fidelity="ccsdt")
    found: dict[str, Any] = {"rows": rows.tolist(), "energies": store.energies("ccsdt", rows).tolist()}
    for place in sorted((config.parent / "run").glob("round-*")):
        errors = json.loads((place / "errors.json").read_text())
        found[place.name] = [json.loads((place / "chosen.json").read_text()), errors["rows"], errors["weights"]]
    return found
