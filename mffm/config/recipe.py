"""Schema of a recipe: the YAML of one run."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mffm.config.base import Schema
from mffm.config.model import ModelConfig
from mffm.keys import FORCES, STRESS, Property

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Below1 = Annotated[float, Field(ge=0, lt=1)]


class PoolConfig(Schema):
    """The (frame, fidelity) pairs of one fidelity: the unit of mixing."""

    fidelity: str = Field(min_length=1)
    source: str | None = Field(None, description="only frames of this source; all where not given")
    split: str = "train"
    properties: list[Property] = Field(
        default=["energy", "forces"], min_length=1, description="labels that the loss uses"
    )
    only: str | None = Field(
        None,
        description="file of the frames: ids, one a line (.txt), or structures as `mffm select` writes",
    )
    max_frames: int | None = Field(
        None, ge=1, description="use only so many frames, chosen by a hash of the seed: nested for growing numbers"
    )
    seed: int = Field(0, description="of the choice of max_frames")
    elements_first: bool = Field(
        False, description="max_frames takes frames that add an element before others: few labels know every element"
    )
    weight: Positive | dict[Annotated[int, Field(ge=0)], NonNegative] | None = Field(
        None,
        description="share of the draws, or step → share from that step on, the first at 0; without it the temperature "
        "decides",
    )

    @field_validator("weight")
    @classmethod
    def _begins_at_0(cls, weight: Any) -> Any:
        if isinstance(weight, dict) and 0 not in weight:
            raise ValueError(
                f"a share for step 0 is missing; given for {', '.join(map(str, sorted(weight))) or 'none'}"
            )
        return weight


class FinishConfig(Schema):
    """The last steps of a run, which read some fidelities alone.

    The best weights (``train.best``) are those that this part begins with, or later ones; ``train.patience`` counts
    from there.
    """

    fidelities: list[str] = Field(min_length=1, description="that the last steps read, at the shares that they have")
    part: float = Field(1 / 3, gt=0, lt=1, description="of train.steps, at most")
    passes: float = Field(
        100,
        gt=0,
        description="through the frames of these fidelities on average, at most: the fewer, the later it begins",
    )


class PlanConfig(Schema):
    """What a step reads. The global batch depends on nothing else, above all not on the number of ranks."""

    pools: list[PoolConfig] = Field(min_length=1)
    temperature: float = Field(
        1.0, ge=1.0, description="share of a pool ∝ size^(1/temperature): 1 proportional, large uniform"
    )
    finish: FinishConfig | None = Field(
        None, description="fidelities that the last part of the run reads alone; None: the run ends as it goes on"
    )
    paired: bool = Field(False, description="draw a frame at all its fidelities together")
    edge_budget: int = Field(ge=1, description="edges of the global batch")
    atom_budget: int | None = Field(None, ge=1, description="atoms of the global batch")
    edges_per_microbatch: int | None = Field(
        None, ge=1, description="edges that fit a device; None: one microbatch a step"
    )
    block_frames: int | None = Field(
        None,
        ge=1,
        description="frames that lie together in the store and are drawn near each other, for file systems on which "
        "reading at random is slow: steps mix 64 such blocks at a time, every frame still comes once a pass; "
        "None: frames in any order",
    )
    oversize: Literal["error", "single", "skip"] = Field(
        "error", description="a frame over the budget: stop, be a batch of its own, be left out"
    )

    @model_validator(mode="after")
    def _checks(self) -> "PlanConfig":
        if self.finish is None:
            return self
        if self.paired:
            raise ValueError(
                "finish needs paired: false: a frame drawn at all its fidelities is not drawn at some alone"
            )
        known = {pool.fidelity for pool in self.pools}
        for name in self.finish.fidelities:
            if name not in known:
                raise ValueError(
                    f"finish.fidelities: {name!r} has no pool; those of the pools are {', '.join(sorted(known))}"
                )
        return self


class DataSection(Schema):
    """Where the frames come from."""

    store: str = Field(min_length=1)
    layers: list[str] | None = Field(
        None, description="label layers that the run sees; None: all that the store has when the run starts"
    )
    fingerprint: str | None = Field(
        None, description="fingerprint of the store with these layers; another one is an error"
    )
    plan: PlanConfig
    loader_threads: int | None = Field(
        None, ge=1, description="that make batches ahead of the training; None: up to 4 beside a GPU, else 1"
    )
    neighbors: Literal["cpu", "device"] = Field(
        "cpu",
        description="where training batches get their neighbor lists; device: on the GPU that trains, the same lists; "
        "a batch with systems too large to try all their pairs gets them on the CPU",
    )
    validation_split: str = "val"
    validation_max_frames: int | None = Field(None, ge=1)


class ReferencesConfig(Schema):
    """Element references, per fidelity."""

    method: Literal["auto", "fit", "paired"] = Field(
        "auto",
        description="fit: ridge on the fidelity's own labels; paired: the anchor's plus a fit of the paired "
        "residual; auto: paired where the fit is too small",
    )
    anchor: str | None = Field(None, description="fidelity that `paired` builds on; None: the one with the most labels")
    given: dict[str, dict[str, float]] = Field(
        default_factory=dict, description="fidelity → element symbol → eV; not fitted"
    )
    refit: bool = Field(
        True,
        description="of a fidelity that starts from another one (model.init_from): fitted on what that one's "
        "predictions leave of its labels; false keeps that one's, so that the weights must learn the difference",
    )


class TermConfig(Schema):
    """One property in the loss."""

    weight: float = Field(1.0, ge=0)
    form: Literal["mae", "mse", "huber", "l2norm"] = Field(
        "huber", description="l2norm: length of the error vector of an atom's force"
    )
    delta: float = Field(
        0.01, gt=0, description="huber: where quadratic becomes linear, in the property's unit (energy: eV/atom)"
    )


class LossConfig(Schema):
    """Weighted sums over live labels, divided once by a global count."""

    energy: TermConfig = TermConfig()
    forces: TermConfig = TermConfig()
    stress: TermConfig = TermConfig()
    weights: dict[str, dict[Property, NonNegative]] = Field(
        default_factory=dict, description="fidelity → property → factor on its labels"
    )
    normalisation: Literal["pooled", "per_fidelity", "expected"] = Field(
        "pooled",
        description="divide by the count of a property over all fidelities, of each (fidelity, property), or by "
        "the plan's mean count of each",
    )

    @model_validator(mode="after")
    def _checks(self) -> "LossConfig":
        for name in ("energy", "stress"):
            if getattr(self, name).form == "l2norm":
                raise ValueError(f"{name}: l2norm is the length of a force error; use mae, mse or huber")
        return self


class OptimConfig(Schema):
    """The optimiser, with warm-up and a cosine."""

    kind: Literal["adamw", "soap"] = Field(
        "adamw",
        description="soap: matrices in the eigenbasis of their gradients' second moments, AdamW for all else; at "
        "deepspeed.zero_stage 0 only",
    )
    lr: float = Field(2e-3, gt=0)
    final_lr_fraction: float = Field(0.01, ge=0, le=1)
    warmup_steps: int = Field(100, ge=0)
    finish_factor: float = Field(
        0.4, gt=0, description="on the learning rate of the last part of the run, data.plan.finish, where there is one"
    )
    betas: tuple[Below1, Below1] | None = Field(
        None, description="decays of the moments; None: 0.95, 0.95 of soap, else 0.9, 0.999"
    )
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(1e-3, ge=0)
    clip: float = Field(10.0, gt=0, description="global gradient norm")
    ema_decay: float = Field(0.995, ge=0, lt=1)
    precondition_every: int = Field(10, ge=1, description="soap: steps between updates of the eigenbases")
    max_precondition_dim: int = Field(
        1024, ge=1, description="soap: a longer side of a matrix has no basis of its own; its cost grows as the cube"
    )

    @model_validator(mode="after")
    def _checks(self) -> "OptimConfig":
        for key in ("precondition_every", "max_precondition_dim"):
            value = getattr(self, key)
            if self.kind != "soap" and value != type(self).model_fields[key].default:
                raise ValueError(f"{key}: {value} is of kind: soap, and kind is {self.kind}; leave it out")
        return self


class TrainSection(Schema):
    """How long, how often, how good."""

    steps: int = Field(ge=1)
    validate_every: int = Field(200, ge=1)
    save_every: int = Field(200, ge=1)
    keep: int = Field(2, ge=1, description="checkpoints kept besides the best")
    best: str = Field(
        "val/loss", description="metric that decides the best weights, e.g. val/pbe/forces_mae; the smaller the better"
    )
    patience: int | None = Field(None, ge=1, description="validations without a better one before the run stops")
    spike_factor: float | None = Field(
        None,
        gt=1,
        description="a loss of so many times the median of the last 100 steps stops the run; one not finite always",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads of a rank; None: torch's default")
    precision: Literal["float32", "tf32", "bfloat16"] = Field(
        "float32",
        description="of the matrix products in training. tf32: all of them on a GPU that has it; bfloat16: the dense "
        "products on atoms. Weights, gradients, geometry, densities, heads and energies stay float32 in either",
    )
    activation_checkpointing: bool = Field(
        False, description="keep only each layer's inputs and compute the rest again: a fraction of the memory"
    )
    compile: bool = Field(
        False,
        description="training steps as one function that a C++ compiler makes at the start, minutes the first time and "
        "seconds from then on; faster steps, the same numbers up to rounding",
    )
    log_every: int = Field(20, ge=1)
    preflight: bool = Field(
        True,
        description="before the first step, check versions, all-reduce, disk and the memory of the largest batch; "
        "seconds",
    )
    collective_timeout_seconds: float = Field(
        600.0,
        gt=0,
        description="a rank that waits longer for the others ends with a report; above the slowest step, validation "
        "or save, as rank 0 alone writes while the others wait",
    )

    @model_validator(mode="after")
    def _checks(self) -> "TrainSection":
        if self.compile and self.activation_checkpointing:
            raise ValueError(
                "compile and activation_checkpointing: a compiler takes what is computed again for the same and keeps "
                "it; choose one"
            )
        return self


class DeepSpeedSection(Schema):
    """What of DeepSpeed the recipe chooses; the rest of its JSON is generated."""

    zero_stage: Literal[0, 1, 2, 3] = Field(
        0, description="0: replicated; 1: optimiser state sharded; 2: and gradients; 3: and weights between steps"
    )
    offload: Literal["none", "optimizer", "optimizer_and_parameters"] = Field(
        "none",
        description="to the memory of the CPU: AdamW's state and its update (stages 1 to 3), and the weights between "
        "steps (stage 3)",
    )
    overrides: dict[str, Any] = Field(default_factory=dict, description="merged over the generated JSON, for experts")

    @model_validator(mode="after")
    def _checks(self) -> "DeepSpeedSection":
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError(
                "offload: optimizer needs zero_stage 1, 2 or 3: at 0 DeepSpeed leaves the optimiser state where it is"
            )
        if self.offload == "optimizer_and_parameters" and self.zero_stage < 3:
            raise ValueError(
                f"offload: optimizer_and_parameters needs zero_stage 3: at {self.zero_stage} every rank holds all "
                "weights on its device; take offload: optimizer or zero_stage: 3"
            )
        return self


class LogSection(Schema):
    """Where metrics go besides metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with a login, else offline"
    )
    project: str = "mffm"
    group: str | None = Field(None, description="of the run in W&B, e.g. of seeds; None: the name of the recipe")
    tensorboard: bool = Field(False, description="also write event files to the folder tensorboard of the run")


