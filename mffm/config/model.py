"""Schema of the potential: backbone, conditioning, heads."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from mffm.config.base import Schema
from mffm.config.foreign import SevennetConfig

# Named sizes of the density backbone; docs/backbone.md says what each costs. Releases hold name and values: keep both.
SIZES: dict[str, dict[str, int]] = {
    "S": {"channels": 96, "edge_channels": 32, "lmax": 2, "l_message": 1, "layers": 2},
    "M": {"channels": 256, "edge_channels": 48, "lmax": 3, "l_message": 1, "layers": 3},
    "L": {"channels": 384, "edge_channels": 64, "lmax": 3, "l_message": 2, "layers": 4},
    "XL": {"channels": 576, "edge_channels": 96, "lmax": 4, "l_message": 2, "layers": 4},
}


class DensityConfig(Schema):
    """The native density backbone."""

    kind: Literal["density"] = "density"
    size: Literal["S", "M", "L", "XL"] | None = Field(
        None,
        description="named size: values of channels, edge_channels, lmax, l_message and layers not given here; "
        "None in a resolved recipe that has others",
    )
    cutoff: float = Field(5.0, gt=0, description="Å")
    lmax: int = Field(2, ge=0, le=4, description="highest degree of the spherical harmonics of an edge")
    l_message: int = Field(1, ge=0, le=3, description="highest degree of the features that a sender sends")
    layers: int = Field(2, ge=1, le=12)
    channels: int = Field(64, ge=1)
    edge_channels: int = Field(
        32, ge=1, description="channels of an edge: the sender's features are projected to these"
    )
    n_radial: int = Field(8, ge=2, description="Bessel functions")
    radial_hidden: int = Field(
        64,
        ge=0,
        description="width of an MLP of the Bessel functions, shared by all layers; 0: radial functions linear in "
        "them, one an Å of cutoff: better for larger distortions of known molecules",
    )
    body_order: int = Field(
        4, ge=2, le=4, description="2: density; 3: its square; 4: its cube; on atoms, channel by channel"
    )
    ff_expansion: int = Field(2, ge=1, le=8)
    envelope_power: int = Field(6, ge=3, description="p of the polynomial envelope")
    charge_and_spin: bool = Field(
        False, description="total charge (-20 to 20 e) and spin multiplicity (to 20) of a system as inputs of its atoms"
    )

    @model_validator(mode="before")
    @classmethod
    def _named_size(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("size"), str):
            name, table = values["size"], SIZES.get(values["size"], {})
            resolved = {**table, **values}
            differing = [f"{key}: {resolved[key]}" for key in table if resolved[key] != table[key]]
            if differing and all(key in values for key in table):  # another size for what a run has resolved
                raise ValueError(f"size {name} names nothing: {', '.join(differing)} are given; leave out one or other")
            return {**resolved, "size": None} if differing else resolved
        return values

    @model_validator(mode="after")
    def _checks(self) -> "DensityConfig":
        if self.l_message > self.lmax:
            raise ValueError(f"l_message {self.l_message} is above lmax {self.lmax}")
        return self


class EscnConfig(Schema):
    """fairchem-core's eSCN-MD backbone; the names of its parts in brackets."""

    kind: Literal["escn"]
    cutoff: float = Field(6.0, gt=0, description="Å")
    lmax: int = Field(2, ge=0, le=6, description="highest degree of the features")
    mmax: int = Field(2, ge=0, le=6, description="highest order that convolutions mix")
    layers: int = Field(2, ge=1, le=32, description="[num_layers]")
    sphere_channels: int = Field(64, ge=2, multiple_of=2)
    hidden_channels: int = Field(64, ge=1)
    edge_channels: int = Field(64, ge=1)
    n_radial: int = Field(64, ge=2, description="Gaussians of the distance [num_distance_basis]")
    feed_forward: Literal["spectral", "grid"] = Field(
        "spectral", description="[ff_type] grid: on points of a sphere, not exactly equivariant"
    )
    weights: str | None = Field(
        None, description="inference checkpoint that fairchem wrote, whose backbone a fresh run starts from (a pickle)"
    )

    @model_validator(mode="after")
    def _checks(self) -> "EscnConfig":
        if self.mmax > self.lmax:
            raise ValueError(f"mmax {self.mmax} is above lmax {self.lmax}")
        return self


def _backbone_kind(value: object) -> str:
    found = value.get("kind", "density") if isinstance(value, dict) else getattr(value, "kind", "density")
    return str(found)


