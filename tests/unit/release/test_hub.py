"""huggingface_hub's own client against a hub on this machine: what is pushed comes back, and nothing else does."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from mffm.release import container, load
from mffm.release.container import FILES

pytest.importorskip("huggingface_hub", reason="the extra hub is not installed")


@pytest.fixture
def python(hub: Any, tmp_path: Path) -> Callable[..., CompletedProcess[str]]:
    """Return a function that runs Python in a process of its own, as a user of this hub."""

    def run(*arguments: str, token: str = hub.token, **more: str) -> CompletedProcess[str]:
        environment = {
            **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), **more,
        }  # fmt: skip
        command = [sys.executable, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)

    return run


@pytest.fixture
def mffm(python: Callable[..., CompletedProcess[str]]) -> Callable[..., CompletedProcess[str]]:
    return partial(python, "-m", "mffm")


PUSH_AND_PULL = """
import sys
from pathlib import Path
from mffm.release import hub
print(hub.push(Path(sys.argv[1]), "me/tiny"))
hub.pull("me/tiny", Path(sys.argv[2]))
"""


def test_what_is_pushed_is_pulled(hub: Any, python: Any, tiny_release: Path, tmp_path: Path):
    hub.repositories["me/tiny"], hub.commits["me/tiny"] = {}, []
    # What else lies there, with names that lead elsewhere, stays there.
    strange = {"../escaped.json": b"{}", "a/config.json": b"{}", "run.py": b"print()", "evaluation-test.json": b"{}"}
    hub.repositories["me/tiny"] |= strange
    found = tmp_path / "deep" / "pulled"
    done = python("-c", PUSH_AND_PULL, str(tiny_release), str(found))
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/me/tiny/commit/{hub.commits['me/tiny'][0]}" in done.stdout  # all files are one commit
    assert set(hub.repositories["me/tiny"]) - set(strange) == {p.name for p in tiny_release.iterdir()}
    assert {p.name for p in found.iterdir()} == {p.name for p in tiny_release.iterdir()} <= set(FILES)
    assert {p.name for p in found.parent.iterdir()} == {"pulled"}
    assert not list(tmp_path.rglob("escaped.json"))
    a, b = load(tiny_release), load(found)
    assert container.tensor_digest(a.potential.state_dict()) == container.tensor_digest(b.potential.state_dict())
    assert b.contents.changed == []


@pytest.mark.slow
def test_what_the_hub_has_is_checked_before_it_gets_its_name(hub: Any, mffm: Any, tiny_release: Path, tmp_path: Path):
    assert mffm("release", str(tiny_release), "--push", "me/damaged", "--public").returncode == 0
    assert not hub.private["me/damaged"]
    weights = bytearray(hub.repositories["me/damaged"]["model.safetensors"])
    weights[-1] ^= 1
    hub.repositories["me/damaged"]["model.safetensors"] = bytes(weights)
    hub.repositories["me/other"], hub.commits["me/other"] = {"config.json": b"{}"}, []
    hub.commit("me/other")
    cases = {
        ("me/damaged", ()): "SHA-256 differs from the manifest's",
        ("me/other", ()): "not a release of mffm: no manifest.json",
        ("me/nothing", ()): "the hub refused or was not reached (RepositoryNotFoundError",
        ("me/damaged", ("--revision", "v9")): "RevisionNotFoundError",
        ("not a name!", ()): "the hub refused or was not reached",
    }
    for (name, more), message in cases.items():
        done = mffm("release", name, str(tmp_path / "pulled"), "--pull", *more)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.glob("pulled*"))


@pytest.mark.slow
def test_who_may_not_push_is_told(hub: Any, mffm: Any, tiny_release: Path, tmp_path: Path):
    done = mffm("release", str(tiny_release), "--push", "me/else", token="hf_wrong")
    assert done.returncode == 2
    assert "HF_TOKEN" in done.stderr
    offline = mffm("release", str(tiny_release), "--push", "me/else", HF_HUB_OFFLINE="1")
    assert offline.returncode == 2
    assert "HF_HUB_OFFLINE" in offline.stderr
    single = mffm("release", str(tiny_release), str(tmp_path / "x.safetensors"), "--push", "me/else")
    assert single.returncode == 2
    assert "a hub takes the folder form" in single.stderr
