"""Published layouts, each written with the library that writes the published files, from the same labelled frames."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.db import connect
from ase.units import Bohr, GPa, Hartree


@dataclass
class Sample:
    """A frame in mffm's units, with labels that are numbers of no meaning but of the right size."""

    atoms: Atoms
    energy: float
    forces: np.ndarray
    stress: np.ndarray | None = None  # [3, 3], ASE's sign
    moments: np.ndarray | None = None
    charge: int = 0
    multiplicity: int = 1
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.atoms)

    def calculated(self) -> Atoms:
        atoms = self.atoms.copy()
        stress = {} if self.stress is None else {"stress": self.stress[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]}
        atoms.calc = SinglePointCalculator(atoms, energy=self.energy, forces=self.forces, **stress)
        return atoms


def crystals(n: int, seed: int = 0) -> list[Sample]:
    """Distorted cells of four atoms: small enough for a file of a few kB, no symmetry."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(n):
        cell = 4.2 * np.eye(3) + rng.normal(0, 0.1, (3, 3))
        fractional = np.array([[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]) + rng.normal(0, 0.02, (4, 3))
        stress = rng.normal(0, 0.02, (3, 3))
        samples.append(
            Sample(
                Atoms("FeFeOO", scaled_positions=fractional, cell=cell, pbc=True),
                float(rng.normal(-25, 0.3)),
                rng.normal(0, 0.5, (4, 3)),
                0.5 * (stress + stress.T),
                np.array([3.1, -3.0, 0.05, 0.04]) + rng.normal(0, 0.01, 4),
            )
        )
    return samples


def molecules(n: int, seed: int = 1) -> list[Sample]:
    """Distorted hydroxide ions with a water, charge −1, doublets for want of sense."""
    rng = np.random.default_rng(seed)
    rest = np.array([[0, 0, 0], [0.97, 0, 0], [2.6, 0, 0], [2.9, 0.9, 0], [2.9, -0.9, 0.1]])
    return [
        Sample(
            Atoms("OHOHH", rest + rng.normal(0, 0.05, (5, 3))),
            float(rng.normal(-4150, 0.3)),
            rng.normal(0, 0.5, (5, 3)),
            charge=-1,
            multiplicity=2,
        )
        for _ in range(n)
    ]


def _structure(sample: Sample, **properties: Any) -> Any:
    from pymatgen.core import Structure

    return Structure(
        sample.atoms.cell.array, sample.atoms.get_chemical_symbols(), sample.atoms.get_scaled_positions(wrap=False),
        site_properties=properties or None,
    )  # fmt: skip


def mptrj(folder: Path, samples: list[Sample]) -> Path:
    content: dict[str, Any] = {}
    for k, sample in enumerate(samples):
        content.setdefault(f"mp-{k // 3}", {})[f"mp-{k // 3}-0-{k % 3}"] = {
            "structure": _structure(sample).as_dict(),
            "uncorrected_total_energy": sample.energy,
            "corrected_total_energy": sample.energy - 1.374,
            "energy_per_atom": (sample.energy - 1.374) / sample.n,
            "force": sample.forces.tolist(),
            "stress": (-sample.stress / (0.1 * GPa)).tolist(),
            "magmom": sample.moments.tolist() if k % 3 else None,
            "bandgap": None,
            "mp_id": f"mp-{k // 3}",
        }
    path = folder / "MPtrj_2022.9_full.json"
    path.write_text(json.dumps(content))
    return path


def matpes(folder: Path, samples: list[Sample]) -> Path:
    from monty.json import MontyEncoder

    records = [
        {
            "matpes_id": f"matpes-20240101_{k}_0",
            "structure": _structure(sample),
            "energy": sample.energy,
            "forces": sample.forces,
            "stress": (-sample.stress / (0.1 * GPa))[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]],
            "bandgap": 0.0,
            "functional": "PBE",
            "provenance": {"original_mp_id": f"mp-{k // 2}", "md_step": None},
        }
        for k, sample in enumerate(samples)
    ]
    path = folder / "MatPES-2025.1.json.gz"
    path.write_bytes(gzip.compress(json.dumps(records, cls=MontyEncoder).encode()))
    return path


def alexandria(folder: Path, samples: list[Sample]) -> Path:
    from pymatgen.entries.computed_entries import ComputedStructureEntry

    entries = [
        ComputedStructureEntry(
            _structure(sample, forces=sample.forces.tolist(), magmom=sample.moments.tolist()),
            sample.energy - 0.7,
            correction=-0.7,
            data={"mat_id": f"agm{k:09d}", "energy_total": sample.energy, "e_above_hull": 0.01, "decomposition": "FeO"},
        ).as_dict()
        for k, sample in enumerate(samples)
    ]
    path = folder / "alexandria_000.json.bz2"
    path.write_bytes(bz2.compress(json.dumps({"entries": entries}).encode()))
    return path


def _aselmdb(folder: Path, samples: list[Sample], data: Callable[[int, Sample], dict[str, Any]]) -> Path:
    path = folder / "data.0000.aselmdb"
    with connect(str(path), type="aselmdb", use_lock_file=False) as database:
        for k, sample in enumerate(samples):
            database.write(sample.calculated(), data=data(k, sample))
    return path


def omat24(folder: Path, samples: list[Sample]) -> Path:
    return _aselmdb(folder, samples, lambda k, sample: {"sid": f"agm-{k}", "calc_id": k})


def omol25(folder: Path, samples: list[Sample]) -> Path:
    return _aselmdb(
        folder, samples, lambda k, sample: {"charge": sample.charge, "spin": sample.multiplicity, "source": f"x/{k}"}
    )


def oc20(folder: Path, samples: list[Sample]) -> Path:
    from ase.constraints import FixAtoms

    plain = folder / "0.extxyz"
    for sample in samples:
        sample.atoms.set_constraint(FixAtoms([0]))
        atoms = sample.calculated()
        atoms.calc.results["free_energy"] = sample.energy
        ase.io.write(plain, atoms, append=True)
    path = folder / "0.extxyz.xz"
    path.write_bytes(lzma.compress(plain.read_bytes()))
    plain.unlink()
    (folder / "0.txt.xz").write_bytes(
        lzma.compress(b"".join(b"random%d,frame0,-1.0\n" % k for k in range(len(samples))))
    )
    return path


def spice(folder: Path, samples: list[Sample]) -> Path:
    import h5py

    path = folder / "SPICE-2.0.1.hdf5"
    with h5py.File(path, "w") as file:
        for name, some in (("[OH-].O", samples[::2]), ("103147721", samples[1::2])):
            group = file.create_group(name)
            group["subset"] = ["SPICE Ion Pairs"]
            group["smiles"] = ["[O-:1][H:2].[O:3]([H:4])[H:5]"]
            group["atomic_numbers"] = some[0].atoms.numbers.astype("i2")
            group["conformations"] = np.array([s.atoms.positions for s in some]) / Bohr
            group["dft_total_energy"] = np.array([s.energy for s in some]) / Hartree
            group["dft_total_gradient"] = np.array([-s.forces for s in some]) * Bohr / Hartree
            group["formation_energy"] = np.zeros(len(some))
            group["wiberg_lowdin_indices"] = np.zeros((len(some), 5, 5), "f4")
    return path


def ani1x(folder: Path, samples: list[Sample]) -> Path:
    """Every second structure has CCSD(T); HF with the large bases is nowhere but on the first of each group."""
    import h5py

    path = folder / "ani1x-release.h5"
    with h5py.File(path, "w") as file:
        for name, some in (("H3O2", samples[: len(samples) // 2]), ("H3O2b", samples[len(samples) // 2 :])):
            group = file.create_group(name)
            energies = np.array([s.energy for s in some]) / Hartree
            group["atomic_numbers"] = some[0].atoms.numbers.astype("u1")
            group["coordinates"] = np.array([s.atoms.positions for s in some])
            group["wb97x_dz.energy"] = energies
            group["wb97x_dz.forces"] = np.array([s.forces for s in some]) / Hartree
            group["ccsd(t)_cbs.energy"] = np.where(np.arange(len(some)) % 2, energies + 0.1, np.nan)
            for basis, shift in (("dz", 1.0), ("tz", 0.8), ("qz", 0.7)):
                there = np.arange(len(some)) == 0 if basis != "dz" else np.ones(len(some), bool)
                group[f"hf_{basis}.energy"] = np.where(there, energies + shift, np.nan)
            group["wb97x_tz.energy"] = energies - 0.2
            group["wb97x_tz.forces"] = np.full((len(some), 5, 3), np.nan)
            group["wb97x_tz.forces"][0] = some[0].forces / Hartree
            group["wb97x_dz.cm5_charges"] = np.zeros((len(some), 5))
    return path


def qm7x(folder: Path, samples: list[Sample]) -> Path:
    import h5py

    path = folder / "1000.hdf5"
    with h5py.File(path, "w") as file:
        for k, sample in enumerate(samples):
            group = file.create_group(f"{k // 3 + 1}/Geom-m{k // 3 + 1}-i1-c1-{k % 3 or 'opt'}")
            group["atNUM"] = sample.atoms.numbers
            group["atXYZ"] = sample.atoms.positions
            group["ePBE0+MBD"] = [sample.energy]
            group["ePBE0"] = [sample.energy + 0.1]
            group["totFOR"] = sample.forces
            group["hCHG"] = np.zeros((sample.n, 1))
    return path


def transition1x(folder: Path, samples: list[Sample]) -> Path:
    """Reactions of a path of frames with the two ends and the saddle point; `data` holds every reaction once more."""
    import h5py

    def write(group: Any, some: list[Sample]) -> None:
        group["atomic_numbers"] = some[0].atoms.numbers
        group["positions"] = np.array([s.atoms.positions for s in some])
        group["wB97x_6-31G(d).energy"] = np.array([s.energy for s in some])
        group["wB97x_6-31G(d).forces"] = np.array([s.forces for s in some])

    path = folder / "Transition1x.h5"
    with h5py.File(path, "w") as file:
        splits = ("train", "val", "test")
        for k in range(0, len(samples), 4):
            split = splits[k // 4 % 3]
            reaction = file.create_group(f"{split}/H3O2/rxn{k:04d}")
            some = samples[k : k + 4]
            write(reaction, some[3:] or some[:1])
            for name, sample in zip(("reactant", "product", "transition_state"), some, strict=False):
                write(reaction.create_group(name), [sample])
            file[f"data/H3O2/rxn{k:04d}"] = reaction
        for split in splits:
            file.require_group(split)
    return path


def deepmd(folder: Path, samples: list[Sample]) -> Path:
    """What dpdata's ``to_deepmd_npy`` writes: types sorted by the map, sets of frames, float32 or float64."""
    system = folder / "FeO"
    system.mkdir()
    kinds = np.array([{"Fe": 0, "O": 1}[s] for s in samples[0].atoms.get_chemical_symbols()])
    np.savetxt(system / "type.raw", kinds, fmt="%d")
    (system / "type_map.raw").write_text("Fe\nO\n")
    half = (len(samples) + 1) // 2
    for k, some in enumerate((samples[:half], samples[half:])):
        part = system / f"set.{k:03d}"
        part.mkdir()
        np.save(part / "coord.npy", np.array([s.atoms.positions.ravel() for s in some]))
        np.save(part / "box.npy", np.array([s.atoms.cell.array.ravel() for s in some]))
        np.save(part / "energy.npy", np.array([s.energy for s in some]))
        np.save(part / "force.npy", np.array([s.forces.ravel() for s in some]))
        virial = [-s.stress.ravel() * s.atoms.get_volume() for s in some]
        np.save(part / "virial.npy", np.array(virial))
    return system / "type.raw"


