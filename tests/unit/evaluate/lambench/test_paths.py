"""Paths, pressures, dynamics and force fields of LAMBench, in the suite's layouts with EMT's own labels."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from mffm.errors import InputError
from mffm.evaluate.benchmark.task import Options, Score, Task
from mffm.evaluate.lambench import force_field, neb, nve_md, pressure, scores, stacking_fault


class Wrong(EMT):
    """EMT with energies 0.1 eV an atom and 0.2 eV a gold atom higher, and forces 0.3 eV/Å off along x."""

    def calculate(self, atoms: Any = None, *args: Any, **kwargs: Any) -> None:
        super().calculate(atoms, *args, **kwargs)
        self.results["energy"] += 0.1 * len(atoms) + 0.2 * atoms.get_chemical_symbols().count("Au")
        self.results["forces"] = self.results["forces"] + [0.3, 0, 0]


def emt(atoms: Atoms) -> Atoms:
    atoms.calc = EMT()
    return atoms


def scored(task: Task, data: Path, calculator: Any) -> Score:
    items = task.load(data)
    return task.score(items, {i: task.run(item, calculator, Options()) for i, item in items.items()})


def test_stacking_fault(tmp_path: Path):
    folder = tmp_path / "lambench" / "stacking_fault" / "fcc"
    folder.mkdir(parents=True)
    frames = []
    for shift in np.linspace(0, 1, 10):
        slab = fcc111("Cu", (1, 1, 6), vacuum=8)
        slab.positions[3:, :2] += shift * (slab.cell[0, :2] + slab.cell[1, :2]) / 3  # towards the hcp sites
        frames.append(slab)
    energies = np.array([emt(a.copy()).get_potential_energy() for a in frames])
    area = np.linalg.norm(np.cross(frames[0].cell[0], frames[0].cell[1]))
    label = (energies - energies.min()) * 16021.766208 / area
    write(folder / "Cu.traj", frames)
    with pytest.raises(InputError, match=r"no Cu.csv beside it"):
        stacking_fault.TASK.load(tmp_path)
    with (folder / "Cu.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("Displacement", "Energy"))
        table.writerows(zip(np.linspace(0, 1, 10), label, strict=True))
    score = scored(stacking_fault.TASK, tmp_path, EMT())
    assert score.metrics == {"MAE_E": pytest.approx(0, abs=1e-3), "MAE_dE": pytest.approx(0, abs=1e-3)}
    path = stacking_fault.TASK.load(tmp_path)["fcc/Cu"]
    # Twice the profile has the same normalised slope.
    errors = stacking_fault.profile_errors(path, 2 * path.energies)
    assert errors[0] > 0.2 * label.max()
    assert errors[1] == pytest.approx(0, abs=1e-4)
    assert stacking_fault.profile_errors(path, np.roll(path.energies, 3))[1] > 0.5


def test_neb_takes_the_frame_that_dft_finds_highest(tmp_path: Path):
    folder = tmp_path / "lambench" / "OC20NEB-OOD"
    folder.mkdir(parents=True)
    rows = []
    for kind, error in (("desorption", 0.05), ("desorption", 0.2), ("transfer", 0.05), ("dissociation", -0.2)):
        name = f"{kind}_{len(rows)}"
        frames, energies = [], []
        for k, height in enumerate((1.0, 1.4, 2.2, 1.8)):
            slab = fcc111("Cu", (2, 2, 2), vacuum=8)
            add_adsorbate(slab, "O", height, "fcc")
            energies.append(emt(slab.copy()).get_potential_energy())
            dft = energies[-1] + (10.0 if k == 1 else 0.0)  # DFT's maximum is frame 1, wherever EMT's is
            slab.calc = SinglePointCalculator(slab, energy=dft)
            frames.append(slab)
        write(folder / f"{name}.traj", frames)
        rows.append((name, energies[1] - energies[0] - error, energies[3] - energies[0]))
    with (folder / "label.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("traj", "Ea", "dE"))
        table.writerows(rows)
    score = scored(neb.TASK, tmp_path, EMT())
    assert score.metrics == {
        "MAE_Ea": pytest.approx(0.125), "MAE_dE": pytest.approx(0, abs=1e-9), "ø_Desorption": 50.0,
        "ø_Dissociation": 100.0, "ø_Transfer": 0.0, "success_rate": 100.0,
    }  # fmt: skip
    assert "4 of 460" in score.remark
    # A path without a result has no barrier within 0.1 eV: whoever computes none is as bad as the dummy, not perfect.
    failed = neb.TASK.score(neb.TASK.load(tmp_path), {}).metrics
    assert [failed[k] for k in neb.KINDS.values()] == [100.0, 100.0, 100.0]
    assert scores.aggregate({}, {"neb": failed}).property_domains[scores.CATALYSIS] == 1.0


def test_pressure_compresses(tmp_path: Path):
    folder = tmp_path / "lambench" / "pressure"
    folder.mkdir(parents=True)
    for p in pressure.PRESSURES:
        write(folder / f"P{p:03d}.traj", [bulk("Cu", a=3.5)])
    items = pressure.TASK.load(tmp_path)
    assert len(items) == 6
    volumes = [pressure.TASK.run(items[f"P{p:03d}-0"], EMT(), Options())["volume"] for p in (25, 150)]
    assert volumes[1] < volumes[0] < bulk("Cu", a=3.59).get_volume()
    # At the volume found, EMT's own pressure is the one asked for.
    atoms = emt(bulk("Cu", a=(4 * volumes[0]) ** (1 / 3)))
    assert -np.trace(atoms.get_stress(voigt=False)) / 3 * 160.21766 == pytest.approx(25, abs=0.3)


def test_drift_has_the_suites_factor_and_drops_the_first_fifth():
    steps = np.arange(101)
    energies = 1e-4 * steps * 100  # 1e-4 eV a step of 1 fs: 0.1 eV/ps
    energies[:20] += 50
    assert nve_md.drift(energies, 100, n_atoms=4) == pytest.approx(0.1 / 4 * 10.18, rel=1e-3)


def test_nve_runs_a_molecule(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(nve_md.NveMd, "steps", 200)
    named = [molecule("CH3CH2OH"), molecule("C4H4NH")]
    for atoms in named:
        atoms.info["system"] = str(atoms.symbols)
    (tmp_path / "lambench").mkdir()
    write(tmp_path / nve_md.FILE.path, named)
    items = nve_md.TASK.load(tmp_path)
    assert list(items) == [str(atoms.symbols) for atoms in named]
    result = nve_md.TASK.run(items[str(named[1].symbols)], EMT(), Options())
    assert result["energy_range"] < 1  # eV; EMT knows these elements, roughly
    score = nve_md.TASK.score({"a": None, "b": None}, {"a": {"slope": 5e-2}})
    assert score.metrics["M_IS"] == pytest.approx((2 + 5) / 2)
    assert score.metrics["success_rate"] == 0.5


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """MoS2's folder with ordinary and mixed systems of copper and gold, labels EMT's."""
    root = tmp_path / "lambench" / "MoS2"
    for name, symbols in (("plain", "Cu3Au"), ("mixed", None)):
        part = root / name / "set.000"
        part.mkdir(parents=True)
        made = []
        for k, formula in enumerate([symbols] * 4 if symbols else ["Cu2Au2", "CuAu3", "Au4", "Cu4"]):
            atoms = bulk("Cu", a=3.8, cubic=True)
            atoms.symbols = formula
            atoms.rattle(0.1, seed=k)
            made.append(emt(atoms))
        (root / name / "type_map.raw").write_text("Cu\nAu\n")
        types = [[["Cu", "Au"].index(s) for s in a.get_chemical_symbols()] for a in made]
        if symbols:
            (root / name / "type.raw").write_text(" ".join(map(str, types[0])))
        else:
            np.save(part / "real_atom_types.npy", np.array(types))
        arrays = {
            "coord": [a.positions.ravel() for a in made],
            "box": [a.cell.array.ravel() for a in made],
            "energy": [a.get_potential_energy() for a in made],
            "force": [a.get_forces().ravel() for a in made],
            "virial": [(-a.get_stress(voigt=False) * a.get_volume()).ravel() for a in made],
        }
        for key, values in arrays.items():
            np.save(part / f"{key}.npy", np.array(values))
    return tmp_path


def test_force_fields_lose_element_biases_and_keep_the_rest(frames: Path):
    task = force_field.ForceField("MoS2")
    exact = scored(task, frames, EMT())
    assert exact.n == 8
    assert all(exact.metrics[k] == pytest.approx(0, abs=1e-6) for k in exact.metrics)
    assert "virial_rmse_natoms" in exact.metrics
    wrong = scored(task, frames, Wrong())
    assert wrong.metrics["energy_rmse_natoms"] == pytest.approx(0, abs=1e-6)  # a bias by element alone
    assert wrong.metrics["force_rmse"] == pytest.approx(300 / 3**0.5)
    assert wrong.metrics["force_mae"] == pytest.approx(100)


def test_force_fields_are_compared_where_the_set_is_known_to_be_the_suites():
    frame = force_field.Frame(bulk("Cu"), 0.0, np.zeros((1, 3)), None)
    result = {"energy": 0.0, "force_squares": 0.0, "force_sum": 0.0, "largest": 0.0}

    def score(name: str, n: int) -> Score:
        ids = [str(k) for k in range(n)]
        return force_field.ForceField(name).score(dict.fromkeys(ids, frame), dict.fromkeys(ids, result))

    whole, part, unknown = score("REANN_CO2_Ni100", 991), score("REANN_CO2_Ni100", 990), score("AQM", 991)
    assert "force_rmse" in whole.compare
    assert not part.compare
    assert "990 of 991 frames: not to be compared" in part.remark
    assert not unknown.compare
    assert "the suite's number of frames is not known: not to be compared" in unknown.remark


def test_d3_is_added_where_the_suite_adds_it(frames: Path):
    dftd3 = pytest.importorskip("dftd3.ase", reason="needs simple-dftd3: pip install 'mffm[d3]'")
    item = next(iter(force_field.ForceField("MoS2").load(frames).values()))
    plain, zero, damped = (
        force_field.ForceField(n).run(item, EMT(), Options())["energy"] for n in ("MoS2", "CompressBi", "Si_ZEO22")
    )
    atoms = item.atoms.copy()
    for value, damping in ((zero, "d3zero"), (damped, "d3bj")):
        atoms.calc = dftd3.DFTD3(method="PBE", damping=damping)
        assert value - plain == pytest.approx(atoms.get_potential_energy())
        assert value < plain


def test_a_folder_without_systems_is_told(tmp_path: Path):
    with pytest.raises(InputError, match=r"no type_map.raw below it; expected folders of DeePMD's npy"):
        list(force_field.read_systems(tmp_path))
