"""Schema of a study YAML: a grid of methods, numbers of high-fidelity labels and seeds over one base recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mffm.config.base import Schema, apply_overrides, read_yaml, validate
from mffm.keys import Property

Name = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")]
Count = Annotated[int, Field(ge=1)] | Literal["all"]

OWN = ("name", "run", "seed", "start_from", "data.fingerprint", "data.layers", "train.threads", "log.group")


class StageConfig(Schema):
    """A training without high-fidelity labels that cells share: once per seed."""

    changes: dict[str, Any] = Field(default_factory=dict, description="dotted name of the base recipe → value")

    @model_validator(mode="after")
    def _checks(self) -> "StageConfig":
        _refuse_own(self.changes)
        return self


class MethodConfig(Schema):
    """One way to use the labels: the base recipe with changes."""

    title: str = Field("", description="in the report; the method's name where not given")
    changes: dict[str, Any] = Field(default_factory=dict, description="dotted name of the base recipe → value")
    start_from: str | None = Field(
        None, description="stage whose run of the same seed the training starts from; map fidelities by model.init_from"
    )
    refit: str | None = Field(
        None,
        description="no training: the run of this stage is judged, its element references refitted to the cell's "
        "high-fidelity energies",
    )
    fidelity: str | None = Field(
        None,
        description="fidelity of the store that takes the place of the study's `high`, e.g. stored differences HF - LF "
        "of an explicit delta; the method is judged on these labels",
    )
    needs_lf_at_inference: bool = Field(
        False, description="a prediction needs a low-fidelity calculation too; ranked apart"
    )
    n_high: list[Count] | None = Field(None, min_length=1, description="instead of the study's")

    @model_validator(mode="after")
    def _checks(self) -> "MethodConfig":
        _refuse_own(self.changes)
        if self.refit is not None and (self.changes or self.start_from or self.fidelity):
            raise ValueError("refit has no training of its own: leave out changes, start_from and fidelity")
        if self.fidelity is not None and not self.needs_lf_at_inference:
            raise ValueError(
                f"fidelity: {self.fidelity!r} is not the study's; say needs_lf_at_inference: true where a prediction "
                "is added to a low-fidelity calculation"
            )
        return self


def _refuse_own(changes: dict[str, Any]) -> None:
    for name in changes:
        if name in OWN:
            raise ValueError(f"changes: {name} is set by the study itself")


class CellsConfig(Schema):
    """Structures of a file that are judged beside the store's splits, in groups."""

    file: str = Field(min_length=1, description="anything that ASE reads, relative to the study YAML")
    group: str = Field(min_length=1, description="info key of a structure's group")
    where: str | None = Field(None, description="info key that is true for the structures meant; all where not given")
    uncovered: list[str] = Field(
        default_factory=list, description="groups that no high-fidelity training labels cover; reported apart"
    )


class MixingConfig(CellsConfig):
    """Mixing energies of each group between its two end members, against labels."""

    energy: str = Field(min_length=1, description="info key of the high fidelity's energy, eV")
    order: str = Field(min_length=1, description="info key: how many atoms are replaced; least and most: end members")
    others: dict[str, str] = Field(
        default_factory=dict, description="title → info key: other levels' own labels, for the table"
    )
    drawn: list[str] = Field(default_factory=list, description="methods in the figure; all where not given")
    drawn_at: int | None = Field(
        None, description="labels of the methods in the figure; the most that a method has where it has no such number"
    )


class EosConfig(CellsConfig):
    """Lattice constants and bulk moduli from equations of state, against those of a method of the study."""

    against: str = Field(min_length=1, description="method, at its most labels and the same seed")
    strain: float = Field(0.06, gt=0, le=0.2, description="of the lengths, both ways; atoms move with the cell")
    points: int = Field(9, ge=7, description="volumes of an equation of state")


