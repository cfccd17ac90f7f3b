"""The edge form: equal to the release, exported and compiled, for any sizes; what is wrong is refused."""

import copy
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from mffm.config.base import validate
from mffm.config.model import ModelConfig
from mffm.data.neighbors import neighbor_list
from mffm.data.references import ElementReferences
from mffm.deploy.ase import Calculator
from mffm.deploy.at_fidelity import geometry
from mffm.deploy.edges import EdgeModel, compile_export, evaluate, export, load, of_release, predictor
from mffm.deploy.edges.export import require_outputs
from mffm.errors import InputError
from mffm.fidelity import Fidelity, FidelityTable
from mffm.release import Loaded, PotentialSpec
from mffm.release import load as load_release
from mffm.release.outputs import Outputs, compare

GOLDEN = Path(__file__).parents[2] / "golden" / "release-v2"
TINY = {
    "cutoff": 4.0, "lmax": 1, "l_message": 1, "layers": 1, "channels": 4, "edge_channels": 4,
    "n_radial": 4, "radial_hidden": 4, "ff_expansion": 1, "body_order": 2,
}  # fmt: skip


pytestmark = pytest.mark.timeout(1200)  # an export is 10 s of one CPU, which other work may hold


def structures() -> dict[str, Atoms]:
    triclinic = bulk("Cu", "fcc", a=3.7)  # primitive: one atom, far smaller than the cutoff
    triclinic.set_cell(triclinic.cell.array @ (np.eye(3) + 0.05 * np.arange(9).reshape(3, 3) % 0.11), scale_atoms=True)
    alloy = bulk("Au", "fcc", a=3.9, cubic=True)
    alloy.numbers[1] = 29
    alloy.rattle(0.1, seed=2)
    slab = alloy.copy()
    slab.pbc = [True, True, False]
    return {
        "molecule": molecule("CH3CH2OH"), "triclinic": triclinic, "alloy": alloy, "slab": slab,
        "dimer": Atoms("CO", [[0, 0, 0], [0, 0, 1.1]]), "lone atom": Atoms("O"),
        "far apart": Atoms("OH", [[0] * 3, [9] * 3]),
    }  # fmt: skip


def assert_equal_to_the_calculator(model: EdgeModel, release: Path, tolerance: float):
    d = model.description
    for name, atoms in structures().items():
        atoms.calc = Calculator(release, d.fidelity, dtype=d.dtype)
        found = evaluate(model, *geometry(atoms))
        wanted = atoms.calc.get_property("energies", atoms)
        scale = max(1.0, float(np.abs(atoms.get_forces()).max()))
        np.testing.assert_allclose(found.energies, wanted, atol=tolerance * scale, rtol=1e-12, err_msg=name)
        np.testing.assert_allclose(found.forces, atoms.get_forces(), atol=tolerance * scale, err_msg=name)
        assert found.energy == pytest.approx(wanted.sum(), abs=tolerance * scale)
        if atoms.pbc.all():
            stress = atoms.get_stress(voigt=False)
            np.testing.assert_allclose(found.virial / atoms.get_volume(), stress, atol=tolerance * scale, err_msg=name)


def test_equals_the_calculator(layered_run: Path):
    assert_equal_to_the_calculator(of_release(layered_run, "pbe"), layered_run, 1e-11)
    assert_equal_to_the_calculator(of_release(layered_run, "pbe", "float32"), layered_run, 1e-4)


def test_exported_equals_the_calculator_for_all_sizes(layered_run: Path, from_file: EdgeModel):
    assert_equal_to_the_calculator(from_file, layered_run, 1e-11)


def test_reproduces_the_reference_outputs_of_a_release():
    loaded = load_release(GOLDEN)
    assert loaded.contents is not None
    stored = Outputs.from_dict(loaded.contents.documents["outputs.json"], "golden")
    for fidelity in loaded.fidelities.names:
        own = replace(stored, values={fidelity: stored.values[fidelity]})
        found = compare(own, predictor(of_release(GOLDEN, fidelity)))
        assert len(found) > 20
        assert all(d.is_within for d in found)
        other = replace(stored, values={fidelity: list(reversed(stored.values[fidelity]))})
        assert not all(d.is_within for d in compare(other, predictor(of_release(GOLDEN, fidelity))))