VASPRUN = """<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <generator><i name="program" type="string">vasp </i><i name="version" type="string">6.4.2  </i></generator>
 <incar><i type="int" name="NELM">   60</i></incar>
 <kpoints><generation param="Gamma"><v type="int" name="divisions">       2        2        2 </v></generation>
  <varray name="kpointlist"><v>       0.00000000       0.00000000       0.00000000 </v></varray>
  <varray name="weights"><v>       1.00000000 </v></varray></kpoints>
 <parameters><separator name="electronic"><i type="int" name="NELM">    60</i><i type="int" name="ISPIN">     1</i>
  <i type="int" name="NELMIN">     2</i></separator><separator name="ionic"><i type="int" name="NSW">     9</i>
  <i type="int" name="IBRION">     2</i></separator></parameters>
 <atominfo><atoms>       {n} </atoms><types>       {kinds} </types>
  <array name="atoms"><dimension dim="1">ion</dimension><field type="string">element</field>
   <field type="int">atomtype</field><set>{atoms}</set></array>
  <array name="atomtypes"><dimension dim="1">type</dimension><field type="int">atomspertype</field>
   <field type="string">element</field><field>mass</field><field>valence</field>
   <field type="string">pseudopotential</field>
   <set>{types}</set></array></atominfo>
{initial}{steps}{final}</modeling>
"""


