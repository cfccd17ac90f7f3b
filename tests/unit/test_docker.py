"""The container recipes, read without an engine: what is shipped is clean, and each kind of fault is found."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docker_check", ROOT / "docker" / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docker_check"] = module
    spec.loader.exec_module(module)
    return module


check = _load()
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text()
APPTAINER = (ROOT / "docker" / "mffm.def").read_text()


def test_the_shipped_recipes_have_no_fault():
    assert check.main() == 0


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("nvidia/cuda:13.0.2-devel", "nvidia/cuda:12.8.1-devel", "built for CUDA 13.0"),
        ("nvidia/cuda:13.0.2-devel-ubuntu24.04", "nvidia/cuda:latest", "expected nvidia/cuda"),
        ("USER mffm\n", "", "runs as root"),
        ("USER mffm\n", "USER root\n", "runs as root"),
        (" -c constraints.txt", "", "without -c constraints.txt"),
        ("\"$(grep '^torch==' constraints.txt)\"", "torch", "by its pin"),
        ("mffm --version \\\n", "true \\\n", "the smoke test"),
        ("HEALTHCHECK", "LABEL a=b #", "no HEALTHCHECK"),
        ("CMD [\"--help\"]", "", "no CMD"),
        ("PIP_NO_CACHE_DIR=1", "A=1", "cache of pip"),
        (" --no-install-recommends", "", "without --no-install-recommends"),
        ("COPY launch launch", "COPY lunch lunch", "not in the repository"),
        ("COPY launch launch", "COPY tests tests", "out of the context"),
        ("SHELL", "SHELLS", "unknown instruction"),
    ],
)  # fmt: skip
def test_a_fault_is_found(old: str, new: str, fault: str):
    assert old in DOCKERFILE
    faults = check.check_dockerfile(DOCKERFILE.replace(old, new))
    assert any(fault in f for f in faults), faults


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("13.0.2", "13.0.1", "Dockerfile's base"),
        ("python3-venv", "python3-virtualenv", "other apt packages"),
        ("install -c constraints.txt", "install", "other pip installs"),
        ("%test", "%tests", "no %test"),
        ("    launch /src/launch", "    lunch /src/lunch", "not in the repository"),
    ],
)
def test_the_apptainer_recipe_follows_the_dockerfile(old: str, new: str, fault: str):
    assert old in APPTAINER
    faults = check.check_apptainer(APPTAINER.replace(old, new), DOCKERFILE)
    assert any(fault in f for f in faults), faults


def test_pins_of_the_train_extra_are_complete():
    """Every requirement of [train] has a pin, and no line is one that pip refuses as a constraint."""
    import re
    import tomllib

    lines = [s for s in (ROOT / "constraints.txt").read_text().splitlines() if s and not s.startswith("#")]
    assert [s for s in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+]+", s)] == []
    pinned = {s.split("==")[0].lower() for s in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["train"]
    assert {re.split(r"[<>=]", w)[0].lower() for w in wanted} <= pinned
