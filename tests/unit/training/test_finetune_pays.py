"""The small form of tools/study_finetune.py: 20 labels of a new level of theory on a release of another one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

from mffm.config.base import as_overrides
from mffm.data.pools import choose
from mffm.data.store import Store
from mffm.evaluate import parity
from mffm.release import Loaded, load, refit_references, save

ROOT = Path(__file__).parents[3]
LABELS = 20
BACKBONE = {"channels": 32, "edge_channels": 16, "lmax": 2, "l_message": 1, "layers": 2}
WITHIN = 1.10


def errors(loaded: Loaded, store: Store, fidelity: str, **how) -> dict[str, float]:
    return {r["property"]: r["mae"] for r in parity.evaluate(loaded, store, "test", [fidelity], **how).rows()}


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_fine_tuning_beats_scratch_and_refitted_references_and_replay_keeps_the_old(tmp_path: Path, run_mffm: Callable):
    def run(*arguments: str) -> None:
        done = run_mffm(*arguments, timeout=900)
        assert done.returncode == 0, done.stderr

    path = tmp_path / "store"
    run("ingest", str(ROOT / "configs" / "data" / "molecules.yaml"), "--store", str(path))
    common = {
        "data.store": str(path),
        "data.validation_max_frames": LABELS,
        "log.wandb": "disabled",
        "train.threads": 1,
    }

    def overrides(name: str, **values) -> list[str]:
        return as_overrides({**common, "run": str(tmp_path / name), **values})

    old = [{"fidelity": "gfn2", "properties": ["energy", "forces"]}]
    new = [{"fidelity": "pbe", "properties": ["energy", "forces"], "max_frames": LABELS}]
    pretrain = overrides("base", **{"data.plan.pools": old, "model.backbone": BACKBONE, "train.steps": 300})
    run("train", str(ROOT / "configs" / "quickstart_pretrain.yaml"), *pretrain)
    release = save(tmp_path / "base", tmp_path / "release")
    recipe = ROOT / "configs" / "finetune.yaml"
    run("finetune", str(release), str(recipe), *overrides("tuned", **{"fine_tune.replay": "data"}))
    content = {k: v for k, v in yaml.safe_load(recipe.read_text()).items() if k != "fine_tune"}
    scratch = tmp_path / "scratch.yaml"
    scratch.write_text(yaml.safe_dump({**content, "model": {"backbone": BACKBONE}}))
    run("train", str(scratch), *overrides("scratch", **{"data.plan.pools": new, "optim.lr": 0.003, "train.steps": 500}))

    store, before, tuned = Store(path), load(release), load(tmp_path / "tuned")
    rows = choose(store, store.rows(split="train", fidelity="pbe"), 0, LABELS)
    references = refit_references(before, store, rows, "pbe", "gfn2")
    mine = errors(tuned, store, "pbe")
    others = {
        "from scratch": errors(load(tmp_path / "scratch"), store, "pbe"),
        "references refitted": errors(before, store, "pbe", predict_as="gfn2", references=references),
    }
    kept = {name: errors(x, store, "gfn2") for name, x in (("before", before), ("after", tuned))}
    shown = f"{mine}, {others}, {kept}"
    for prop in ("energy", "forces"):
        assert mine[prop] < min(o[prop] for o in others.values()), shown
        assert kept["after"][prop] <= WITHIN * kept["before"][prop], shown
    assert np.isfinite(list(mine.values())).all()
