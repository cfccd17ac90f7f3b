"""Schema of backbones whose weights come from another package."""

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mffm.config.base import Schema

# What SevenNet's released checkpoints know, by symbol, which is SevenNet's own order.
_ELEMENTS = [
    "Ac", "Ag", "Al", "Ar", "As", "Au", "B", "Ba", "Be", "Bi", "Br", "C", "Ca", "Cd", "Ce", "Cl", "Co", "Cr", "Cs",
    "Cu", "Dy", "Er", "Eu", "F", "Fe", "Ga", "Gd", "Ge", "H", "He", "Hf", "Hg", "Ho", "I", "In", "Ir", "K", "Kr",
    "La", "Li", "Lu", "Mg", "Mn", "Mo", "N", "Na", "Nb", "Nd", "Ne", "Ni", "Np", "O", "Os", "P", "Pa", "Pb", "Pd",
    "Pm", "Pr", "Pt", "Pu", "Rb", "Re", "Rh", "Ru", "S", "Sb", "Sc", "Se", "Si", "Sm", "Sn", "Sr", "Ta", "Tb", "Tc",
    "Te", "Th", "Ti", "Tl", "Tm", "U", "V", "W", "Xe", "Y", "Yb", "Zn", "Zr",
]  # fmt: skip

_L2 = ["128x0e", *["128x0e+64x1e+32x2e"] * 4, "128x0e"]
_L3 = ["128x0e", *["128x0e+64x1e+32x2e+32x3e"] * 4, "128x0e"]
# Values that differ from the defaults of SevennetConfig. Releases hold name and values: keep both.
SEVENNETS: dict[str, dict[str, Any]] = {
    "7net-0": {"denominators": [35.98957443237305] * 5},
    "7net-l3i5": {
        "lmax": 3, "irreps": _L3, "denominators": [35.984718322753906] * 5, "envelope_from": None,
    },
    "7net-mf-0": {
        "denominators": [35.98957443237305] * 5, "modalities": 2, "modal_sites": ["send", "receive", "output"],
    },
}  # fmt: skip
_IRREPS = re.compile(r"[1-9]\d{0,3}x\d[eo](\+[1-9]\d{0,3}x\d[eo])*")

Activation = Literal["silu", "ssp"]
OddActivation = Literal["tanh", "abs"]


class SevennetConfig(Schema):
    """SevenNet's network (a NequIP), computed by the package sevenn; its own names in brackets."""

    kind: Literal["sevennet"]
    size: Literal["7net-0", "7net-l3i5", "7net-mf-0"] | None = Field(
        None, description="a released checkpoint's values for what is not given here; None where others are given"
    )
    cutoff: float = Field(5.0, gt=0, description="Å")
    elements: list[str] = Field(
        default_factory=lambda: list(_ELEMENTS),
        min_length=1,
        max_length=118,
        description="symbols, in the order of the one-hot",
    )
    lmax: int = Field(2, ge=0, le=6, description="highest degree of the spherical harmonics of an edge [lmax_edge]")
    parity: bool = Field(
        False, description="[is_parity] false: energies do not change under rotations, but may under reflections"
    )
    irreps: list[str] = Field(
        default_factory=lambda: list(_L2),
        min_length=2,
        max_length=17,
        description="of the embedding and behind each layer, the last scalars only [irreps_manual]",
    )
    n_radial: int = Field(8, ge=1, le=128, description="Bessel functions [bessel_basis_num]")
    envelope_from: float | None = Field(
        4.5, gt=0, description="Å; XPLOR envelope from here on [cutoff_on]; None: the polynomial one"
    )
    envelope_power: int = Field(6, ge=2, description="p of the polynomial envelope [poly_cut_p_value]")
    radial_hidden: list[int] = Field(default_factory=lambda: [64, 64], description="[weight_nn_hidden_neurons]")
    radial_activation: Literal["relu", "silu", "tanh", "abs", "ssp", "sigmoid", "elu"] = "silu"
    scalar_activation: Activation = Field("silu", description="[act_scalar, e]")
    odd_scalar_activation: OddActivation = Field("tanh", description="[act_scalar, o]")
    gate_activation: Activation = Field("silu", description="[act_gate, e]")
    odd_gate_activation: OddActivation = Field("tanh", description="[act_gate, o]")
    self_connections: list[Literal["nequip", "linear"]] = Field(
        default_factory=lambda: ["linear"],  # type: ignore[arg-type]
        description="of each layer, or one for all [self_connection_type]",
    )
    denominators: list[Annotated[float, Field(gt=0)]] = Field(
        default_factory=lambda: [35.98957443237305] * 5,
        description="what the layers divide their sums over neighbors by",
    )
    normalize_harmonics: bool = Field(True, description="[_normalize_sph]")
    modalities: int = Field(
        0, ge=0, le=64, description="modalities that the weights were trained with: they count in their normalisation"
    )
    modal_sites: list[Literal["embed", "send", "receive", "output"]] = Field(
        default_factory=list, description="where these entered [use_modal_*]"
    )

    @model_validator(mode="before")
    @classmethod
    def _named_size(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("size"), str):
            return values
        table = SEVENNETS.get(values["size"], {})
        resolved = {**table, **values}
        return {**resolved, "size": None} if any(resolved[key] != table[key] for key in table) else resolved

    @property
    def n_hidden(self) -> int:
        """Width of the features that heads take: of the map before the energy."""
        return int(self.irreps[-1].split("x")[0]) // 2

    @property
    def layers(self) -> int:
        """How often messages are passed."""
        return len(self.irreps) - 1

    @model_validator(mode="after")
    def _checks(self) -> "SevennetConfig":
        for text in self.irreps:
            if not _IRREPS.fullmatch(text):
                raise ValueError(f"irreps: {text!r} is not like 128x0e+64x1e")
        for where, text in (("first", self.irreps[0]), ("last", self.irreps[-1])):
            if not re.fullmatch(r"\d+x0e", text):
                raise ValueError(f"irreps: the {where} must be scalars, like 128x0e; found {text}")
        if self.n_hidden < 1:
            raise ValueError(f"irreps: the last must be two scalars or more; found {self.irreps[-1]}")
        for name, found, allowed in (
            ("denominators", len(self.denominators), {self.layers}),
            ("self_connections", len(self.self_connections), {1, self.layers}),
        ):
            if found not in allowed:
                raise ValueError(f"{name}: {found} given for {self.layers} layers")
        if len(set(self.elements)) != len(self.elements):
            raise ValueError("elements: one is given twice")
        if self.envelope_from is not None and self.envelope_from >= self.cutoff:
            raise ValueError(f"envelope_from {self.envelope_from} is not below the cutoff {self.cutoff}")
        if bool(self.modal_sites) != (self.modalities > 0):
            raise ValueError("modalities and modal_sites belong together")
        return self
