"""Make a virtual environment for each peer of the benchmarks: their pins clash, with ours and with each other.

    python tools/peers/install.py all [--folder DIR]
    python tools/peers/install.py mace

The folder is $MFFM_PEERS, or runs/peers/venvs. torch comes first, by the pin of constraints.txt (a CPU build where pip
finds one: a looser requirement pulls CUDA), and holds for all that follows. An environment that is whole is left as it
is. fairchem's eSCN-MD needs none: it is in mffm's own (extra ``fairchem``).
"""

import argparse
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]
TORCH = "torch==2.13.0"
# What the log and the tables name as the version, and what goes with it.
PEERS = {
    "mace": ["mace-torch==0.3.16"],
    "sevennet": ["sevenn==0.13.0"],
    "nequip": ["nequip==0.19.1"],
}
# e3nn 0.4.4, which MACE pins, unpickles its tables with torch.load, and so does MACE its own checkpoints.
ENVIRONMENT = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}


def folder() -> Path:
    """Return where the virtual environments lie."""
    return Path(os.environ.get("MFFM_PEERS", ROOT / "runs" / "peers" / "venvs")).resolve()


def python(peer: str) -> Path | None:
    """Return the interpreter of a peer's environment; None where it is not installed."""
    done = folder() / peer / "installed.txt"
    return done.parent / "bin" / "python" if done.exists() else None


def version(peer: str) -> str:
    """Return the peer's pin, such as ``mace-torch 0.3.16``."""
    return PEERS[peer][0].replace("==", " ")


def remedy(peer: str) -> str:
    return f"{peer} is not installed in {folder()}; python tools/peers/install.py {peer}"


def install(peer: str) -> None:
    """Make the environment of a peer; an unfinished one is made again."""
    path = folder() / peer
    done = path / "installed.txt"
    wanted = "\n".join([TORCH, *PEERS[peer]]) + "\n"
    if done.exists() and done.read_text() == wanted:
        print(f"{peer}: {path} is there")
        return
    if path.exists():
        shutil.rmtree(path)
    venv.create(path, with_pip=True)
    pip = [str(path / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, TORCH], check=True)
    constraints = path / "constraints.txt"
    constraints.write_text(TORCH + "\n")
    subprocess.run([*pip, "-c", str(constraints), *PEERS[peer]], check=True)
    done.write_text(wanted)
    print(f"{peer}: {', '.join(PEERS[peer])} in {path}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("peer", choices=[*PEERS, "all"])
    parser.add_argument("--folder", help="where the environments lie; default $MFFM_PEERS, or runs/peers/venvs")
    options = parser.parse_args()
    if options.folder:
        os.environ["MFFM_PEERS"] = options.folder
    for peer in PEERS if options.peer == "all" else [options.peer]:
        install(peer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
