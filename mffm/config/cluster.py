"""Schema of a cluster YAML: where and how a job runs."""

from typing import Literal

from pydantic import Field

from mffm.config.base import Schema


class ClusterConfig(Schema):
    """What submitit needs to know of a machine."""

    executor: Literal["slurm", "local"] = Field(description="local: processes of this machine, without SLURM")
    nodes: int = Field(1, ge=1)
    tasks_per_node: int = Field(1, ge=1, description="ranks of a node: its GPUs, or 1")
    gpus_per_node: int = Field(0, ge=0)
    cpus_per_task: int = Field(1, ge=1)
    time_minutes: int = Field(60, ge=1)
    slurm: dict[str, str | int] = Field(
        default_factory=dict, description="further submitit parameters, e.g. slurm_partition, slurm_account"
    )
    setup: list[str] = Field(default_factory=list, description="shell lines before the job, e.g. module load")
