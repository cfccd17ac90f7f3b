"""Schema of a sweep YAML: W&B's own format, of which the local controller understands the part below."""

import math
from typing import Any, Literal

from pydantic import Field, model_validator

from mffm.config.base import Schema


class Metric(Schema):
    """What a trial is judged by: a metric name of the run, at its best validation."""

    name: str = Field(min_length=1, description="as in metrics.jsonl, e.g. val/pbe/forces_mae")
    goal: Literal["minimize", "maximize"] = "minimize"


class Parameter(Schema):
    """One dotted name of the recipe and the values that it may take."""

    value: Any = Field(None, description="fixed")
    values: list[Any] | None = Field(None, min_length=1, description="one of these")
    min: float | None = None
    max: float | None = None
    q: float | None = Field(None, gt=0, description="step of a quantised distribution")
    distribution: (
        Literal["constant", "categorical", "int_uniform", "uniform", "q_uniform", "log_uniform_values", "log_uniform"]
        | None
    ) = Field(None, description="log_uniform: min and max are exponents of e, as W&B has it")

    @model_validator(mode="before")
    @classmethod
    def _names_its_kind(cls, content: Any) -> Any:
        if not isinstance(content, dict):
            raise ValueError("expected value, values, or min and max")
        if "parameters" in content:
            raise ValueError("nested parameters: give the dotted name instead, e.g. optim.lr")
        if "distribution" not in content:
            # Written here and not deduced later: only the YAML tells `value: null` from no value, and 1 from 1.0.
            kind = "constant" if "value" in content else "categorical" if "values" in content else None
            if kind is None:
                whole = all(isinstance(content.get(k), int) for k in ("min", "max"))
                kind = "int_uniform" if whole else "uniform"
            content = {**content, "distribution": kind}
        return content

    @model_validator(mode="after")
    def _checks(self) -> "Parameter":
        if self.distribution == "categorical" and self.values is None:
            raise ValueError("categorical needs values")
        if self.distribution not in ("constant", "categorical"):
            if self.min is None or self.max is None:
                raise ValueError(f"{self.distribution} needs min and max (or give value or values)")
            if self.min >= self.max:
                raise ValueError(f"min {self.min:g} is not below max {self.max:g}")
            if self.distribution == "log_uniform_values" and self.min <= 0:
                raise ValueError("log_uniform_values needs min > 0")
        return self

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest value of a distribution over a range."""
        assert self.min is not None
        assert self.max is not None
        return (math.exp(self.min), math.exp(self.max)) if self.distribution == "log_uniform" else (self.min, self.max)


class EarlyTermination(Schema):
    """Hyperband as W&B has it: asynchronous successive halving over the validations of a trial."""

    type: Literal["hyperband"]
    min_iter: int | None = Field(None, ge=1, description="validations before the first decision")
    max_iter: int | None = Field(None, ge=1, description="with s: min_iter = max_iter / eta^s")
    s: int | None = Field(None, ge=1)
    eta: int = Field(3, ge=2, description="one in eta goes on")
    strict: bool = False

    @property
    def first(self) -> int:
        """Validations before the first decision."""
        if self.min_iter is not None:
            return self.min_iter
        assert self.max_iter is not None
        assert self.s is not None
        return max(1, round(self.max_iter / self.eta**self.s))

    @model_validator(mode="after")
    def _checks(self) -> "EarlyTermination":
        if self.min_iter is None and (self.max_iter is None or self.s is None):
            raise ValueError("hyperband needs min_iter, or max_iter and s")
        return self


class SweepConfig(Schema):
    """A W&B sweep. ``program``, ``command``, ``project`` and ``entity`` are for `wandb sweep` and `wandb agent`."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="group of the trials")
    description: str | None = None
    project: str | None = None
    entity: str | None = None
    program: str | None = None
    command: list[str] | None = None
    method: Literal["grid", "random", "bayes"]
    metric: Metric
    parameters: dict[str, Parameter] = Field(min_length=1)
    early_terminate: EarlyTermination | None = None
    run_cap: int | None = Field(None, ge=1, description="trials, where the command line does not say")

    @model_validator(mode="after")
    def _checks(self) -> "SweepConfig":
        for name in ("run", "log.group"):
            if name in self.parameters:
                raise ValueError(f"parameters: {name} is set by the sweep itself")
        if self.method == "grid":
            ranges = [n for n, p in self.parameters.items() if p.distribution not in ("constant", "categorical")]
            ranges = [n for n in ranges if self.parameters[n].distribution not in ("int_uniform", "q_uniform")]
            if ranges:
                raise ValueError(f"method grid: {', '.join(ranges)} is continuous; give values, or int or q steps")
        return self
