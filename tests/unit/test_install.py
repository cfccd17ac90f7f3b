"""What users install: a wheel with launch/ in it that runs outside of the clone, and a base install for releases."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Packages of the extras: a user of a release does not have them.
EXTRAS = (
    "deepspeed", "wandb", "submitit", "matplotlib", "fairchem", "phonopy", "pymatgen", "torch_sim", "dftd3", "pytest",
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
