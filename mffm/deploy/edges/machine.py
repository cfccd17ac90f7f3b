"""What compiled code is bound to."""

import platform
from pathlib import Path
from typing import Any

import torch

from mffm.errors import InputError


def machine(device: torch.device | str) -> dict[str, Any]:
    """Return what code compiled here for a device needs, as JSON."""
    device = torch.device(device)
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "architecture": platform.machine(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cpu_features": _cpu_features(),
    }
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        found["gpu"] = f"compute capability {major}.{minor}"
    return found


def _cpu_features() -> list[str]:
    """Return the instruction sets that Linux names, [] elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags: list[str] = next(
        (line.split(":")[1].split() for line in lines if line.startswith(("flags", "Features"))), []
    )
    return sorted(flags)


def require_this(compiled_for: dict[str, Any], device: torch.device | str, place: str) -> None:
    """Refuse code that was compiled for something else: it might give other numbers, or kill the process.

    Raises:
        InputError: with what differs.
    """
    here = machine(device)
    differing = [
        f"{key} {compiled_for.get(key)} there, {here.get(key)} here"
        for key in ("torch", "architecture", "isa", "gpu")
        if compiled_for.get(key) != here.get(key)
    ]
    lacking = sorted(set(compiled_for.get("cpu_features", [])) - set(here["cpu_features"]))
    if lacking and not differing:
        differing = [f"this CPU lacks {' '.join(lacking[:8])}"]
    if differing:
        raise InputError(
            f"{place}: compiled for another machine ({'; '.join(differing)}); compile it on this one: "
            "mffm export IN.pt2 OUT.pt2 --compile, or load it with compiled=False"
        )