class FineTuneSection(Schema):
    """How a run that starts from a release changes it; docs/finetune.md."""

    mode: Literal["full", "lora", "frozen", "heads"] = Field(
        "full",
        description="what is trained. heads: what is the trained fidelities' own in heads and conditioning, so that "
        "the others stay as they are; frozen: heads and conditioning, of all fidelities and shared; lora: these, and "
        "low-rank updates of the backbone's matrices; full: everything",
    )
    rank: int = Field(8, ge=1, description="lora: of the updates")
    heads_first: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the steps, at first, in which only what fidelities have of their own in heads and "
        "conditioning is trained, on the new labels: else what they share takes up the large first errors, and all "
        "fidelities pay",
    )
    replay: Literal["none", "data", "predictions"] = Field(
        "none",
        description="train the release's other fidelities too: on their labels in the store, or on what the release "
        "predicts for the training structures",
    )
    replay_share: float = Field(0.5, gt=0, lt=1, description="replay: of the draws")
    replay_frames: int | None = Field(
        1000, ge=1, description="replay: structures of each of these fidelities, chosen by a hash; None: all"
    )
    elements: dict[str, str] = Field(
        default_factory=dict,
        description="element that the release does not know → one that it knows, whose embedding it starts from",
    )
    fidelities: list[str] = Field(
        default_factory=list, description="of the release, in its order; filled in when the run starts"
    )

    @model_validator(mode="after")
    def _checks(self) -> "FineTuneSection":
        fields = type(self).model_fields
        for key, wanted in (("rank", self.mode == "lora"), ("replay_share", self.replay != "none")):
            if not wanted and getattr(self, key) != fields[key].default:
                belongs = "mode: lora" if key == "rank" else "replay: data or predictions"
                raise ValueError(f"{key}: {getattr(self, key)} is of {belongs}; leave it out")
        return self


