"""The SevenNet adapter: a checkpoint that the package itself wrote gives the package's own predictions."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ase
import numpy as np
import pytest
import torch
from torch import nn

from mffm.config.foreign import SEVENNETS, SevennetConfig
from mffm.config.model import ModelConfig
from mffm.errors import InputError
from mffm.models.foreign import SevennetBackbone
from mffm.models.potential import Potential
from mffm.models.sevennet_checkpoint import Checkpoint, find, read_checkpoint
from mffm.release.convert import potential_of

TINY = {"kind": "sevennet", "irreps": ["4x0e", "4x0e"], "denominators": [1.0], "envelope_from": None}


def original(model: nn.Module, system: Any, cutoff: float, modality: str | None) -> tuple[torch.Tensor, ...]:
    """Return energy, atom energies and forces of sevenn's own model in float64, on sevenn's own graph."""
    from sevenn.atom_graph_data import AtomGraphData
    from sevenn.train.dataload import unlabeled_atoms_to_graph

    numbers, positions, cell = system
    atoms = ase.Atoms(numbers, positions, cell=cell, pbc=cell is not None)
    graph = AtomGraphData.from_numpy_dict(unlabeled_atoms_to_graph(atoms, cutoff, with_shift=True))
    at = torch.from_numpy(positions)
    first, second = graph["edge_index"]
    offset = 0.0 if cell is None else graph["pbc_shift"].double() @ torch.from_numpy(cell)
    graph["edge_vec"] = at[second] - at[first] + offset
    graph["cell_volume"] = graph["cell_volume"].double()
    if modality:
        graph["data_modality"] = modality

    def doubled(module: nn.Module, inputs: Any, data: Any) -> Any:
        for key in ("x", "node_attr"):
            data[key] = data[key].double()
        return data

    handle = model.get_submodule("onehot_idx_to_onehot").register_forward_hook(doubled)
    model.set_is_batch_data(False)
    out = model.double().eval()(graph)
    handle.remove()
    return tuple(out[key].detach() for key in ("inferred_total_energy", "atomic_energy", "inferred_force"))


@pytest.mark.parametrize("kind", ["parity", "modal"])
def test_a_checkpoint_predicts_what_it_did(
    kit: SimpleNamespace, write_sevennet: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    """In float64, to rounding: energies with references, atom energies and forces, for each modality."""
    checkpoint = read_checkpoint(write_sevennet(tmp_path / "tiny.pth", kind))
    modalities = checkpoint.modalities or (None,)
    assert modalities == (("low", "high") if kind == "modal" else (None,))
    potential = potential_of(checkpoint, [f"f{i}" for i in range(len(modalities))]).double()
    systems = [kit.molecule(0), kit.crystal(), kit.molecule(3, 4)]
    for index, modality in enumerate(modalities):
        ours = potential(kit.batch(systems, [index] * 3))
        table = torch.from_numpy(checkpoint.references[modality or ""])
        for i, system in enumerate(systems):
            energy, atom_energies, forces = original(checkpoint.model, system, kit.cutoff, modality)
            mine = torch.arange(len(ours.forces))[kit.batch(systems).system_idx == i]
            reference = table[torch.from_numpy(system[0])]
            torch.testing.assert_close(
                ours.atom_energies[mine] + reference, atom_energies.flatten(), rtol=1e-12, atol=1e-12
            )
            torch.testing.assert_close(ours.energy[i] + reference.sum(), energy, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(ours.forces[mine], forces, rtol=1e-11, atol=1e-11)
            assert forces.abs().max() > 1e-3
    if kind == "modal":
        both = potential(kit.batch(systems[:1] * 2, [0, 1])).energy
        assert abs(both[0] - both[1]) > 1e-3


def test_weights_alone_are_saved_and_nothing_depends_on_the_default_dtype(kit: SimpleNamespace) -> None:
    potential = kit.potential("sevennet")
    backbone = potential.learned.backbone
    assert set(backbone.state_dict()) == {name for name, _ in backbone.named_parameters()}
    torch.set_default_dtype(torch.float64)
    try:
        other = Potential(potential.config, potential.fidelities, 6.0, 1.3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in other.learned.backbone.parameters()} == {torch.float32}
    other.double().eval().load_state_dict(potential.state_dict())
    batch = kit.batch([kit.molecule(0)])
    assert torch.equal(other(batch).forces, potential(batch).forces)


def test_unknown_elements_are_refused_but_not_in_the_dummy_of_a_rank(kit: SimpleNamespace) -> None:
    from mffm.data.loader import dummy

    config = SevennetConfig(**{**TINY, "cutoff": kit.cutoff, "elements": ["C", "O"]})
    potential = Potential(ModelConfig(backbone=config), ["pbe"], 1.0, 1.0).eval()
    with pytest.raises(InputError, match=r"^Si: not among .* which are C, O; leave these"):
        potential(kit.batch([kit.crystal()], dtype=torch.float32))
    assert torch.isfinite(potential(dummy(kit.cutoff)).energy).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"irreps": ["4x0e", "4x0e+2y1o", "4x0e"]}, "is not like 128x0e"),
        ({"irreps": ["4x0e", "4x0e+2x1o"]}, "the last must be scalars"),
        ({"denominators": [1.0, 2.0]}, "2 given for 1 layers"),
        ({"elements": ["H", "H"]}, "one is given twice"),
        ({"envelope_from": 6.0}, "not below the cutoff"),
        ({"modalities": 2}, "belong together"),
        ({"denominators": [0.0]}, "greater than 0"),
    ],
)
def test_configurations_that_make_no_network_are_refused(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SevennetConfig(**{**TINY, **change})


def test_misspelt_elements_are_refused() -> None:
    with pytest.raises(InputError, match=r"model\.backbone\.elements: 'Xx' is not an element symbol"):
        SevennetBackbone(SevennetConfig(**{**TINY, "elements": ["H", "Xx"]}), 1.0)


def test_named_sizes() -> None:
    for size, table in SEVENNETS.items():
        config = SevennetConfig(kind="sevennet", size=size)
        assert config.size == size
        assert {key: getattr(config, key) for key in table} == table
    other = SevennetConfig(kind="sevennet", size="7net-l3i5", lmax=2)
    assert (other.size, other.irreps) == (None, SEVENNETS["7net-l3i5"]["irreps"])


def test_what_it_cannot_do_is_refused(kit: SimpleNamespace) -> None:
    for change, message in (
        ({"forces": "direct"}, "its forces are conservative"),
        ({"conditioning": {"kind": "film"}}, "onehot, embedding"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelConfig.model_validate({"backbone": TINY, **change})
    potential = Potential(kit.config("sevennet"), kit.fidelities, 6.0, 1.0).double().train()
    with pytest.raises(InputError, match="precision"):
        potential.learned.backbone.multiply_in(torch.bfloat16)
    potential.learned.backbone.recompute = True
    with pytest.raises(InputError, match="activation_checkpointing"):
        potential(kit.batch([kit.molecule(0)]))


def test_files_that_are_no_checkpoint_and_networks_that_are_not_covered_are_refused(
    write_sevennet: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"7net-9: neither a file nor .* 7net-0, 7net-l3i5, 7net-mf-0"):
        find("7net-9")
    (tmp_path / "text.pth").write_text("no")
    torch.save({"weights": 1}, tmp_path / "other.pth")
    for name in ("text.pth", "other.pth"):
        with pytest.raises(InputError, match="not a checkpoint that this version of sevenn reads"):
            read_checkpoint(find(str(tmp_path / name)))
    mlp = write_sevennet(
        tmp_path / "mlp.pth", readout_as_fcn=True, readout_fcn_hidden_neurons=[4], readout_fcn_activation="relu"
    )
    with pytest.raises(InputError, match="its readout is an MLP"):
        read_checkpoint(mlp)
    scaled = write_sevennet(tmp_path / "scaled.pth", scale=[1.0, 1.0, 2.0, 1.0])
    with pytest.raises(InputError, match=r"differently by element or modality \(1 to 2\)"):
        read_checkpoint(scaled)


@pytest.mark.slow
@pytest.mark.parametrize("name", SEVENNETS)
def test_shipped_checkpoints_predict_what_they_did(kit: SimpleNamespace, name: str) -> None:
    checkpoint: Checkpoint = read_checkpoint(find(name))
    assert checkpoint.config.size == name
    modalities = checkpoint.modalities or (None,)
    potential = potential_of(checkpoint, [f"f{i}" for i in range(len(modalities))]).double()
    assert isinstance(potential.learned.backbone, SevennetBackbone)
    for system in (kit.molecule(0), kit.crystal()):
        for index, modality in enumerate(modalities):
            ours = potential(kit.batch([system], [index], cutoff=5.0))
            energy, atom_energies, forces = original(checkpoint.model, system, 5.0, modality)
            reference = torch.from_numpy(np.asarray(checkpoint.references[modality or ""][system[0]]))
            torch.testing.assert_close(ours.atom_energies + reference, atom_energies.flatten(), rtol=1e-11, atol=1e-11)
            torch.testing.assert_close(ours.energy[0] + reference.sum(), energy, rtol=1e-12, atol=1e-11)
            torch.testing.assert_close(ours.forces, forces, rtol=1e-10, atol=1e-10)
