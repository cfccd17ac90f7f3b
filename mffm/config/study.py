"""Schema of a study YAML: a grid of methods, numbers of high-fidelity labels and seeds over one base recipe."""

import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mffm.config.base import Schema, apply_overrides, read_yaml, validate
from mffm.keys import Property

Name = Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")]
Count = Annotated[int, Field(ge=1)] | Literal["all"]

OWN = ("name", "run", "seed", "start_from", "data.fingerprint", "data.layers", "train.threads", "log.group")
DATA_OF_TRIALS = re.compile(r"data\.plan\.(temperature|paired|edge_budget|pools\.\d+\.weight)")
Tune = dict[str, Annotated[list[Any], Field(min_length=1)]]


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
        "of an explicit delta; the method is judged on these labels, with `plus` on those of `high`",
    )
    plus: str | None = Field(
        None,
        description="stage, a training on the low fidelity, whose run of the same seed is added to the method's own: "
        "an explicit delta on a learned low fidelity",
    )
    needs_lf_at_inference: bool = Field(
        False, description="a prediction needs a low-fidelity calculation too; ranked apart"
    )
    n_high: list[Count] | None = Field(None, min_length=1, description="instead of the study's")
    tune: Tune | None = Field(None, description="instead of the study's, with as many trials")

    @model_validator(mode="after")
    def _checks(self) -> "MethodConfig":
        _refuse_own(self.changes)
        _check_tune(self.tune or {})
        if self.refit is not None and (self.changes or self.start_from or self.fidelity or self.plus or self.tune):
            raise ValueError("refit has no training of its own: leave out changes, start_from, fidelity, plus and tune")
        if self.plus is not None and self.fidelity is None:
            raise ValueError(
                f"plus: {self.plus!r} is added to a training on stored differences: give their fidelity, e.g. "
                "fidelity: pbe_minus_gfn2 of `mffm difference`"
            )
        if self.plus is not None and self.needs_lf_at_inference:
            raise ValueError(
                f"plus: {self.plus!r} takes the place of the low-fidelity calculation: leave out needs_lf_at_inference"
            )
        if self.fidelity is not None and self.plus is None and not self.needs_lf_at_inference:
            raise ValueError(
                f"fidelity: {self.fidelity!r} is not the study's; say needs_lf_at_inference: true where a prediction "
                "is added to a low-fidelity calculation, or plus: <stage> where to a stage's prediction"
            )
        return self

    @property
    def stages(self) -> list[str]:
        """The stages that the method uses."""
        return list(dict.fromkeys(stage for stage in (self.start_from, self.refit, self.plus) if stage is not None))


def _refuse_own(changes: dict[str, Any]) -> None:
    for name in changes:
        if name in OWN:
            raise ValueError(f"changes: {name} is set by the study itself")


def _check_tune(tune: Tune) -> None:
    for name, values in tune.items():
        if name in OWN:
            raise ValueError(f"tune: {name} is set by the study itself")
        if name in ("train", "train.best") or (name.split(".")[0] == "data" and not DATA_OF_TRIALS.fullmatch(name)):
            raise ValueError(
                f"tune: {name}: the trials of a cell have the same labels and the same validation; of data.plan "
                "temperature, paired, edge_budget and pools.<i>.weight may be tuned"
            )
        twice = next((v for v in values if values.count(v) > 1), None)
        if twice is not None:
            raise ValueError(f"tune.{name}: {twice} is given twice")


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
    validation_share: float | None = Field(
        None,
        gt=0,
        le=1,
        description="frames of the validation split that a cell with n_high frames chooses its weights by, as a share "
        "of n_high, 4 at least: all labels that a cell needs are then proportional to n_high; None: the recipe's",
    )
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
    candidate: str | None = Field(
        None, description="method of which the report says whether it is not worse than each of the others"
    )
    tune: Tune = Field(
        default_factory=dict,
        description="dotted name of the recipe → values: every cell is trained with each combination, and the one with "
        "the best validation is judged",
    )

    @model_validator(mode="after")
    def _checks(self) -> "StudyConfig":
        _refuse_own(self.changes)
        _check_tune(self.tune)
        lists: dict[str, list[Any]] = {"seeds": self.seeds, "n_high": self.n_high, "baselines": self.baselines}
        lists |= {f"methods.{name}.n_high": m.n_high or [] for name, m in self.methods.items()}
        for place, values in lists.items():
            twice = next((v for v in values if values.count(v) > 1), None)
            if twice is not None:
                raise ValueError(f"{place}: {twice} is given twice")
        for name, method in self.methods.items():
            for key in ("start_from", "refit", "plus"):
                stage = getattr(method, key)
                if stage is not None and stage not in self.stages:
                    raise ValueError(f"methods.{name}.{key}: no stage {stage!r}; stages: {_names(self.stages)}")
        for name in self.baselines:
            if name not in self.methods:
                raise ValueError(f"baselines: no method {name!r}; methods: {_names(self.methods)}")
        used = {stage for m in self.methods.values() for stage in m.stages}
        for name in self.stages:
            if name not in used:
                raise ValueError(f"stages.{name}: no method starts from it, refits it or adds it")
        named = {"mixing.drawn": self.mixing.drawn} if self.mixing else {}
        named |= {"eos.against": [self.eos.against]} if self.eos else {}
        for place, methods in named.items():
            unknown = next((m for m in methods if m not in self.methods), None)
            if unknown is not None:
                raise ValueError(f"{place}: no method {unknown!r}; methods: {_names(self.methods)}")
        if self.ood == self.iid:
            raise ValueError(f"ood: {self.ood!r} is the iid split; name another, or null")
        self._check_candidate()
        self._check_trials()
        return self

    def _check_candidate(self) -> None:
        name = self.candidate
        if name is None:
            return
        if name not in self.methods:
            raise ValueError(f"candidate: no method {name!r}; methods: {_names(self.methods)}")
        if self.methods[name].needs_lf_at_inference:
            raise ValueError(
                f"candidate: {name!r} needs a low-fidelity calculation at inference; it is compared with the methods "
                "that do not: name one of these"
            )
        if not self.rivals:
            raise ValueError(f"candidate: no other method than {name!r} does without a calculation at inference")

    def _check_trials(self) -> None:
        wanted = math.prod(len(values) for values in self.tune.values())
        for name, method in self.methods.items():
            tune = self._tune(name)
            there = math.prod(len(values) for values in tune.values())
            if method.refit is None and there != wanted:
                raise ValueError(
                    f"methods.{name}.tune: has {there} trials, the study's has {wanted}; every method has as many"
                )
            twice = next((n for n in tune if n in method.changes), None)
            if twice is not None:
                raise ValueError(f"methods.{name}.changes: {twice} is tuned: leave it out of the changes")

    def _tune(self, method: str) -> Tune:
        own = self.methods[method]
        return {} if own.refit is not None else self.tune if own.tune is None else own.tune

    def trials(self, method: str) -> list[dict[str, Any]]:
        """Return dotted name → value of each trial of a method's cells; one without values where nothing is tuned."""
        tune = self._tune(method)
        names = sorted(tune)
        return [
            dict(zip(names, values, strict=True)) for values in itertools.product(*(tune[name] for name in names))
        ]  # fmt: skip

    @property
    def rivals(self) -> list[str]:
        """The methods that the candidate is compared with: those without a low-fidelity calculation at inference."""
        return [n for n, m in self.methods.items() if n != self.candidate and not m.needs_lf_at_inference]

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
