"""Schema of an active-learning YAML: choose, label, fine-tune, judge; again and again."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mffm.config.base import Schema

# What the loop sets in the fine-tuning recipe.
OWN = ("name", "run", "seed", "start_from", "data.store", "data.layers", "data.fingerprint")


class ChoiceConfig(Schema):
    """How structures are chosen; as the options of ``mffm select``."""

    by: Literal["random", "fps", "lcmd", "maxdet", "uncertainty", "disagreement"] = "lcmd"
    against: str | None = Field(None, description="of disagreement: the level to compare with")
    cost: str | None = Field(None, description="atoms^p, e.g. atoms^2.4: prefer what gains more for its cost")
    per_formula: int | None = Field(None, ge=1, description="of one composition in a round, at most")
    elements: list[str] = Field(default_factory=list, description="only structures of these; all where empty")
    compositions_first: bool = Field(
        True,
        description="first structures with an element, or a ratio of elements, that no training labels have",
    )
    max_std: float | None = Field(
        None, gt=0, description="meV/atom; what is less certain is never chosen: often it is broken"
    )

    @model_validator(mode="after")
    def _checks(self) -> "ChoiceConfig":
        if (self.by == "disagreement") != (self.against is not None):
            raise ValueError("by: disagreement and against: <level> belong together")
        return self

    @property
    def needs_uncertainty(self) -> bool:
        """Whether a release must have a last-layer uncertainty."""
        return self.by == "uncertainty" or self.max_std is not None


class LabelConfig(Schema):
    """How labels are computed; as the options of ``mffm label``."""

    level: str = Field(min_length=1, description="as `mffm label --level` takes it, e.g. pbe, store:FOLDER@pbe")
    fidelity: str | None = Field(None, description="name of the labels' fidelity; the level's where not given")
    time_limit: float | None = Field(None, gt=0, description="seconds that a structure may take")
    memory_limit: float | None = Field(None, gt=0, description="GB that its process may use")


class ActiveConfig(Schema):
    """A closed loop over the structures of one store."""

    name: Annotated[str, Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")]
    release: str = Field(min_length=1, description="that every fine-tuning starts from, and that chooses first")
    asked: str = Field(
        min_length=1, description="its level at which structures are compared while it does not know the new one"
    )
    store: str = Field(min_length=1, description="of the structures; gets the labels as layers")
    label: LabelConfig
    select: ChoiceConfig = ChoiceConfig()
    rounds: int = Field(ge=1)
    n: int = Field(ge=1, description="structures that a round labels")
    validation: int = Field(
        ge=2, description="structures of the validation split, at random, labelled first: they choose weights"
    )
    test: int | None = Field(
        None, ge=2, description="structures of the test split, at random, labelled first and judged; None: all"
    )
    recipe: str = Field(min_length=1, description="fine-tuning recipe, relative to this YAML")
    changes: dict[str, Any] = Field(default_factory=dict, description="dotted name of the recipe → value")
    seed: int = Field(0, description="of the random choices and of the fine-tunings")

    @model_validator(mode="after")
    def _checks(self) -> "ActiveConfig":
        for name in self.changes:
            if name in OWN:
                raise ValueError(f"changes: {name} is set by the loop itself")
        return self