BackboneConfig = Annotated[
    Annotated[DensityConfig, Tag("density")]
    | Annotated[EscnConfig, Tag("escn")]
    | Annotated[SevennetConfig, Tag("sevennet")],
    Discriminator(_backbone_kind),
]


class ConditioningConfig(Schema):
    """How the fidelity enters the backbone."""

    kind: Literal["none", "onehot", "embedding", "film"] = "none"
    dim: int = Field(16, ge=1, description="length of the learned vector (embedding, film)")
    zero_init: bool = Field(
        True, description="start every fidelity at the common model; false: random, as SevenNet does from scratch"
    )


class HeadsConfig(Schema):
    """How features become atom energies."""

    kind: Literal["shared", "independent", "delta"] = "shared"
    hidden: list[int] = Field(default_factory=lambda: [64], description="widths of the MLP; empty for a linear head")
    base: str | None = Field(None, description="delta: the fidelity whose head the corrections are added to")
    init_from: dict[str, str] = Field(
        default_factory=dict, description="independent: fidelity → fidelity whose head it starts as a copy of"
    )

    @model_validator(mode="after")
    def _checks(self) -> "HeadsConfig":
        if self.kind == "delta" and self.base is None:
            raise ValueError("delta heads need `base`, the fidelity whose head the corrections are added to")
        if self.kind != "delta" and self.base is not None:
            raise ValueError(f"`base` belongs to delta heads; these are {self.kind}")
        if self.init_from and self.kind != "independent":
            raise ValueError(f"`init_from` belongs to independent heads; these are {self.kind}")
        return self


class DirectConfig(Schema):
    """Heads that give forces, and stress, straight from features; per fidelity as `heads` are."""

    stress: bool = Field(False, description="a head for the stress too; without it there is none")
    zero_net_force: bool = Field(
        True, description="take the mean force off the atoms of each system; a head alone does not sum to zero"
    )


class D3Config(Schema):
    """DFT-D3 dispersion, from simple-dftd3."""

    functional: str = Field(min_length=1, description="as simple-dftd3 names it: pbe, r2scan, b3lyp")
    damping: Literal["bj", "zero"] = "bj"
    three_body: bool = Field(False, description="the Axilrod-Teller-Muto term too; crystals take 100 times as long")
    cutoff: float | None = Field(None, gt=3.0, description="Å, of pairs; None: the library's 60 bohr (31.75 Å)")


class ModelConfig(Schema):
    """The potential of a run."""

    backbone: BackboneConfig = DensityConfig()
    conditioning: ConditioningConfig = ConditioningConfig()
    heads: HeadsConfig = HeadsConfig()
    forces: Literal["conservative", "direct"] = Field(
        "conservative",
        description="minus the gradient of the energy, or direct: from heads of their own, not conservative; for "
        "pretraining, at 0.4 of the time a step",
    )
    direct: DirectConfig = DirectConfig()
    zbl: bool = Field(
        False, description="add the Ziegler-Biersack-Littmark repulsion of nuclei below the sum of covalent radii"
    )
    d3: dict[str, D3Config] = Field(
        default_factory=dict,
        description="fidelity → DFT-D3 that its labels contain: added to every prediction, so that the rest is learned",
    )
    init_from: dict[str, str] = Field(
        default_factory=dict,
        description="fine-tuning: new fidelity → fidelity of the release that its head, conditioning row and "
        "references start from",
    )

    @model_validator(mode="after")
    def _checks(self) -> "ModelConfig":
        if isinstance(self.backbone, SevennetConfig):
            if self.forces == "direct":
                raise ValueError("sevennet has features of degree 0 alone: its forces are conservative")
            if self.conditioning.kind == "film":
                raise ValueError(
                    "conditioning.kind: film scales scalars, which sevennet lets shift alone: onehot, embedding"
                )
        if self.forces == "conservative":
            if self.direct != DirectConfig():
                raise ValueError("`direct` belongs to forces: direct; these are conservative")
            return self
        needed, what = (2, "stress") if self.direct.stress else (1, "forces")
        if self.backbone.lmax < needed:
            raise ValueError(f"direct {what} need features of degree {needed}; backbone.lmax is {self.backbone.lmax}")
        if self.direct.stress and isinstance(self.backbone, EscnConfig):
            raise ValueError("direct.stress is for the density backbone; escn has direct forces only")
        return self
