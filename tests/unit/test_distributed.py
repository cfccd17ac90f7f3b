"""Ranks that do not find each other end with one message that names the address; collectives have the given time."""

import socket
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mffm import distributed
from mffm.distributed import Ranks
from mffm.errors import InputError


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A free port, as MASTER_PORT of this machine; the process group is left afterwards."""
    free = distributed._free_port()
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(free))):
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")  # set by start, restored by monkeypatch
    constants = dist.distributed_c10d
    monkeypatch.setattr(constants, "default_pg_timeout", constants.default_pg_timeout)
    monkeypatch.setattr(constants, "default_pg_nccl_timeout", constants.default_pg_nccl_timeout)
    yield free
    distributed.stop()


def test_nobody_answers(port: int):
    started = time.monotonic()
    with pytest.raises(InputError, match=rf"127\.0\.0\.1:{port} .*rank 1 on .* gets no answer from rank 0 within 1 s"):
        distributed.start(Ranks(1, 2, 1), rendezvous_seconds=1.0)
    assert time.monotonic() - started < 20


def test_a_port_that_is_taken(port: int):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(InputError, match="rank 0 cannot listen there"):
            distributed.start(Ranks(0, 2, 0), rendezvous_seconds=1.0)


def test_ranks_that_do_not_come_are_named(port: int):
    with pytest.raises(InputError, match=r"rank\(s\) 1, 2 of 3 did not come within 1 s"):
        distributed.start(Ranks(0, 3, 0), rendezvous_seconds=1.0)


def test_every_group_has_the_timeout(port: int):
    """Also those that DeepSpeed makes, without naming a timeout."""
    distributed.start(Ranks(), collective_seconds=90.0, rendezvous_seconds=60.0)
    for group in (dist.group.WORLD, dist.new_group(ranks=[0])):
        assert group is not None
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=90)
