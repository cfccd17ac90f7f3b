"""Energy is kept over 5 ps of a crystal and of a molecule by a trained potential; MFFM_DRIFT_PS=10 for 10 ps."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from ase import Atoms
from ase.build import bulk, molecule

from mffm.config.properties import MdConfig
from mffm.deploy.ase import Calculator
from mffm.properties.md import md

ROOT = Path(__file__).parents[3]
LIMIT = 1e-5  # eV/atom/ps
PICOSECONDS = float(os.environ.get("MFFM_DRIFT_PS", "5"))
SMALL = [
    "model.backbone={channels: 16, edge_channels: 16, lmax: 2, l_message: 1, layers: 2, cutoff: 5.0}",
    "train.preflight=false",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, run_mffm: Callable) -> Callable[[str, str, int], Path]:
    """Return the function that trains a small potential of a recipe on its shipped data."""

    def train(data: str, recipe: str, steps: int) -> Path:
        folder = tmp_path_factory.mktemp(recipe)
        store, run = folder / "store", folder / "run"
        done = run_mffm("ingest", str(ROOT / "configs/data" / f"{data}.yaml"), "--store", str(store))
        assert done.returncode == 0, done.stderr
        places = [f"data.store={store}", f"run={run}", f"train.steps={steps}", f"train.validate_every={steps}"]
        arguments = [str(ROOT / "configs" / f"{recipe}.yaml"), *places, f"train.save_every={steps}", *SMALL]
        done = run_mffm("train", *arguments, timeout=1500)
        assert done.returncode == 0, done.stderr
        return run

    return train


def kept(atoms: Atoms, run: Path, fidelity: str, timestep: float, folder: Path) -> None:
    atoms.calc = Calculator(run, fidelity=fidelity)
    config = MdConfig(ensemble="nve", timestep=timestep, temperature=300.0, log_every=5, save_every=500)
    found = md(atoms, config, round(1000 * PICOSECONDS / timestep), folder)
    assert found.log[-1, 1] == pytest.approx(PICOSECONDS)
    assert 50 < found.found()["mean_temperature_second_half_k"] < 500, "bound, and moving"
    assert found.fluctuation > 0
    print(f"{atoms.get_chemical_formula()}: drift {found.drift:.2e} eV/atom/ps, rms {found.fluctuation:.2e} eV/atom")
    assert abs(found.drift) < LIMIT


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_of_a_crystal(trained: Callable[[str, str, int], Path], tmp_path: Path):
    crystal = bulk("NaCl", "rocksalt", a=5.69, cubic=True).repeat(2)
    assert len(crystal) == 64
    kept(crystal, trained("solids", "crystals", 150), "pbe_gpaw", 2.0, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_of_a_molecule(trained: Callable[[str, str, int], Path], tmp_path: Path):
    kept(molecule("CH3CH2OH"), trained("molecules", "quickstart_low_fidelity", 300), "gfn2", 0.5, tmp_path)