def test_reference_outputs_are_compared_where_the_fidelity_has_the_elements():
    contents = load_release(GOLDEN).contents
    assert contents is not None
    model = of_release(GOLDEN, "pbe")
    documents = copy.deepcopy(contents.documents)
    documents["outputs.json"]["structures"][3]["numbers"][0] = 79
    found = require_outputs(model, replace(contents, documents=documents))
    assert {d.structure for d in found} == set(range(10)) - {3}
    documents["outputs.json"]["structures"][4]["fidelities"]["pbe"]["forces"][0][0] += 1e-3
    with pytest.raises(InputError, match=r"structure 4 at 'pbe': forces differs by 0\.001"):
        require_outputs(model, replace(contents, documents=documents))


def list_of(model: EdgeModel, atoms: Atoms) -> list[torch.Tensor]:
    numbers, positions, cell, pbc = geometry(atoms)
    receivers, senders, shifts = neighbor_list(positions, cell, pbc, model.cutoff)
    vectors = positions[senders] - positions[receivers] + shifts @ cell
    return [
        torch.as_tensor(vectors, dtype=model.dtype), torch.as_tensor(numbers),
        torch.as_tensor(np.stack([receivers, senders])), torch.ones(len(atoms), dtype=torch.bool),
    ]  # fmt: skip


def test_mask_leaves_energies_out_and_their_derivatives(layered_run: Path, from_file: EdgeModel):
    rij, z, index, mask = list_of(of_release(layered_run, "pbe"), structures()["alloy"])
    mask[2:] = False
    for model in (of_release(layered_run, "pbe"), from_file):
        values = model(rij, z, index, mask)
        assert float(values.energy) == pytest.approx(float(values.energies[:2].sum()), abs=1e-10)
        edge, h = 7, 1e-5
        for axis in range(3):
            moved = [rij.clone(), rij.clone()]
            moved[0][edge, axis] += h
            moved[1][edge, axis] -= h
            up, down = (float(model(r, z, index, mask).energies[:2].sum()) for r in moved)
            assert float(values.gradient[edge, axis]) == pytest.approx((up - down) / (2 * h), abs=1e-6)


def test_order_of_edges_and_atoms_without_a_say_do_not_matter(layered_run: Path):
    model = of_release(layered_run, "pbe")
    rij, z, index, mask = list_of(model, structures()["molecule"])
    first = model(rij, z, index, mask)
    order = torch.randperm(len(rij), generator=torch.Generator().manual_seed(0))
    more = torch.cat([z, z.new_tensor([79, 1])])
    second = model(rij[order], more, index[:, order], torch.cat([mask, mask.new_zeros(2)]))
    assert float(second.energy) == pytest.approx(float(first.energy), abs=1e-10)
    torch.testing.assert_close(second.gradient, first.gradient[order], atol=1e-12, rtol=0)