class StudyConfig(Schema):
    """A study YAML: {method} × {number of high-fidelity labels} × {seed}, judged on the same splits."""

    name: Name
    recipe: str = Field(min_length=1, description="base recipe, relative to the study YAML")
    changes: dict[str, Any] = Field(default_factory=dict, description="dotted name of the base recipe → value")
    high: str = Field(min_length=1, description="the high fidelity, whose labels are counted and judged")
    n_high: list[Count] = Field(
        min_length=1, description="frames with high-fidelity labels: max_frames of every pool of `high`; or all"
    )
    seeds: list[int] = Field(
        min_length=1, description="of weights, of the batches and of the choice of the high-fidelity frames"
    )
    iid: str = Field("test", min_length=1, description="split of the store like the training frames")
    ood: str | None = Field("ood", description="split of held-out groups; null where the store has none")
    properties: list[Property] = Field(default=["energy", "forces"], min_length=1, description="judged")
    relative_energies: bool = Field(
        False, description="judge energy differences at equal composition too, which need no element references"
    )
    mixing: MixingConfig | None = Field(None, description="judge mixing energies too")
    eos: EosConfig | None = Field(None, description="judge lattice constants and bulk moduli too")
    weak: list[str] = Field(
        default_factory=list, description="low fidelities that may say little of the high energies (R² below 0.5)"
    )
    stages: dict[Name, StageConfig] = Field(default_factory=dict)
    methods: dict[Name, MethodConfig] = Field(min_length=1)
    baselines: list[str] = Field(min_length=1, description="methods that the others are measured against")

    @model_validator(mode="after")
    def _checks(self) -> "StudyConfig":
        _refuse_own(self.changes)
        lists: dict[str, list[Any]] = {"seeds": self.seeds, "n_high": self.n_high, "baselines": self.baselines}
        lists |= {f"methods.{name}.n_high": m.n_high or [] for name, m in self.methods.items()}
        for place, values in lists.items():
            twice = next((v for v in values if values.count(v) > 1), None)
            if twice is not None:
                raise ValueError(f"{place}: {twice} is given twice")
        for name, method in self.methods.items():
            for key in ("start_from", "refit"):
                stage = getattr(method, key)
                if stage is not None and stage not in self.stages:
                    raise ValueError(f"methods.{name}.{key}: no stage {stage!r}; stages: {_names(self.stages)}")
        for name in self.baselines:
            if name not in self.methods:
                raise ValueError(f"baselines: no method {name!r}; methods: {_names(self.methods)}")
        used = {m.start_from for m in self.methods.values()} | {m.refit for m in self.methods.values()}
        for name in self.stages:
            if name not in used:
                raise ValueError(f"stages.{name}: no method starts from it or refits it")
        named = {"mixing.drawn": self.mixing.drawn} if self.mixing else {}
        named |= {"eos.against": [self.eos.against]} if self.eos else {}
        for place, methods in named.items():
            unknown = next((m for m in methods if m not in self.methods), None)
            if unknown is not None:
                raise ValueError(f"{place}: no method {unknown!r}; methods: {_names(self.methods)}")
        if self.ood == self.iid:
            raise ValueError(f"ood: {self.ood!r} is the iid split; name another, or null")
        return self

    @property
    def splits(self) -> dict[str, str]:
        """What is judged: iid and, where there is one, ood → split of the store."""
        return {"iid": self.iid} | ({"ood": self.ood} if self.ood else {})

    def title(self, method: str) -> str:
        """Return what the report calls a method."""
        return self.methods[method].title or method


def load_study(path: Path | str, overrides: Sequence[str] = ()) -> StudyConfig:
    """Return a study YAML, with overrides applied; methods and stages in the file's order, as the report has them."""
    content = read_yaml(path)
    changed = apply_overrides(content, overrides)
    for key in ("methods", "stages"):
        before, now = content.get(key), changed.get(key)
        if isinstance(before, dict) and isinstance(now, dict):
            changed[key] = {name: now[name] for name in [*before, *(n for n in now if n not in before)] if name in now}
    return validate(StudyConfig, changed, str(path))


def _names(names: dict[str, Any]) -> str:
    return ", ".join(names) or "none"
