"""A potential of two layers, two fidelities and repulsion, with weights that are not those of a start."""

from pathlib import Path

import pytest
import torch

from mffm.config.base import validate
from mffm.config.model import ModelConfig
from mffm.data.references import ElementReferences
from mffm.deploy.edges import EdgeModel, export, load
from mffm.fidelity import Fidelity, FidelityTable
from mffm.release import PotentialSpec, write_weights

REFERENCES = {"H": -13.5, "C": -1030.25, "O": -2042.75, "Cu": -3.5, "Au": -2.25}


@pytest.fixture(scope="session")
def layered_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder, as far as a potential needs it; not to be changed by tests."""
    torch.manual_seed(3)
    backbone = {
        "cutoff": 3.5, "lmax": 1, "l_message": 1, "layers": 2, "channels": 6, "edge_channels": 6,
        "n_radial": 4, "radial_hidden": 8, "ff_expansion": 1, "body_order": 3,
    }  # fmt: skip
    model = {
        "backbone": backbone, "heads": {"kind": "independent", "hidden": [6]}, "zbl": True,
        "conditioning": {"kind": "film", "dim": 4, "zero_init": False},
    }  # fmt: skip
    fidelities = FidelityTable([Fidelity("pbe", "PBE"), Fidelity("r2scan", "r2SCAN")])
    references = {
        name: {k: v * scale for k, v in REFERENCES.items()} for name, scale in (("pbe", 1.0), ("r2scan", 1.125))
    }
    spec = PotentialSpec(
        validate(ModelConfig, model, "test"), fidelities, ElementReferences.from_dict({"references": references}),
        avg_neighbors=8.0, scale=1.5,
    )  # fmt: skip
    potential = spec.build()
    folder = tmp_path_factory.mktemp("layered") / "run"
    spec.write(folder / "potential")
    (folder / "weights").mkdir()
    write_weights(folder / "weights" / "best.safetensors", potential.state_dict())
    return folder


@pytest.fixture(scope="session")
def exported(layered_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The potential at ``pbe``, exported."""
    path = tmp_path_factory.mktemp("export") / "layered.pt2"
    assert export(layered_run, path, "pbe").form == "exported"
    return path


@pytest.fixture(scope="session")
def from_file(exported: Path) -> EdgeModel:
    return load(exported)
