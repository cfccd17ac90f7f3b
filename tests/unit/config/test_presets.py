"""Presets: names, what a source overrides, fidelities that come along."""

from pathlib import Path
from typing import Any

import pytest

from mffm.config import presets
from mffm.config.base import apply_overrides, validate
from mffm.config.data import DataConfig
from mffm.errors import InputError

ROOT = Path(__file__).parents[3]


def config(*sources: dict[str, Any], **content: Any) -> DataConfig:
    named = [{"name": f"s{k}", "path": "p"} | source for k, source in enumerate(sources)]
    return validate(DataConfig, {"store": "s", "sources": named} | content, "mine.yaml")


def test_the_folder_of_configs_is_the_packages() -> None:
    assert (ROOT / "configs" / "data" / "presets").resolve() == presets.FOLDER


@pytest.mark.parametrize("name", presets.names())
def test_each_says_what_it_is_and_what_was_checked(name: str) -> None:
    content = presets.preset(name)
    assert set(content) == {"about", "confirmed", "from_memory", "fidelities", "source"}
    assert content["about"]
    assert content["confirmed"]
    assert set(content["fidelities"]) in ({*content["source"]["labels"]}, set())
    given = {} if content["fidelities"] else {"fidelity": "mine"}
    data = config({"preset": name} | given, fidelities={"mine": {"level_of_theory": "PBE"}})
    assert data.sources[0].licence
    assert data.sources[0].files
    assert {*data.sources[0].labels} <= {*data.fidelities}
    assert f"`{name}`" in (ROOT / "docs" / "data.md").read_text()


def test_what_a_source_says_wins_key_by_key() -> None:
    labels = {
        "wb97x_631gd": {"forces": {"negate": True}},
        "hf_tz": None,
        "hf_qz": None,
        "ccsdt_cbs": {"energy": "mine"},
    }
    data = config({"preset": "ani1x", "group_key": None, "hdf5": {"groups": ["a"]}, "labels": labels})
    source = data.sources[0]
    assert set(source.labels) == set(data.fidelities) == {"wb97x_631gd", "wb97x_tzvpp", "hf_dz", "ccsdt_cbs"}
    forces = source.label("wb97x_631gd", "forces")
    assert (forces.key, forces.unit, forces.negate) == ("wb97x_dz.forces", "Hartree/Angstrom", True)
    assert source.label("ccsdt_cbs", "energy").key == "mine"
    assert source.group_key is None
    assert (source.hdf5.positions, source.hdf5.groups) == ("coordinates", ["a"])


def test_overrides_of_the_command_line_reach_into_a_preset() -> None:
    content = {"store": "s", "sources": [{"name": "a", "path": "p", "preset": "mptrj"}]}
    overridden = apply_overrides(content, ["sources.0.labels.pbe_mp.energy.key=corrected_total_energy"])
    source = validate(DataConfig, overridden, "mine.yaml").sources[0]
    assert source.label("pbe_mp", "energy").key == "corrected_total_energy"
    assert source.label("pbe_mp", "stress").negate


def test_fidelities_come_along_unless_declared() -> None:
    data = config({"preset": "mptrj"}, {"preset": "salex"}, {"preset": "matpes-pbe"})
    assert list(data.fidelities) == ["pbe_mp", "pbe_matpes"]
    mine = config({"preset": "mptrj"}, fidelities={"pbe_mp": {"level_of_theory": "as I say"}})
    assert mine.fidelities["pbe_mp"].level_of_theory == "as I say"


def test_a_fidelity_can_be_renamed() -> None:
    data = config(
        {"preset": "mptrj", "fidelity": "pbe", "labels": {"pbe": {"energy": {"key": "corrected_total_energy"}}}}
    )
    assert list(data.fidelities) == list(data.sources[0].labels) == ["pbe"]
    assert "Materials Project" in data.fidelities["pbe"].level_of_theory
    assert data.sources[0].label("pbe", "energy").key == "corrected_total_energy"
    with pytest.raises(InputError, match=r"preset 'ani1x' labels ccsdt_cbs, .*give `labels`"):
        config({"preset": "ani1x", "fidelity": "pbe"})


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match=r"unknown preset 'mptraj'; known presets: alexandria, ani1x"):
        config({"preset": "mptraj"})
    with pytest.raises(InputError, match="labels fidelity 'mine', which is not declared under fidelities"):
        config({"preset": "vasp", "fidelity": "mine"}, fidelities={"other": {"level_of_theory": "PBE"}})
    with pytest.raises(InputError, match="fidelities"):
        config({"preset": "vasp", "fidelity": "mine"})
    with pytest.raises(InputError, match=r"presets describe the fidelity 'x' differently"):
        config({"preset": "mptrj", "fidelity": "x"}, {"preset": "omat24", "fidelity": "x"})
