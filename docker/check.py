"""Check Dockerfile and Apptainer recipe without an engine: ``python docker/check.py`` prints faults and exits with 1.

What it wants: a base of one exact version that fits torch's CUDA, torch first and by its pin, everything else under
constraints.txt, no cache left in a layer, a smoke test as a user who is not root, and the same steps in both recipes.
"""

import re
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent
CUDA_OF_TORCH = {"2.13": "13.0"}  # of the wheels on PyPI: the cuda-toolkit pin in torch's metadata
KNOWN = {
    "ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "RUN", "SHELL",
    "STOPSIGNAL", "USER", "VOLUME", "WORKDIR",
}  # fmt: skip


def instructions(text: str) -> list[tuple[str, str]]:
    """Return (instruction, arguments) of a Dockerfile, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines) + "\n")
    found = []
    for line in joined.splitlines():
        name, _, arguments = line.strip().partition(" ")
        found.append((name.upper(), arguments.strip()))
    return found


def arguments(steps: list[tuple[str, str]], name: str) -> list[str]:
    return [a for n, a in steps if n == name]


def base_of(steps: list[tuple[str, str]]) -> str:
    """Return the image that the last stage starts from, with ARG defaults filled in."""
    defaults = dict(a.split("=", 1) for a in arguments(steps, "ARG") if "=" in a)
    return re.sub(r"\$\{?(\w+)\}?", lambda m: defaults.get(m[1], m[0]), arguments(steps, "FROM")[-1]).split()[0]


def check_base(image: str, constraints: str) -> list[str]:
    """Return what is wrong with a base image."""
    match = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel-ubuntu\d\d\.\d\d(@sha256:[0-9a-f]{64})?", image)
    if match is None:
        return [f"base {image!r}: expected nvidia/cuda:<major.minor.patch>-devel-ubuntu<version>"]
    torch = re.search(r"^torch==(\d+\.\d+)", constraints, re.MULTILINE)
    if torch is None:
        return ["constraints.txt: no pin of torch"]
    wanted = CUDA_OF_TORCH.get(torch[1])
    if wanted is None:
        return [f"torch {torch[1]}: say in docker/check.py which CUDA its wheels are built for"]
    return [] if match[1] == wanted else [f"base {image!r}: torch {torch[1]} is built for CUDA {wanted}"]


def pip_installs(script: str) -> list[str]:
    """Return what is given to each `pip install`."""
    return [m.strip() for m in re.findall(r"\bpip install ([^\n&]+)", script)]


def check_installs(script: str) -> list[str]:
    """Return what is wrong with the installing part of a recipe."""
    faults = []
    installs = pip_installs(script)
    if not installs or "grep '^torch==' constraints.txt" not in installs[0]:
        faults.append("the first pip install is not torch by its pin in constraints.txt")
    faults += [f"pip install {i}: without -c constraints.txt" for i in installs if "-c constraints.txt" not in i]
    if not any(re.search(r"\.\[train\]", i) for i in installs):
        faults.append("no pip install of .[train]")
    for line in re.findall(r"[^\n]*apt-get install[^\n]*", script):
        if "--no-install-recommends" not in line:
            faults.append("apt-get install without --no-install-recommends")
    if "apt-get install" in script and "rm -rf /var/lib/apt/lists" not in script:
        faults.append("the lists of apt stay in the image")
    if "PIP_NO_CACHE_DIR=1" not in script:
        faults.append("the cache of pip stays in the image (PIP_NO_CACHE_DIR=1)")
    if re.search(r"curl[^\n|]*\||wget[^\n|]*\||:latest\b", script):
        faults.append("something is installed without a version")
    return faults


def check_dockerfile(text: str, root: Path = ROOT) -> list[str]:
    """Return what is wrong with a Dockerfile."""
    steps = instructions(text)
    constraints = (root / "constraints.txt").read_text()
    faults = [f"unknown instruction {n}" for n, _ in steps if n not in KNOWN]
    if not arguments(steps, "FROM"):
        return [*faults, "no FROM"]
    faults += check_base(base_of(steps), constraints)
    faults += check_installs("\n".join([*arguments(steps, "ENV"), *arguments(steps, "RUN")]))
    for name in ("HEALTHCHECK", "ENTRYPOINT", "CMD"):
        if not arguments(steps, name):
            faults.append(f"no {name}")
    users = arguments(steps, "USER")
    if not users or users[-1].split(":")[0] in ("root", "0"):
        faults.append("the image runs as root: no USER, or USER root at the end")
    order = [n if n != "RUN" or "mffm --version" not in a else "SMOKE" for n, a in steps]
    if "SMOKE" not in order:
        faults.append("no RUN mffm --version: the smoke test")
    elif "USER" not in order or order.index("SMOKE") < order.index("USER"):
        faults.append("the smoke test runs before USER, as root")
    if arguments(steps, "ADD"):
        faults.append("ADD: use COPY")
    ignored = [line for line in (root / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    for copy in arguments(steps, "COPY"):
        for source in copy.split()[:-1]:
            if not source.startswith("--") and not (root / source).exists():
                faults.append(f"COPY {source}: not in the repository")
            elif not source.startswith("--") and f"!{source}" not in ignored:
                faults.append(f"COPY {source}: .dockerignore keeps it out of the context")
    return faults


def sections(text: str) -> dict[str, str]:
    """Return the sections of an Apptainer recipe, the header as ``""``."""
    parts = re.split(r"^%(\w+)\s*$", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def check_apptainer(text: str, dockerfile: str, root: Path = ROOT) -> list[str]:
    """Return what is wrong with the Apptainer recipe, and where it differs from the Dockerfile."""
    found = sections(text)
    faults = [f"no %{name}" for name in ("files", "post", "environment", "test", "runscript") if name not in found]
    if faults:
        return faults
    steps = instructions(dockerfile)
    base = re.search(r"^From:\s*(\S+)", found[""], re.MULTILINE)
    if base is None or base[1] != base_of(steps):
        faults.append(f"From is not the Dockerfile's base {base_of(steps)}")
    faults += check_installs(found["post"])
    runs = "\n".join(arguments(steps, "RUN"))
    if pip_installs(found["post"]) != pip_installs(runs):
        faults.append("other pip installs than the Dockerfile")
    packages = [sorted(re.findall(r"apt-get install -y --no-install-recommends ([^\n&]+)", s)) for s in (
        found["post"], runs
    )]  # fmt: skip
    if [p.split() for p in packages[0]] != [p.split() for p in packages[1]]:
        faults.append("other apt packages than the Dockerfile")
    for line in found["files"].split("\n"):
        if line.strip() and not (root / line.split()[0]).exists():
            faults.append(f"%files {line.split()[0]}: not in the repository")
    if "mffm --version" not in found["test"]:
        faults.append("%test: no mffm --version")
    return faults


def main() -> int:
    dockerfile, apptainer = (FOLDER / "Dockerfile").read_text(), (FOLDER / "mffm.def").read_text()
    faults = [f"Dockerfile: {f}" for f in check_dockerfile(dockerfile)]
    faults += [f"mffm.def: {f}" for f in check_apptainer(apptainer, dockerfile)]
    print("\n".join(faults) or "docker/Dockerfile and docker/mffm.def: no fault found")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
