"""Molecular dynamics: conserved energy, temperatures, and trajectories that go on bit for bit."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.io import read

from mffm.config.properties import MdConfig
from mffm.deploy.ase import Calculator
from mffm.errors import InputError
from mffm.properties import md as module


def crystal(n: int = 2) -> Atoms:
    atoms = bulk("Cu", cubic=True).repeat(n)
    atoms.calc = EMT()
    return atoms


def diamond(release: Path) -> Atoms:
    """Return a crystal that melts, with our calculator: EMT's own sums depend on when its list was made."""
    atoms = bulk("C", "diamond", a=4.2, cubic=True)
    atoms.calc = Calculator(release, fidelity="gfn2", dtype="float64", skin=0.2)
    return atoms


def test_slope_of_a_known_line():
    times = np.linspace(0, 10, 101)
    noise = 0.01 * np.where(np.arange(101) % 2, 1, -1)
    slope, rest = module.energy_drift(times, 5 + 2e-3 * times + noise)
    assert slope == pytest.approx(2e-3, abs=1e-4)
    assert rest == pytest.approx(0.01, rel=0.01)


def test_nve_keeps_the_energy_and_a_large_step_does_not(tmp_path: Path):
    drifts = []
    for timestep in (2.0, 15.0):
        config = MdConfig(ensemble="nve", timestep=timestep, temperature=600, save_every=50)
        found = module.md(crystal(1), config, 200, tmp_path / str(timestep))
        drifts.append(found.fluctuation)
        assert found.log[-1, 1] == pytest.approx(0.2 * timestep)
    assert drifts[0] < 1e-4
    assert drifts[1] > 30 * drifts[0]  # velocity Verlet: (15/2)² = 56 times
    frames = read(tmp_path / "2.0" / "trajectory.extxyz", ":")
    assert [f.info["step"] for f in frames] == [0, 50, 100, 150, 200]
    module.draw(found, tmp_path / "md.png")
    assert (tmp_path / "md.png").stat().st_size > 5000


