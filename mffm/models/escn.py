"""The second backbone: fairchem-core's eSCN-MD (eSEN, UMA without its mixture of experts) behind ``Backbone``.

It takes this package's edges instead of its own graph, so that energies depend on edge vectors alone, and gives its
invariant features to the same heads. Weights of a checkpoint that fairchem wrote fit: ``read_checkpoint``.
eSCN: Passaro and Zitnick (arXiv 2302.03655); eSEN: Fu et al. (arXiv 2502.12147). Its convolutions are those of SO(2):
energies do not change under rotations, but may under reflections.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mffm.batch import Batch
from mffm.config.model import EscnConfig
from mffm.edges import Edges
from mffm.errors import InputError, known
from mffm.models.density import Modulation, modulated

try:
    from fairchem.core.models.uma.common.quaternion.wigner_d_hybrid import axis_angle_wigner_hybrid
    from fairchem.core.models.uma.escn_md import eSCNMDBackbone
except ImportError as error:
    raise InputError(
        f"model.backbone.kind: escn needs fairchem-core ({error}); install it: pip install 'mffm[fairchem]'"
    ) from error

SYSTEM_SITE = "0.system"


class _Data(dict):
    """What eSCN-MD reads: a mapping whose ``get`` takes its default by name."""

    def get(self, key: str, default: Any = None) -> Any:
        return super().get(key, default)


class _Escn(eSCNMDBackbone):
    """eSCN-MD on given edges, with a modulation of its system embedding."""

    def _generate_graph(self, data_dict: _Data) -> dict[str, Tensor]:
        data_dict["scatter_target"] = data_dict["graph"]["edge_index"][1]
        return data_dict["graph"]

    def _get_rotmat_and_wigner(self, edge_distance_vecs: Tensor) -> tuple[Tensor, Tensor]:
        """Turn every edge frame by no angle about its edge; fairchem draws one at random, of which nothing depends but
        the rounding and the random numbers of everybody else."""
        return axis_angle_wigner_hybrid(
            edge_distance_vecs, self.lmax, gamma=edge_distance_vecs.new_zeros(edge_distance_vecs.shape[0]),
            coeffs=self.wigner_data.coeffs, U_blocks=self.wigner_data.U_blocks,
            custom_kernels=self.wigner_data.custom_kernels,
        )  # fmt: skip

    def csd_embedding(self, charge: Tensor, spin: Tensor, dataset: Any) -> Tensor:
        mixed = self.mix_csd(torch.cat((self.charge_embedding(charge), self.spin_embedding(spin)), dim=1))
        return nn.functional.silu(modulated(mixed, self.modulation))

    modulation: Modulation | None = None


class EscnBackbone(nn.Module):
    """fairchem's eSCN-MD; implements ``Backbone``.

    Args:
        avg_neighbors: not used; eSCN-MD divides by a fixed number.
        l_out: highest degree of ``features``, 0 or 1; eSCN-MD has them in any case.
    """

    def __init__(self, config: EscnConfig, avg_neighbors: float, l_out: int = 0):
        super().__init__()
        self.config = config
        self.cutoff = config.cutoff
        self.n_features = config.sphere_channels
        self.l_out = l_out
        self.sites = {SYSTEM_SITE: config.sphere_channels, "output": self.n_features}
        self.recompute = False
        with _default_dtype(torch.float32):
            self.escn = _Escn(**arguments(config))
        for module in self.escn.modules():  # its buffers are constants: weights alone are saved
            for name, buffer in list(module.named_buffers(recurse=False)):
                module.register_buffer(name, buffer, persistent=False)

    def site(self, name: str) -> tuple[Tensor, Tensor]:
        assert name == SYSTEM_SITE, name
        return self.escn.mix_csd.weight.t(), self.escn.mix_csd.bias

    def multiply_in(self, dtype: torch.dtype | None) -> None:
        if dtype is not None:
            raise InputError("train.precision: bfloat16 is for the density backbone; set float32 or tf32 with escn")

    def check(self, batch: Batch) -> None:
        """Refuse nothing."""

    def equivariant_only(self) -> set[str]:
        """Return the names of the parameters that ``l_out`` 1 adds: none."""
        return set()

    def forward(self, batch: Batch, edge_vectors: Tensor, modulations: Mapping[str, Modulation]) -> Tensor:
        """Return the features [n_atoms, n_features]."""
        return self.features(batch, edge_vectors, modulations)[0][0]

    def features(self, batch: Batch, edge_vectors: Tensor, modulations: Mapping[str, Modulation]) -> list[Tensor]:
        """Return features by degree l ≤ ``l_out``, [2l + 1, n_atoms, n_features].

        Raises:
            InputError: activation checkpointing was asked for.
        """
        if self.recompute:
            raise InputError("train.activation_checkpointing is for the density backbone; set it to false with escn")
        if isinstance(batch, Edges):  # and one more edge beyond the cutoff, of no effect: a tracer takes no branch
            edges = torch.cat([torch.stack([batch.neighbors, batch.receivers]), batch.rows.expand(2, 1)], dim=1)
            far = edge_vectors.new_tensor([[2 * self.cutoff, 0.0, 0.0]])
            vectors = torch.cat([edge_vectors, far])
        else:
            slots = batch.neighbor_mask.nonzero().flatten()
            edges = torch.stack([batch.neighbors[slots], batch.receivers[slots]])
            vectors = edge_vectors.index_select(0, slots)
            if len(slots) == 0:  # eSCN needs an edge: one beyond the cutoff, of no effect
                edges = batch.neighbors[:1].expand(2, 1)
                vectors = edge_vectors[:1]
        graph = {"edge_index": edges, "edge_distance_vec": vectors, "edge_distance": vectors.norm(dim=-1)}
        first = torch.cumsum(batch.n_atoms, 0) - batch.n_atoms
        pair = modulations.get(SYSTEM_SITE)
        self.escn.modulation = None
        if pair is not None:  # atoms of a system share its fidelity
            self.escn.modulation = tuple(None if value is None else value[first] for value in pair)  # type: ignore[assignment]
        data = _Data(
            atomic_numbers=batch.atomic_numbers, pos=edge_vectors, batch=batch.system_idx, natoms=batch.n_atoms,
            charge=batch.charge, spin=batch.spin_multiplicity, graph=graph,
        )  # fmt: skip
        nodes = self.escn(data)["node_embedding"]
        invariant = modulated(nodes[:, 0], modulations.get("output")).unsqueeze(0)
        return [invariant] if self.l_out == 0 else [invariant, nodes[:, 1:4].transpose(0, 1)]


def arguments(config: EscnConfig) -> dict[str, Any]:
    """Return what eSCN-MD is built with."""
    return {
        "sphere_channels": config.sphere_channels, "hidden_channels": config.hidden_channels,
        "edge_channels": config.edge_channels, "num_layers": config.layers, "lmax": config.lmax, "mmax": config.mmax,
        "cutoff": config.cutoff, "num_distance_basis": config.n_radial, "ff_type": config.feed_forward,
        "norm_type": "rms_norm_sh", "act_type": "gate", "chg_spin_emb_type": "rand_emb", "cs_emb_grad": True,
        "use_dataset_embedding": False, "direct_forces": True, "regress_forces": False, "otf_graph": False,
    }  # fmt: skip


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def read_checkpoint(path: Path | str) -> tuple[EscnConfig, dict[str, Tensor]]:
    """Return the configuration and the backbone's weights of an inference checkpoint that fairchem wrote.

    The file is a pickle: open only what you trust. Charge and spin embeddings that this adapter does not have, and a
    data-set embedding, are left out; they are constants of a fixed task.

    Raises:
        InputError: not such a checkpoint, or a backbone that the adapter does not cover.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=False)
        model, state = dict(content.model_config)["backbone"], content.model_state_dict
    except (OSError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not an inference checkpoint of fairchem-core: {error}") from error
    fixed = {"norm_type": "rms_norm_sh", "act_type": "gate", "chg_spin_emb_type": "rand_emb"}
    defaults = {"chg_spin_emb_type": "pos_emb", **{k: v for k, v in fixed.items() if k != "chg_spin_emb_type"}}
    for key, wanted in fixed.items():
        if (found := model.get(key, defaults[key])) != wanted:
            raise InputError(f"{path}: {key} is {found!r}; the adapter covers {wanted!r}")
    if model.get("use_dataset_embedding", True):
        raise InputError(f"{path}: has a data-set embedding; the adapter covers use_dataset_embedding: false")
    names = {
        "sphere_channels": 128, "hidden_channels": 128, "edge_channels": 128, "lmax": 2, "mmax": 2, "cutoff": 5.0,
        "num_layers": 2, "num_distance_basis": 512, "ff_type": "grid",
    }  # fmt: skip
    ours = {"num_layers": "layers", "num_distance_basis": "n_radial", "ff_type": "feed_forward"}
    config = EscnConfig(kind="escn", **{ours.get(k, k): model.get(k, default) for k, default in names.items()})
    return config, {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}


def load_checkpoint(backbone: nn.Module, path: Path | str) -> None:
    """Put the weights of a fairchem checkpoint into a backbone.

    Raises:
        InputError: the checkpoint's backbone has other sizes.
    """
    assert isinstance(backbone, EscnBackbone)
    config, weights = read_checkpoint(path)
    have, wanted = (c.model_dump(exclude={"weights"}) for c in (config, backbone.config))
    if differing := [f"{k}: {have[k]} there, {wanted[k]} here" for k in have if have[k] != wanted[k]]:
        raise InputError(f"{path}: another backbone ({'; '.join(differing)}); give model.backbone its values")
    own = backbone.escn.state_dict()
    constants = {name for name, _ in backbone.escn.named_buffers()}
    weights = {name: value for name, value in weights.items() if name not in constants}
    if set(own) != set(weights):
        raise InputError(
            f"{path}: its tensors differ from this eSCN-MD's: {known(sorted(set(own) ^ set(weights))[:5])}"
        )
    backbone.escn.load_state_dict(weights)
