"""Ranks: who this process is, and the few collectives that mffm needs. torch is imported only when they are used."""

import ctypes
import json
import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from mffm.errors import InputError
from mffm.failures import node_name

if TYPE_CHECKING:
    import torch

COLLECTIVE_SECONDS = 600.0  # a rank that died must not hang the others for ever
RENDEZVOUS_SECONDS = 120.0  # srun starts the ranks of a job within seconds, a slow file system within a minute


@dataclass(frozen=True)
class Process:
    """Where a rank runs."""

    host: str
    pid: int


_store: "torch.distributed.Store | None" = None
_processes: list[Process] = []


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of the job."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks_from_environment(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Return rank and world size as torchrun, or else SLURM's srun, gives them; one process where neither does."""
    for rank, world, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        if rank in environment and world in environment:
            found = Ranks(int(environment[rank]), int(environment[world]), int(environment.get(local, "0")))
            if not 0 <= found.rank < found.world_size:
                raise InputError(
                    f"{rank}={found.rank} is not below {world}={found.world_size}; start the job with torchrun or srun"
                )
            return found
    return Ranks()


def meet(ranks: Ranks, seconds: float = RENDEZVOUS_SECONDS) -> "torch.distributed.Store":
    """Return the store at MASTER_ADDR:MASTER_PORT through which the ranks find each other; rank 0 or torchrun hosts it.

    Raises:
        InputError: no address, a port that is taken, or nobody answers within ``seconds``.
    """
    import torch.distributed as dist

    global _store
    if _store is not None:
        return _store
    os.environ.update(RANK=str(ranks.rank), WORLD_SIZE=str(ranks.world_size), LOCAL_RANK=str(ranks.local_rank))
    if ranks.world_size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", str(_free_port()))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise InputError(
                f"{ranks.world_size} ranks but {name} is not set; torchrun and launch.submit set it, for srun export "
                "MASTER_ADDR (the first node's name) and MASTER_PORT (any free port)"
            )
    if not os.environ["MASTER_PORT"].isdigit():
        raise InputError(f"MASTER_PORT={os.environ['MASTER_PORT']}: expected a number; export any free port")
    is_host = ranks.is_main and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        found = dist.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), ranks.world_size, is_host,
            timedelta(seconds=seconds), wait_for_workers=False, multi_tenant=True,
        )  # fmt: skip
        # torchrun's store outlives the ranks that it starts again (--max-restarts)
        _store = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", found)
    except (RuntimeError, ValueError) as error:
        if is_host:
            cause = "rank 0 cannot listen there; is another job using the port? Give another MASTER_PORT"
        else:
            cause = (
                f"rank {ranks.rank} on {node_name()} gets no answer from rank 0 within {seconds:g} s; does rank 0 run, "
                "does this node resolve the name, may it connect to the port (firewall)?"
            )
        raise InputError(f"rendezvous at {_place()} failed: {cause} ({_first_line(error)})") from error
    return _store


def start(
    ranks: Ranks, collective_seconds: float = COLLECTIVE_SECONDS, rendezvous_seconds: float = RENDEZVOUS_SECONDS
) -> "torch.device":
    """Join the process group (nccl with GPUs, else gloo) and return this rank's device.

    A collective that takes longer than ``collective_seconds`` is an error on every rank that waits in it.

    Raises:
        InputError: the ranks do not find each other within ``rendezvous_seconds``.
    """
    import torch
    import torch.distributed as dist

    use_gpu = torch.cuda.is_available()
    if use_gpu:
        torch.cuda.set_device(ranks.local_rank)
        # A collective that runs into its timeout aborts the process; without these it may spin on the GPU for ever.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
        os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "1")
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        store = meet(ranks, rendezvous_seconds)
        _wait_for_all(store, ranks, rendezvous_seconds)
        timeout = timedelta(seconds=collective_seconds)
        # DeepSpeed makes process groups of its own with torch's default, which is 30 minutes for gloo.
        dist.distributed_c10d.default_pg_timeout = dist.distributed_c10d.default_pg_nccl_timeout = timeout
        try:
            dist.init_process_group(
                "nccl" if use_gpu else "gloo", store=dist.PrefixStore("mffm", store), rank=ranks.rank,
                world_size=ranks.world_size, timeout=min(timeout, timedelta(seconds=rendezvous_seconds)),
            )  # fmt: skip
        except RuntimeError as error:
            raise InputError(
                f"rendezvous at {_place()}: all {ranks.world_size} ranks came, but rank {ranks.rank} on {node_name()} "
                "cannot connect to another; name the network interface with GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME "
                f"({_first_line(error)})"
            ) from error
        dist.distributed_c10d._set_pg_timeout(timeout)
    return torch.device("cuda", ranks.local_rank) if use_gpu else torch.device("cpu")


def _wait_for_all(store: "torch.distributed.Store", ranks: Ranks, seconds: float) -> None:
    """Wait until every rank has said where it runs.

    Raises:
        InputError: naming the ranks that did not.
    """
    from torch.distributed import DistError

    global _processes
    keys = [f"mffm/process/{rank}" for rank in range(ranks.world_size)]
    try:
        store.set(keys[ranks.rank], json.dumps([node_name(), os.getpid()]))
        try:
            store.wait(keys, timedelta(seconds=seconds))
        except DistError:
            missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
            if missing:
                some = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
                raise InputError(
                    f"rendezvous at {_place()}: rank(s) {some} of {ranks.world_size} did not come within {seconds:g} s "
                    "of the others; look at their output: they did not start, or died, or cannot reach that address"
                ) from None
        _processes = [Process(*json.loads(store.get(key))) for key in keys]
    except DistError as error:
        raise InputError(
            f"rendezvous at {_place()}: rank {ranks.rank} lost the connection; rank 0 has ended or cannot be reached "
            f"any more, look at its output ({_first_line(error)})"
        ) from error


def processes() -> list[Process]:
    """Return where every rank runs, by rank; empty before ``start``."""
    return _processes


def named_by_main(ranks: Ranks, key: str, value: str) -> str:
    """Return rank 0's value on every rank, through the store; after ``start``."""
    if ranks.world_size == 1:
        return value
    store = meet(ranks)
    if ranks.is_main:
        store.set(key, value)
    return store.get(key).decode()


def _place() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR:MASTER_PORT)"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def stop() -> None:
    """Leave the process group."""
    import torch.distributed as dist

    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def any_rank(flag: bool, device: "torch.device") -> bool:
    """Return on every rank whether the flag is set on any; one small all-reduce."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    value = torch.tensor([float(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def sum_over_ranks(value: "torch.Tensor") -> "torch.Tensor":
    """Return the sum of a tensor over all ranks."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        value = value.clone()
        dist.all_reduce(value)
    return value


def barrier() -> None:
    """Wait for all ranks."""
    import torch.distributed as dist

    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def tune_allocator() -> None:
    """Keep freed memory in the process (glibc on Linux).

    By default glibc returns every large tensor to the kernel when it is freed, and page faults then dominate large
    elementwise operations on CPU: 39 → 7.5 CPU ms for a 69 MB silu here. The price is that the resident size does not
    shrink.
    """
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, 2**31 - 1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