@pytest.mark.parametrize("ensemble", ["nve", "nvt", "npt"])
def test_a_trajectory_that_was_killed_is_the_same(tmp_path: Path, tiny_release: Path, ensemble: str):
    config = MdConfig(ensemble=ensemble, timestep=2.0, log_every=5, save_every=10, pressure=1.0, temperature=3000)
    atoms = diamond(tiny_release)
    whole = module.md(atoms, config, 40, tmp_path / "whole")
    assert atoms.calc.neighbors.n_made > 2
    part = tmp_path / "part"
    module.md(diamond(tiny_release), config, 20, part)
    with (part / "trajectory.extxyz").open("a") as file:  # as a kill in the middle of a save leaves it
        file.write("4\nLatt")
    with (part / "log.csv").open("a") as file:
        file.write("25,0.1,")
    resumed = module.md(diamond(tiny_release), config, 40, part)
    assert resumed.n_resumed == 20
    for name in ("log.csv", "trajectory.extxyz"):
        assert (part / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    np.testing.assert_array_equal(whole.log, resumed.log)
    if ensemble == "npt":
        assert whole.log[-1, 6] != whole.log[0, 6]


@pytest.mark.slow
def test_thermostat_and_barostat_reach_what_they_are_set_to(tmp_path: Path):
    config = MdConfig(ensemble="npt", timestep=5.0, temperature=400, pressure=5.0, barostat_time=300)
    found = module.md(crystal(), config, 4000, tmp_path / "npt").found()
    assert found["mean_temperature_second_half_k"] == pytest.approx(400, rel=0.1)
    pressed = crystal()
    static = pressed.get_volume()
    frame = read(tmp_path / "npt" / "trajectory.extxyz", "-1")
    assert found["mean_volume_second_half_ang3"] == pytest.approx(static * (1 - 5 / 134 + 0.02), rel=0.02)
    assert frame.get_volume() != static


def test_refused(tmp_path: Path):
    config = MdConfig(ensemble="nve", temperature=None)
    with pytest.raises(InputError, match="no momenta"):
        module.md(crystal(1), config, 10, tmp_path / "a")
    water = molecule("N2")
    water.calc = EMT()
    with pytest.raises(InputError, match="npt: N2 is not periodic"):
        module.md(water, MdConfig(ensemble="npt"), 10, tmp_path / "b")
    module.md(crystal(1), MdConfig(), 10, tmp_path / "c")
    with pytest.raises(InputError, match=r"has temperature 300.0, now 400.0; give another folder"):
        module.md(crystal(1), MdConfig(temperature=400), 10, tmp_path / "c")
    other = crystal(1)
    other.positions[0, 0] += 0.01
    with pytest.raises(InputError, match="has structure"):
        module.md(other, MdConfig(), 10, tmp_path / "c")
    with pytest.raises(InputError, match=r"now \{'weights': 'b'\}"):
        module.md(crystal(1), MdConfig(), 10, tmp_path / "c", {"weights": "b"})
    shutil.rmtree(tmp_path / "c")


def test_momenta_of_the_structure_are_used(tmp_path: Path):
    atoms = crystal(1)
    atoms.set_momenta(np.eye(4, 3) * 5)
    config = MdConfig(ensemble="nve", temperature=None, timestep=1.0)
    found = module.md(atoms, config, 10, tmp_path / "md")
    assert found.log[0, 3] == pytest.approx(3 * 25 / 2 / atoms.get_masses()[0])


@pytest.mark.parametrize("seed", [0, 7])
def test_the_first_noise_is_not_the_first_momenta_again(tmp_path: Path, seed: int):
    """The same stream twice would add c momenta to the momenta, c² = 1 - exp(-2 timestep / time) = 0.02: T + 28 %."""
    config = MdConfig(ensemble="nvt", temperature=300, log_every=1, seed=seed)
    temperatures = module.md(crystal(), config, 1, tmp_path / "md").log[:, 5]
    assert temperatures[1] == pytest.approx(temperatures[0], rel=0.1)


@pytest.mark.parametrize("ensemble", ["nvt", "npt"])
def test_a_stop_between_saves_changes_nothing(tmp_path: Path, tiny_release: Path, ensemble: str):
    config = MdConfig(ensemble=ensemble, timestep=2.0, log_every=5, save_every=10, temperature=3000)
    for folder, stops in (("whole", (40,)), ("part", (13, 27, 40))):
        for stop in stops:
            module.md(diamond(tiny_release), config, stop, tmp_path / folder)
    with np.load(tmp_path / "whole" / "state.npz") as whole, np.load(tmp_path / "part" / "state.npz") as part:
        for name in ("step", "positions", "momenta", "cell", "barostat"):
            np.testing.assert_array_equal(whole[name], part[name])
    rows, stopped = ((tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "part"))
    assert [row for row in stopped if row.split(",")[0] not in ("13", "27")] == rows
    assert len(stopped) == len(rows) + 2


def test_charge_spin_and_masses_are_of_the_trajectory(tmp_path: Path):
    module.md(crystal(1), MdConfig(), 1, tmp_path / "a")
    charged, spun, heavy = crystal(1), crystal(1), crystal(1)
    charged.info["charge"] = np.int64(1)
    with pytest.raises(InputError, match="has charge 0, now 1; give another folder"):
        module.md(charged, MdConfig(), 1, tmp_path / "a")
    spun.info["spin"] = 3
    with pytest.raises(InputError, match="has spin_multiplicity 0, now 3"):
        module.md(spun, MdConfig(), 1, tmp_path / "a")
    heavy.set_masses([65.0] * 4)
    with pytest.raises(InputError, match="has structure"):
        module.md(heavy, MdConfig(), 1, tmp_path / "a")
    module.md(charged, MdConfig(), 1, tmp_path / "b")
    assert module.md(charged, MdConfig(), 2, tmp_path / "b").n_resumed == 1
