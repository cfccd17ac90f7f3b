"""Schema of a cluster YAML: where and how a job runs."""

from typing import Any, Literal

from pydantic import Field, model_validator

from mffm.config.base import Schema


class ClusterConfig(Schema):
    """What the launcher needs to know of a machine."""

    executor: Literal["slurm", "local"] = Field(description="local: processes of this machine, without SLURM")
    nodes: int = Field(1, ge=1)
    tasks_per_node: int = Field(1, ge=1, description="ranks of a node; with GPUs, one a GPU")
    gpus_per_node: int = Field(0, ge=0, description="0: train on CPUs")
    cpus_per_task: int = Field(1, ge=1)
    time_minutes: int = Field(60, ge=1, description="time limit of the job; at the limit it saves and is requeued")
    warn_seconds: int = Field(
        300, ge=10, description="how long before the time limit the job is told to save (slurm; local: 30 s)"
    )
    max_timeouts: int = Field(
        100, ge=0, description="how many times a job that came to its time limit is requeued; preemptions do not count"
    )
    slurm: dict[str, Any] = Field(
        default_factory=dict, description="further parameters of submitit, e.g. slurm_partition, slurm_account"
    )
    setup: list[str] = Field(default_factory=list, description="shell lines before the job, e.g. module load")
    environment: dict[str, str] = Field(
        default_factory=dict, description="variables of the ranks, e.g. NCCL_SOCKET_IFNAME"
    )
    python: str | None = Field(
        None, description="command that runs Python on the nodes (slurm), e.g. `apptainer exec --nv mffm.sif python`"
    )

    @model_validator(mode="after")
    def _checks(self) -> "ClusterConfig":
        if self.gpus_per_node and self.tasks_per_node != self.gpus_per_node:
            raise ValueError(
                f"one rank drives one GPU: tasks_per_node is {self.tasks_per_node}, gpus_per_node {self.gpus_per_node}"
            )
        if self.executor == "local":
            if self.nodes > 1:
                raise ValueError(f"executor local is one machine: nodes is {self.nodes}; use executor slurm, or 1")
            for name in ("slurm", "python"):
                if getattr(self, name):
                    raise ValueError(f"{name} needs executor: slurm")
        for name in self.slurm:
            if not name.startswith("slurm_"):
                raise ValueError(f"slurm.{name}: submitit's names for SLURM start with slurm_, e.g. slurm_{name}")
        return self