WRONG: dict[str, tuple[Callable[..., list[torch.Tensor]], str]] = {
    "dtype": (lambda r, z, i, m: [r.float(), z, i, m], r"rij: torch.float32 .* expected torch.float64"),
    "shape": (lambda r, z, i, m: [r, z, i[:, 1:], m], r"edge_index: .* expected torch.int64 \[2, "),
    "transposed": (lambda r, z, i, m: [r, z, i.T, m], r"edge_index: .* expected"),
    "index": (lambda r, z, i, m: [r, z, i + 1, m], r"edge_index: index 9; there are 9 atoms"),
    "negative": (lambda r, z, i, m: [r, z, i - 1, m], r"edge_index: index -1"),
    "element": (lambda r, z, i, m: [r, torch.where(z == 8, 7, z), i, m], r"element N is unknown .* H C O Cu Au"),
    "nothing": (lambda r, z, i, m: [r, torch.where(z == 8, 0, z), i, m], r"with atomic number 0 is unknown"),
    "number": (lambda r, z, i, m: [r, z * 100, i, m], r"element .* is unknown"),
    "Bohr": (lambda r, z, i, m: [r / 0.5291772, z, i, m], r"at most the cutoff, 3.5 Å"),
    "itself": (lambda r, z, i, m: [torch.zeros_like(r), z, i, m], r"edges of 0 to 0 Å"),
    "nan": (lambda r, z, i, m: [r * float("nan"), z, i, m], r"edges of nan"),
    "mask": (lambda r, z, i, m: [r, z, i, m.long()], r"mask: torch.int64 .* expected torch.bool"),
    "empty": (lambda r, z, i, m: [r[:0], z[:0], i[:, :0], m[:0]], r"no atoms"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_refused(layered_run: Path, case: str):
    model = of_release(layered_run, "pbe")
    change, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        model(*change(*list_of(model, structures()["molecule"])))


def test_an_export_says_what_it_is(from_file: EdgeModel, layered_run: Path):
    d = from_file.description
    assert (d.fidelity, d.elements, d.cutoff, d.n_layers, d.dtype) == (
        "pbe",
        ("H", "C", "O", "Cu", "Au"),
        3.5,
        2,
        "float64",
    )
    assert d.reach == 7.0
    assert d.weights_sha256 == load_release(layered_run).weights_sha256
    assert d.versions["torch"] == torch.__version__


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for item in old.infolist():
            data = old.read(item)
            if item.filename.endswith("mffm.json"):
                about = json.loads(data)
                change(about)
                data = json.dumps(about).encode()
            new.writestr(item, data)
    return target


def test_files_that_are_not_right_are_refused(exported: Path, tmp_path: Path):
    def scaled(about: dict[str, Any]) -> None:
        about["probe"]["answer"]["gradient"] = (1.001 * np.array(about["probe"]["answer"]["gradient"])).tolist()

    with pytest.raises(InputError, match="gradient of the probe in it differs by"):
        load(rewritten(exported, tmp_path / "a.pt2", scaled))
    with pytest.raises(InputError, match="version 2 of the format, this mffm reads 1"):
        load(rewritten(exported, tmp_path / "b.pt2", lambda about: about.update(version=2)))
    with pytest.raises(InputError, match="lacks probe"):
        load(rewritten(exported, tmp_path / "c.pt2", lambda about: about.pop("probe") and None))
    with pytest.raises(InputError, match="holds no compiled code"):
        load(exported, compiled=True)
    (tmp_path / "d.pt2").write_bytes(exported.read_bytes()[:-3000])
    with pytest.raises(InputError, match="not an export of mffm, or damaged"):
        load(tmp_path / "d.pt2")
    with zipfile.ZipFile(tmp_path / "e.pt2", "w") as other:
        other.writestr("model.json", "{}")
    with pytest.raises(InputError, match="mffm export has not written"):
        load(tmp_path / "e.pt2")
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "f.pt2")


def bare(model: dict[str, Any], references: dict[str, float]) -> Loaded:
    torch.manual_seed(0)
    spec = PotentialSpec(
        validate(ModelConfig, {"heads": {"hidden": [4]}, **model}, "test"), FidelityTable([Fidelity("pbe", "PBE")]),
        ElementReferences.from_dict({"references": {"pbe": references}}), avg_neighbors=4.0, scale=1.0,
    )  # fmt: skip
    return Loaded(spec, spec.build(), Path("bare"), "best", "")


@pytest.mark.filterwarnings("ignore:bare")
def test_potentials_without_an_edge_form_are_refused():
    of = {"H": -1.0, "O": -2.0}
    with pytest.raises(InputError, match="DFT-D3 has no edge form"):
        of_release(bare({"backbone": TINY, "d3": {"pbe": {"functional": "pbe"}}}, of), "pbe")
    with pytest.raises(InputError, match="direct heads"):
        of_release(bare({"backbone": TINY, "forces": "direct"}, of), "pbe")
    with pytest.raises(InputError, match="no element references"):
        of_release(bare({"backbone": TINY}, {}), "pbe")
    with pytest.raises(InputError, match="takes no charge"):
        of_release(bare({"backbone": TINY}, of), "pbe", charge=1)
    with pytest.raises(InputError, match=r"ends in \.pt2"):
        export(bare({"backbone": TINY}, of), "model.pt", "pbe")


def test_charge_and_spin_are_fixed_in_the_form():
    loaded = bare({"backbone": {**TINY, "charge_and_spin": True}}, {"H": -1.0, "O": -2.0})
    backbone = loaded.potential.learned.backbone
    torch.nn.init.normal_(backbone.charges.weight)
    torch.nn.init.normal_(backbone.spins.weight)
    atoms = molecule("H2O")
    atoms.info.update(charge=1, spin_multiplicity=2)
    atoms.calc = Calculator(loaded, "pbe", dtype="float64")
    model = of_release(loaded, "pbe", charge=1, spin_multiplicity=2)
    assert evaluate(model, *geometry(atoms)).energy == pytest.approx(atoms.get_potential_energy(), abs=1e-10)
    assert abs(evaluate(of_release(loaded, "pbe"), *geometry(atoms)).energy - atoms.get_potential_energy()) > 1e-3
    with pytest.raises(InputError, match="charge 99"):
        of_release(loaded, "pbe", charge=99)


@pytest.mark.slow
def test_compiled_equals_the_calculator(layered_run: Path, exported: Path, tmp_path: Path):
    model = compile_export(exported, tmp_path / "compiled.pt2")
    assert model.form == "compiled"
    assert_equal_to_the_calculator(model, layered_run, 1e-10)
    assert load(tmp_path / "compiled.pt2", compiled=False).form == "exported"
    for key, value, message in (
        ("torch", "1.0", "torch 1.0 there"),
        ("isa", "AVX9", "isa AVX9 there"),
        ("cpu_features", ["warp"], "this CPU lacks warp"),
    ):
        elsewhere = rewritten(
            tmp_path / "compiled.pt2",
            tmp_path / f"{key}.pt2",
            lambda about: about["machine"].update({key: value}),  # noqa: B023
        )
        with pytest.raises(InputError, match=f"compiled for another machine .*{message}.* --compile"):
            load(elsewhere)


@pytest.mark.slow
def test_escn_equals_the_calculator_and_can_be_exported(tmp_path: Path):
    pytest.importorskip("fairchem")
    backbone = {
        "kind": "escn", "cutoff": 3.5, "lmax": 1, "mmax": 1, "layers": 1, "sphere_channels": 8, "hidden_channels": 8,
        "edge_channels": 8, "n_radial": 8,
    }  # fmt: skip
    loaded = bare({"backbone": backbone}, {"H": -1.0, "C": -3.0, "O": -2.0, "Cu": -4.0, "Au": -5.0})
    assert of_release(loaded, "pbe").description.n_layers == 2  # it embeds edges before its first layer
    assert_equal_to_the_calculator(of_release(loaded, "pbe"), loaded, 1e-10)  # type: ignore[arg-type]
    assert_equal_to_the_calculator(export(loaded, tmp_path / "escn.pt2", "pbe"), loaded, 1e-10)  # type: ignore[arg-type]


@pytest.mark.slow
def test_sevennet_equals_the_calculator_and_can_be_exported(tmp_path: Path):
    pytest.importorskip("sevenn")
    backbone = {
        "kind": "sevennet", "cutoff": 3.5, "elements": ["Au", "C", "Cu", "H", "O"], "envelope_from": None,
        "n_radial": 4, "irreps": ["4x0e", "4x0e+2x1e", "4x0e"], "lmax": 1, "radial_hidden": [4],
        "denominators": [3.0, 3.0], "self_connections": ["nequip", "linear"],
    }  # fmt: skip
    loaded = bare({"backbone": backbone}, {"H": -1.0, "C": -3.0, "O": -2.0, "Cu": -4.0, "Au": -5.0})
    assert of_release(loaded, "pbe").description.n_layers == 2
    assert_equal_to_the_calculator(of_release(loaded, "pbe"), loaded, 1e-10)  # type: ignore[arg-type]
    assert_equal_to_the_calculator(export(loaded, tmp_path / "sevennet.pt2", "pbe"), loaded, 1e-10)  # type: ignore[arg-type]


def test_the_command_says_what_is_missing(exported: Path, tmp_path: Path):
    from mffm.cli.export import export as command

    with pytest.raises(InputError, match="say which level of theory with --fidelity"):
        command(GOLDEN, tmp_path / "out.pt2")
    with pytest.raises(InputError, match=r"an export already; --compile"):
        command(exported, tmp_path / "out.pt2")
    with pytest.raises(InputError, match="no such release or run"):
        command(tmp_path / "nothing", tmp_path / "out.pt2", fidelity="pbe")
    assert not list(tmp_path.iterdir())
