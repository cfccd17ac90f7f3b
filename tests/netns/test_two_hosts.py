"""Two ranks in two network namespaces joined by a veth pair, two hosts as far as the network goes: training, and the
loss of the link.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mffm.failures import is_cause

pytestmark = [pytest.mark.netns, pytest.mark.timeout(240)]

TIMEOUT = 20.0  # seconds, of collectives
PORT = "29511"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@dataclass
class Hosts:
    """Namespace k has the address 10.77.<n>.<k + 1> on the interface mffm<k>."""

    names: tuple[str, str]
    network: str
    processes: list["subprocess.Popen[str]"] = field(default_factory=list)

    def environment(self, rank: int) -> dict[str, str]:
        """Return what torchrun or srun would set."""
        return {
            **os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": f"{self.network}.1",
            "MASTER_PORT": PORT, "GLOO_SOCKET_IFNAME": f"mffm{rank}",
        }  # fmt: skip

    def start(self, rank: int, log: Path, *command: str) -> "subprocess.Popen[str]":
        """Start a rank in its namespace; its output goes to a file."""
        with log.open("w") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.names[rank], *command], env=self.environment(rank), stdout=file,
                stderr=file, stdin=subprocess.DEVNULL, text=True, start_new_session=True,
            )  # fmt: skip
        self.processes.append(process)
        return process

    def link(self, state: str) -> None:
        """Set the link ``up`` or ``down``."""
        ip("-n", self.names[1], "link", "set", "mffm1", state)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=20)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two namespaces with a link that is up."""
    if shutil.which("ip") is None:
        pytest.skip("ip not installed: apt-get install -y --no-install-recommends iproute2")
    if os.geteuid() != 0:
        pytest.skip("network namespaces must be made by root")
    n = os.getpid() % 250
    made = Hosts((f"mffm-{os.getpid()}-0", f"mffm-{os.getpid()}-1"), f"10.77.{n}")
    try:
        try:
            for name in made.names:
                ip("netns", "add", name)
            ip("link", "add", "mffm0", "netns", made.names[0], "type", "veth", "peer", "mffm1", "netns", made.names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for k, name in enumerate(made.names):
            ip("-n", name, "addr", "add", f"{made.network}.{k + 1}/24", "dev", f"mffm{k}")
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", f"mffm{k}", "up")
        yield made
    finally:
        made.close()
        for name in made.names:  # the veth pair goes with them
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20)


@pytest.fixture(autouse=True)
def nothing_left(hosts: Hosts) -> Iterator[None]:
    yield
    hosts.close()


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in row.items() if k not in ("time", "cpu_s") and not k.endswith("_per_s")} for row in found]


def start(hosts: Hosts, folder: Path, *arguments: str) -> "list[subprocess.Popen[str]]":
    command = [sys.executable, "-m", "mffm", *arguments]
    return [hosts.start(rank, folder / f"{arguments[0]}-{rank}.log", *command) for rank in (0, 1)]


def said(folder: Path, command: str) -> str:
    return "\n".join((folder / f"{command}-{rank}.log").read_text() for rank in (0, 1))


def test_two_hosts_train_like_loopback(hosts: Hosts, make_recipe: Callable[..., Path], tmp_path: Path):
    over_the_link = start(hosts, tmp_path, "train", str(make_recipe("two-hosts", run=str(tmp_path / "hosts"))))
    assert [p.wait(timeout=120) for p in over_the_link] == [0, 0], said(tmp_path, "train")
    loopback = str(make_recipe("loopback", run=str(tmp_path / "loopback")))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "mffm"]
    done = subprocess.run([*command, "train", loopback], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "hosts")) >= 6
    assert rows(tmp_path / "hosts") == rows(tmp_path / "loopback")


def test_a_lost_link_is_a_report_and_not_a_hang(hosts: Hosts, make_recipe: Callable[..., Path], tmp_path: Path):
    run = tmp_path / "run"
    train = {"steps": 1000, "save_every": 5, "validate_every": 1000, "collective_timeout_seconds": TIMEOUT}
    ranks = start(hosts, tmp_path, "train", str(make_recipe(train=train)))
    deadline = time.monotonic() + 100
    while not any(row["step"] >= 7 for row in rows(run)):
        assert time.monotonic() < deadline, said(tmp_path, "train")
        assert all(p.poll() is None for p in ranks), said(tmp_path, "train")
        time.sleep(0.05)
    hosts.link("down")
    lost = time.monotonic()
    try:
        codes = [p.wait(timeout=TIMEOUT + 40) for p in ranks]
        seconds = time.monotonic() - lost
    finally:
        hosts.link("up")
    assert codes == [1, 1], said(tmp_path, "train")
    assert seconds < TIMEOUT + 25  # the others' report is waited for, trackers are closed, and two cores are shared
    reports = sorted((run / "failures").iterdir())
    assert [p.name.rpartition("-")[2] for p in reports] == ["0.txt", "1.txt"]
    for rank, path in enumerate(reports):
        assert path.read_text().startswith(f"rank {rank} of 2 on ")
        assert "lost the other ranks: " in path.read_text()
        assert not is_cause(path)
    assert any("All ranks noticed the same" in path.read_text() for path in reports)
    saved = (run / "checkpoints" / "latest").read_text().strip()

    recipe = run / "recipe.yaml"
    last = int(saved.removeprefix("step-")) + 10
    recipe.write_text(recipe.read_text().replace("steps: 1000\n", f"steps: {last}\n"))
    again = start(hosts, tmp_path, "resume", str(run))
    assert [p.wait(timeout=120) for p in again] == [0, 0], said(tmp_path, "resume")
    assert f"resumed from {saved}" in said(tmp_path, "resume")
    assert f"finished at step {last}" in said(tmp_path, "resume")
