"""The eSCN-MD adapter: a checkpoint that fairchem wrote gives fairchem's own features on fairchem's own graph."""

from pathlib import Path
from types import SimpleNamespace

import ase
import pytest
import torch
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.models.uma.escn_md import eSCNMDBackbone
from fairchem.core.units.mlip_unit.api.inference import MLIPInferenceCheckpoint
from torch import nn

from mffm.config.model import DensityConfig, EscnConfig, ModelConfig
from mffm.errors import InputError
from mffm.models.escn import EscnBackbone, load_checkpoint, read_checkpoint
from mffm.models.potential import Potential

SIZES = {
    "sphere_channels": 8, "hidden_channels": 6, "edge_channels": 4, "num_layers": 2, "lmax": 2, "mmax": 2,
    "cutoff": 4.0, "num_distance_basis": 8, "ff_type": "spectral", "norm_type": "rms_norm_sh", "act_type": "gate",
    "chg_spin_emb_type": "rand_emb", "use_dataset_embedding": False, "otf_graph": True, "always_use_pbc": False,
    "direct_forces": True, "regress_forces": False,
}  # fmt: skip


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, eSCNMDBackbone]:
    torch.manual_seed(3)
    model = nn.ModuleDict({"backbone": eSCNMDBackbone(**SIZES)})
    config = {"backbone": {"model": "escnmd_backbone", **SIZES}, "heads": {}}
    path = tmp_path / "inference.pt"
    torch.save(MLIPInferenceCheckpoint(config, model.state_dict(), {}, {}), path)
    return path, model["backbone"].eval()


def test_features_of_a_checkpoint_are_fairchems(kit: SimpleNamespace, written: tuple[Path, eSCNMDBackbone]) -> None:
    path, theirs = written
    config, _ = read_checkpoint(path)
    ours = EscnBackbone(config, 1.0).eval()
    load_checkpoint(ours, path)
    systems = [kit.molecule(0), kit.molecule(1, 7)]
    frames = [
        AtomicData.from_ase(
            ase.Atoms(n, p, cell=[30.0] * 3, info={"charge": 0, "spin": 0}), r_data_keys=["charge", "spin"]
        )
        for n, p, _ in systems
    ]
    batch = kit.batch(systems, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(atomicdata_list_to_batch(frames))["node_embedding"][:, 0]
        found = ours(batch, batch.edge_vectors, {})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_other_sizes_or_kind_is_refused(written: tuple[Path, eSCNMDBackbone], tmp_path: Path) -> None:
    path, _ = written
    config, _ = read_checkpoint(path)
    with pytest.raises(InputError, match="lmax: 2 there, 3 here"):
        load_checkpoint(EscnBackbone(config.model_copy(update={"lmax": 3}), 1.0), path)
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="not an inference checkpoint"):
        read_checkpoint(tmp_path / "other.pt")
    changed = {"backbone": {**SIZES, "chg_spin_emb_type": "pos_emb"}}
    torch.save(MLIPInferenceCheckpoint(changed, {}, {}, {}), tmp_path / "pos.pt")
    with pytest.raises(InputError, match="chg_spin_emb_type is 'pos_emb'"):
        read_checkpoint(tmp_path / "pos.pt")


def test_the_kind_chooses_the_backbone() -> None:
    assert isinstance(ModelConfig().backbone, DensityConfig)
    given = ModelConfig.model_validate({"backbone": {"kind": "escn", **{k: SIZES[k] for k in ("lmax", "mmax")}}})
    assert isinstance(given.backbone, EscnConfig)
    with pytest.raises(ValueError, match="mmax 3 is above lmax 2"):
        ModelConfig.model_validate({"backbone": {"kind": "escn", "mmax": 3}})
    with pytest.raises(ValueError, match="body_order"):
        ModelConfig.model_validate({"backbone": {"kind": "escn", "body_order": 3}})


def test_charge_and_spin_change_the_energy(kit: SimpleNamespace) -> None:
    potential = Potential(kit.config("escn"), kit.fidelities, 6.0, 1.0).double().eval()
    neutral, charged = kit.batch([kit.molecule(0)]), kit.batch([kit.molecule(0)])
    charged.charge[:] = 1
    assert abs(float(potential(neutral).energy - potential(charged).energy)) > 1e-6


def test_it_draws_no_random_numbers(kit: SimpleNamespace) -> None:
    potential = Potential(kit.config("escn"), kit.fidelities, 6.0, 1.0).eval()
    batch = kit.batch([kit.molecule(0)], dtype=torch.float32)
    before = torch.get_rng_state()
    first, second = potential(batch), potential(batch)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.forces, second.forces)


def test_what_it_cannot_do_is_refused(kit: SimpleNamespace) -> None:
    potential = Potential(kit.config("escn"), kit.fidelities, 6.0, 1.0).double().train()
    with pytest.raises(InputError, match="precision"):
        potential.learned.backbone.multiply_in(torch.bfloat16)
    potential.learned.backbone.recompute = True
    with pytest.raises(InputError, match="activation_checkpointing"):
        potential(kit.batch([kit.molecule(0)]))