def vasprun(samples: list[Sample], n_electronic: Callable[[int], int] = lambda k: 7) -> str:
    """Return a vasprun.xml in VASP's layout."""
    atoms = samples[0].atoms
    symbols = atoms.get_chemical_symbols()
    kinds = list(dict.fromkeys(symbols))

    def rows(values: np.ndarray, name: str) -> str:
        lines = "".join("<v> " + " ".join(f"{x:20.14f}" for x in row) + " </v>\n" for row in values)
        return f'<varray name="{name}">\n{lines}</varray>\n'

    def structure(sample: Sample, name: str = "") -> str:
        cell, fractional = sample.atoms.cell.array, sample.atoms.get_scaled_positions(wrap=False)
        crystal = f'<crystal>{rows(cell, "basis")}<i name="volume"> {sample.atoms.get_volume():.8f} </i></crystal>'
        return f"<structure{name}>{crystal}{rows(fractional, 'positions')}</structure>\n"

    def energies(sample: Sample, tag: str = "energy") -> str:
        named = {"e_fr_energy": sample.energy - 0.02, "e_wo_entrp": sample.energy + 0.02, "e_0_energy": sample.energy}
        return f"<{tag}>" + "".join(f'<i name="{k}"> {v:16.8f} </i>' for k, v in named.items()) + f"</{tag}>\n"

    steps = ""
    for k, sample in enumerate(samples):
        scf = ("<scstep>" + energies(samples[0]) + "</scstep>\n") * n_electronic(k)
        steps += f"<calculation>\n{scf}{structure(sample)}{rows(sample.forces, 'forces')}"
        steps += f"{rows(-sample.stress / (0.1 * GPa), 'stress')}{energies(sample)}</calculation>\n"
    return VASPRUN.format(
        n=len(atoms), kinds=len(kinds),
        atoms="".join(f"<rc><c>{s:2s}</c><c>   {kinds.index(s) + 1}</c></rc>" for s in symbols),
        types="".join(
            f"<rc><c>   {symbols.count(s)}</c><c>{s:2s}</c><c> 16.0</c><c> 6.0</c><c> PAW_PBE {s} 08Apr2002 </c></rc>"
            for s in kinds
        ),
        initial=structure(samples[0], ' name="initialpos"'), steps=steps,
        final=structure(samples[-1], ' name="finalpos"'),
    )  # fmt: skip


