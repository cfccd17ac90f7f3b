"""Shared fixtures: a small store made from the shipped molecules by the ordinary ingest, and tiny recipes."""

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import yaml

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ["NO_COLOR"] = "1"
os.environ["COLUMNS"] = "160"
signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it, and what it starts

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "data" / "molecules.extxyz"
CUTOFF = 4.0

TINY_BACKBONE = {
    "cutoff": CUTOFF, "lmax": 2, "l_message": 1, "layers": 1, "channels": 8, "edge_channels": 8,
    "n_radial": 4, "radial_hidden": 8, "ff_expansion": 1, "body_order": 3,
}  # fmt: skip


def first_frames(n: int) -> str:
    """Return the first ``n`` frames of the shipped molecules as extxyz text."""
    lines = SHIPPED.read_text().splitlines(keepends=True)
    end = 0
    for _ in range(n):
        end += 2 + int(lines[end])
    return "".join(lines[:end])


@pytest.fixture(scope="session")
def molecule_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of 90 shipped molecular frames: gfn2 (E, F), pbe (E, F), ccsdt (E); splits train, val, test."""
    return build_store(tmp_path_factory.mktemp("molecules"), first_frames(90))


@pytest.fixture(scope="session", name="build_store")
def _build_store() -> Callable[[Path, str], Path]:
    return build_store


def build_store(folder: Path, extxyz: str) -> Path:
    """Ingest extxyz text with the shipped molecules' keys into ``folder / "store"``."""
    from mffm.config.base import validate
    from mffm.config.data import DataConfig
    from mffm.data.ingest import ingest

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "molecules.extxyz").write_text(extxyz)
    config = {
        "store": str(folder / "store"),
        "fidelities": {
            "gfn2": {"level_of_theory": "GFN2-xTB"},
            "pbe": {"level_of_theory": "PBE/def2-SVP"},
            "ccsdt": {"level_of_theory": "CCSD(T)/cc-pVDZ"},
        },
        "sources": [
            {
                "name": "molecules",
                "path": "molecules.extxyz",
                "frame_key": "frame_id",
                "group_key": "molecule",
                "licence": "MIT",
                "labels": {
                    "gfn2": {"energy": "energy_gfn2", "forces": "forces_gfn2"},
                    "pbe": {"energy": "energy_pbe", "forces": "forces_pbe"},
                    "ccsdt": {"energy": "energy_ccsdt"},
                },
            }
        ],
        "splits": {"fractions": {"train": 0.6, "val": 0.2, "test": 0.2}},
        "cutoffs": [CUTOFF],
    }
    ingest(validate(DataConfig, config, "test"), folder, progress=False)
    return folder / "store"


@pytest.fixture(scope="session", name="tiny_recipe")
def _tiny_recipe() -> Callable[[Path, Path], dict[str, Any]]:
    return tiny_recipe


def tiny_recipe(store: Path, run: Path) -> dict[str, Any]:
    """Return a recipe of seconds: two fidelities, two microbatches, delta heads, conditioning."""
    return {
        "name": "tiny",
        "run": str(run),
        "data": {
            "store": str(store),
            "plan": {
                "pools": [
                    {"fidelity": "gfn2", "properties": ["energy", "forces"]},
                    {"fidelity": "pbe", "properties": ["energy"], "max_frames": 20},
                ],
                "edge_budget": 600,
                "edges_per_microbatch": 300,
            },
            "validation_max_frames": 8,
        },
        "model": {
            "backbone": TINY_BACKBONE,
            "conditioning": {"kind": "onehot"},
            "heads": {"kind": "delta", "base": "gfn2", "hidden": [8]},
        },
        "train": {"steps": 6, "validate_every": 3, "save_every": 3, "log_every": 1, "threads": 1},
        "optim": {"warmup_steps": 2},
        "log": {"wandb": "disabled"},
    }


@pytest.fixture
def make_recipe(molecule_store: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a tiny recipe with changes and returns its path; the run goes to tmp_path/run."""

    def make(name: str = "recipe", **sections: Any) -> Path:
        recipe = tiny_recipe(molecule_store, tmp_path / "run")
        for key, value in sections.items():
            recipe[key] = (
                {**recipe[key], **value} if isinstance(value, dict) and isinstance(recipe.get(key), dict) else value
            )
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return make


@pytest.fixture(scope="session")
def tiny_run(molecule_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run; not to be changed by tests."""
    folder = tmp_path_factory.mktemp("tiny")
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tiny_recipe(molecule_store, folder / "run")))
    done = mffm("train", str(recipe))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="session")
def tiny_release(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of the tiny run; not to be changed by tests."""
    from mffm.release import save

    return save(tiny_run, tmp_path_factory.mktemp("release") / "tiny-release")


@pytest.fixture(scope="session")
def run_mffm() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return the function that runs the command line in a process of its own."""
    return mffm


def mffm(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    return forked.run(["-m", "mffm", *arguments], **options)


# Options of tiny SevenNets: with parity, biases and irreps that the package infers; with modalities at every site.
SEVENNETS = {
    "parity": {
        "_type_map": {6: 0, 1: 1, 8: 2, 14: 3}, "channel": 3, "lmax": 1, "is_parity": True, "num_convolution_layer": 3,
        "use_bias_in_linear": True, "self_connection_type": "nequip", "act_radial": "ssp",
    },
    "modal": {
        "_type_map": {8: 0, 6: 1, 1: 2, 14: 3}, "channel": 4, "lmax": 2, "is_parity": False, "num_convolution_layer": 2,
        "self_connection_type": "linear", "cutoff_function": {"cutoff_function_name": "XPLOR", "cutoff_on": 3.0},
        "use_modality": True, "_modal_map": {"high": 1, "low": 0}, "_number_of_modalities": 2,
        "use_modal_wise_shift": True, "use_modal_wise_scale": False,
        "use_modal_node_embedding": True, "use_modal_self_inter_intro": True, "use_modal_self_inter_outro": True,
        "use_modal_output_block": True,
    },
}  # fmt: skip


@pytest.fixture(scope="session", name="write_sevennet")
def _write_sevennet() -> Callable[..., Path]:
    return write_sevennet


def write_sevennet(path: Path, kind: str = "parity", **changes: Any) -> Path:
    """Write a tiny checkpoint of SevenNet with random weights, as the package itself builds and stores one."""
    import sevenn
    import torch
    from sevenn._const import DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG
    from sevenn.model_build import build_E3_equivariant_model

    n = 4
    shifts = [[-1.25 - 0.5 * i - 0.125 * m for i in range(n)] for m in range(2)]
    config = {
        **DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG, "version": sevenn.__version__, "_number_of_species": n, "cutoff": CUTOFF,
        "weight_nn_hidden_neurons": [5], "conv_denominator": [3.0, 4.0, 5.0], "scale": 1.375,
        "shift": shifts if kind == "modal" else shifts[0], **SEVENNETS[kind], **changes,
    }  # fmt: skip
    torch.manual_seed(4)
    model = build_E3_equivariant_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_((0.01 if "coeffs" in name else 0.2) * torch.randn_like(parameter))
    torch.save({"config": config, "model_state_dict": model.state_dict(), "epoch": 1}, path)
    return path


@pytest.fixture(scope="session")
def public_data() -> Path:
    """Folder of the published sets; tests that need it are skipped where it is not at hand."""
    if "MFFM_DATA" not in os.environ:
        pytest.skip("MFFM_DATA (folder of the published sets) is not set")
    return Path(os.environ["MFFM_DATA"])