class Recipe(Schema):
    """The YAML of one run."""

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    run: str | None = Field(None, description="folder of the run; None: runs/<name>")
    seed: int = 0
    start_from: str | None = Field(None, description="release or run whose weights the run starts from (fine-tuning)")
    fine_tune: FineTuneSection | None = Field(
        None,
        description="with start_from: all fidelities of the release stay, new ones are added; without this section the "
        "run has those of its pools alone",
    )
    data: DataSection
    references: ReferencesConfig = ReferencesConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainSection
    deepspeed: DeepSpeedSection = DeepSpeedSection()
    log: LogSection = LogSection()

    @model_validator(mode="after")
    def _checks(self) -> "Recipe":
        for i, pool in enumerate(self.data.plan.pools):
            shares = pool.weight if isinstance(pool.weight, dict) else {}
            if shares and not any(share for step, share in shares.items() if step < self.train.steps):
                raise ValueError(
                    f"data.plan.pools.{i}: {pool.fidelity!r} has no weight above 0 in any of the "
                    f"{self.train.steps} steps (train.steps); leave the pool out, or let it begin earlier"
                )
        finish = self.data.plan.finish
        if finish is not None and not any(self.train.best.startswith(f"val/{name}/") for name in finish.fidelities):
            raise ValueError(
                f"train.best: {self.train.best} also judges what the last part of the run, data.plan.finish, no longer "
                f"reads, and would throw it away; take a metric of its own, such as val/{finish.fidelities[0]}/loss"
            )
        if self.fine_tune is not None and not self.start_from:
            raise ValueError("fine_tune needs start_from, a release or a run: use `mffm finetune RELEASE RECIPE`")
        if self.fine_tune is not None and self.model.forces == "direct":
            raise ValueError(
                "fine_tune is for conservative forces; a direct release becomes conservative by start_from alone"
            )
        if self.model.init_from and not self.start_from:
            raise ValueError(
                "model.init_from needs start_from; in a fresh run heads start alike by model.heads.init_from"
            )
        if not self.references.refit and not self.model.init_from and self.fine_tune is None:
            raise ValueError(
                "references.refit: false is for a fidelity that starts from another one: give model.init_from, or "
                "leave it out"
            )
        if self.optim.kind != "adamw" and (self.deepspeed.zero_stage > 0 or self.deepspeed.offload != "none"):
            raise ValueError(
                f"optim.kind: {self.optim.kind} needs deepspeed.zero_stage: 0 (now {self.deepspeed.zero_stage}) and no "
                "offload: from stage 1 on a rank holds a flat piece of the weights, not the matrices; "
                "take stage 0, or optim.kind: adamw"
            )
        if self.train.compile and (self.model.forces == "direct" or self.model.d3):
            what = "model.forces: direct" if self.model.forces == "direct" else "model.d3"
            raise ValueError(
                f"train.compile is for conservative forces of learned terms, not for {what}; leave one out"
            )
        if self.train.compile and self.model.backbone.kind != "density":
            raise ValueError(
                f"train.compile is for the density backbone, this one is {self.model.backbone.kind!r}: a step is "
                "compiled over edges in blocks, which no other reads; set it to false"
            )
        fidelities = self.fidelities
        named: dict[str, set[str]] = {
            "loss.weights": set(self.loss.weights),
            "references.given": set(self.references.given),
            "references.anchor": {self.references.anchor} if self.references.anchor else set(),
            "model.d3": set(self.model.d3),
            "model.heads.init_from": set(self.model.heads.init_from) | set(self.model.heads.init_from.values()),
            "model.heads.base": {self.model.heads.base} if self.model.heads.base else set(),
        }
        for place, names in named.items():
            for name in names:
                if name not in fidelities:
                    raise ValueError(
                        f"{place} names fidelity {name!r}, which no pool has; pools have: {', '.join(fidelities)}"
                    )
        self._check_direct()
        return self

    def _check_direct(self) -> None:
        """Every direct head needs labels: it would be random numbers without."""
        if self.model.forces != "direct":
            return
        trained = {(pool.fidelity, prop) for pool in self.data.plan.pools for prop in pool.properties}
        own = self.model.heads.kind == "independent"
        for prop in (FORCES, STRESS) if self.model.direct.stress else (FORCES,):
            lacking = [f for f in self.fidelities if (f, prop) not in trained]
            if getattr(self.loss, prop).weight == 0 or (lacking if own else len(lacking) == len(self.fidelities)):
                raise ValueError(
                    f"model.forces: direct has a head for {prop}"
                    + (" of each fidelity" if own else "")
                    + f", but nothing trains it{f' at {lacking[0]!r}' if own and lacking else ''}: give a pool "
                    f"{prop} among its properties and loss.{prop} a weight"
                    + (", or set model.direct.stress: false" if prop == STRESS else "")
                )
        if not self.model.direct.stress and any(prop == STRESS for _, prop in trained):
            raise ValueError(
                "a pool trains stress, but direct forces have no stress head: set model.direct.stress: true, or take "
                "stress out of the pool's properties"
            )

    @property
    def heads_first_steps(self) -> int:
        """Steps of `fine_tune.heads_first`."""
        return round(self.fine_tune.heads_first * self.train.steps) if self.fine_tune is not None else 0

    @property
    def fidelities(self) -> list[str]:
        """Fidelities of the potential: those of a release that is fine-tuned, then the pools' by their first pool."""
        kept = self.fine_tune.fidelities if self.fine_tune is not None else []
        return list(dict.fromkeys([*kept, *self.trained]))

    @property
    def trained(self) -> list[str]:
        """Fidelities of the pools, in the order of their first pool."""
        return list(dict.fromkeys(pool.fidelity for pool in self.data.plan.pools))

    @property
    def run_folder(self) -> str:
        return self.run or f"runs/{self.name}"
