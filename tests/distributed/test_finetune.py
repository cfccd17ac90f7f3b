"""Fine-tunings with frozen parameters on two ranks: the same at every ZeRO stage, and resumed at another one."""

import json
import shutil
from pathlib import Path

import forked
import pytest
import yaml
from safetensors.torch import load_file

ADAMW = {"kind": "adamw", "warmup_steps": 2, "eps": 1e-3}  # its update does not magnify rounding


def recipe(store: Path, run: Path, stage: int) -> dict:
    pools = [{"fidelity": "ccsdt", "properties": ["energy"]}]
    return {
        "name": "tuned", "run": str(run),
        "data": {
            "store": str(store), "plan": {"pools": pools, "edge_budget": 600, "edges_per_microbatch": 300},
            "validation_max_frames": 4,
        },
        "fine_tune": {"mode": "lora", "rank": 2, "heads_first": 0.25},
        "train": {"steps": 4, "validate_every": 4, "save_every": 2, "threads": 1, "keep": 9},
        "optim": ADAMW, "deepspeed": {"zero_stage": stage}, "log": {"wandb": "disabled"},
    }  # fmt: skip


def on_two_ranks(*arguments: str) -> None:
    done = forked.ranks(2, ["-m", "mffm", *arguments])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lora_at_zero_stages(tiny_release: Path, molecule_store: Path, tmp_path: Path):
    for stage in (0, 1, 3):
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(recipe(molecule_store, tmp_path / f"s{stage}", stage)))
        on_two_ranks("finetune", str(tiny_release), str(path))
    wanted = load_file(tmp_path / "s0" / "weights" / "raw.safetensors")
    base = load_file(tiny_release / "model.safetensors")
    assert any((wanted[n][: len(base[n])] != base[n]).any() for n in base), "nothing was trained"
    for stage in (1, 3):
        found = load_file(tmp_path / f"s{stage}" / "weights" / "raw.safetensors")
        assert max(float((found[n] - t).abs().max()) for n, t in wanted.items()) < 1e-6
    rows = [json.loads((tmp_path / f"s{s}" / "finetune.json").read_text())["rows"] for s in (0, 3)]
    assert [r["after"] for r in rows[1]] == pytest.approx([r["after"] for r in rows[0]], rel=1e-4)

    # What a kill leaves is the checkpoint of step 2: stage 3 goes on bit for bit.
    run = tmp_path / "s3"
    held = {n: (run / "checkpoints/step-00000004" / n).read_bytes() for n in ("model.safetensors", "ema.safetensors")}
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    (run / "checkpoints" / "latest").write_text("step-00000002\n")
    on_two_ranks("resume", str(run))
    assert {n: (run / "checkpoints/step-00000004" / n).read_bytes() for n in held} == held