def vasp(folder: Path, samples: list[Sample]) -> Path:
    path = folder / "relax" / "vasprun.xml"
    path.parent.mkdir()
    path.write_text(vasprun(samples))
    return path


def ase_db(folder: Path, samples: list[Sample]) -> Path:
    path = folder / "set.db"
    with connect(path) as database:
        for sample in samples:
            database.write(sample.calculated())
    return path


def extxyz(folder: Path, samples: list[Sample]) -> Path:
    path = folder / "set.extxyz"
    ase.io.write(path, [sample.calculated() for sample in samples])
    return path


@dataclass(frozen=True)
class Layout:
    """A published layout: how it is written, and of what."""

    write: Callable[[Path, list[Sample]], Path]
    make: Callable[..., list[Sample]]
    fidelity: str
    declared: bool = True  # whether the preset says the level of theory


LAYOUTS: dict[str, Layout] = {
    "mptrj": Layout(mptrj, crystals, "pbe_mp"),
    "matpes-pbe": Layout(matpes, crystals, "pbe_matpes"),
    "matpes-r2scan": Layout(matpes, crystals, "r2scan_matpes"),
    "alexandria": Layout(alexandria, crystals, "pbe_mp"),
    "omat24": Layout(omat24, crystals, "pbe_omat"),
    "salex": Layout(omat24, crystals, "pbe_mp"),
    "omol25": Layout(omol25, molecules, "wb97mv_tzvpd"),
    "oc20": Layout(oc20, crystals, "rpbe_oc20"),
    "spice": Layout(spice, molecules, "wb97md3_tzvppd"),
    "ani1x": Layout(ani1x, molecules, "wb97x_631gd"),
    "qm7x": Layout(qm7x, molecules, "pbe0_mbd"),
    "transition1x": Layout(transition1x, molecules, "wb97x_631gd_t1x"),
    "deepmd-npy": Layout(deepmd, crystals, "mine", declared=False),
    "vasp": Layout(vasp, crystals, "mine", declared=False),
    "ase-db": Layout(ase_db, crystals, "mine", declared=False),
    "extxyz": Layout(extxyz, crystals, "mine", declared=False),
}


def yaml_of(name: str, folder: Path, **source: Any) -> dict[str, Any]:
    """Return the content of a data YAML that reads a layout's folder by its preset."""
    layout = LAYOUTS[name]
    content: dict[str, Any] = {
        "store": str(folder / "store"),
        "sources": [{"name": name, "preset": name, "path": str(folder / "set"), **source}],
    }
    if not layout.declared:
        content["sources"][0]["fidelity"] = layout.fidelity
        content["fidelities"] = {layout.fidelity: {"level_of_theory": "PBE of this test"}}
    return content


@pytest.fixture
def layouts() -> dict[str, Layout]:
    return LAYOUTS


@pytest.fixture
def data_yaml() -> Callable[..., dict[str, Any]]:
    return yaml_of


@pytest.fixture
def samples() -> dict[str, Callable[..., list[Sample]]]:
    return {"crystals": crystals, "molecules": molecules}


@pytest.fixture
def make_vasprun() -> Callable[..., str]:
    return vasprun
