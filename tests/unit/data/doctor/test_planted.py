"""Each planted fault gives its finding and no other; a set without a fault gives none."""

import numpy as np
import pytest

from mffm.data.doctor import examine
from mffm.data.ingest import ingest
from mffm.errors import InputError

HARTREE = 27.211386


def test_a_sound_set_has_no_finding(found, molecules, crystals):
    assert found(molecules) == {}
    assert found(crystals) == {}


def with_info(frames, **info):
    return [frame | {"info": info} for frame in frames]


def test_duplicate_that_was_turned(found, molecules, turned):
    assert found([*molecules, turned(molecules[7])]) == {"duplicates": "note"}


def test_many_copies_are_one_group(diagnose, molecules, turned):
    (finding,) = diagnose([*molecules, *[turned(molecules[7])] * 30]).findings
    assert "1 structure is there more than once, 30 frames too many" in finding.message


def test_crystal_in_a_larger_cell(found, crystals):
    one = crystals[3]
    cell = one["cell"] * [[2], [1], [1]]
    double = {
        "numbers": np.tile(one["numbers"], 2),
        "positions": np.concatenate([one["positions"], one["positions"] + one["cell"][0]]),
        "cell": cell,
        "energy": 2 * one["energy"],
        "forces": np.tile(one["forces"], (2, 1)),
        "stress": one["stress"],
    }
    assert found([*crystals, double]) == {"duplicates": "note"}


@pytest.mark.parametrize("fault", [{"energy": 0.4}, {"forces": 0.3}])
def test_conflicting_labels(diagnose, molecules, turned, fault):
    copy = turned(molecules[7])
    changed = dict(copy)
    if "energy" in fault:
        changed["energy"] = copy["energy"] + fault["energy"]
    else:
        changed["forces"] = copy["forces"] + fault["forces"] * np.array([[1], [-1], [0], [0], [0]])
    findings = {f.check: f for f in diagnose([*molecules, changed]).findings}
    assert set(findings) == {"duplicates", "conflict"}
    assert findings["conflict"].severity == "error"
    ((places, _),) = findings["conflict"].evidence
    assert "set0.extxyz:7" in places
    assert "set0.extxyz:60" in places


def test_other_charge_is_no_conflict(found, molecules, turned):
    copy = turned(molecules[7])
    copy["energy"] += 0.5
    frames = [f | {"info": {"charge": 0}} for f in molecules]
    assert found([*frames, copy | {"info": {"charge": 1}}]) == {}


def test_nearly_the_same(found, molecules):
    near = dict(molecules[7])
    near["positions"] = near["positions"] + np.array([[0.004, 0, 0], [-0.004, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert found([*molecules, near]) == {"near_duplicates": "note"}


def test_leaks_between_splits(found, molecules, turned):
    train, test = with_info(molecules[:40], split="train"), with_info(molecules[40:], split="test")
    assert found([*train, *test]) == {}
    assert found([*train, *test, turned(train[3]) | {"info": {"split": "test"}}]) == {"leak": "error"}
    near = dict(train[3], info={"split": "test"})
    near["positions"] = near["positions"] + np.array([[0.004, 0, 0], [-0.004, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert found([*train, *test, near]) == {"near_leak": "warning"}


def test_overlap_of_two_files(diagnose, molecules, turned):
    (finding,) = diagnose(molecules[:40], [*molecules[40:], *map(turned, molecules[5:8])]).findings
    assert (finding.check, finding.severity) == ("overlap", "warning")
    assert "3 structures are in set0.extxyz and set1.extxyz" in finding.message


def test_ids_in_two_files(found, molecules):
    first = [f | {"info": {"mp_id": f"mp-{i // 5}"}} for i, f in enumerate(molecules[:40])]
    other = [f | {"info": {"mp_id": f"mp-{100 + i}"}} for i, f in enumerate(molecules[40:])]
    assert found(first, other) == {}
    assert found(first, [*other[:-1], other[-1] | {"info": {"mp_id": "mp-3"}}]) == {"shared_ids": "warning"}


def test_energy_outlier(diagnose, molecules):
    molecules[7] = molecules[7] | {"energy": molecules[7]["energy"] + 30.0}
    (finding,) = diagnose(molecules).findings
    assert (finding.check, finding.severity) == ("energy_outliers", "warning")
    ((place, what),) = finding.evidence
    assert place.endswith("set0.extxyz:7")
    assert what.startswith("+6")


def test_large_force(found, molecules):
    molecules[7] = molecules[7] | {"forces": molecules[7]["forces"] + 150 * np.array([[1], [-1], [0], [0], [0]])}
    assert found(molecules) == {"large_forces": "warning"}


def test_net_force(found, molecules):
    for size, severity in ((0.004, "note"), (0.05, "warning")):
        changed = molecules[7] | {"forces": molecules[7]["forces"] + [0, size, 0]}
        assert found([*molecules[:7], changed, *molecules[8:]]) == {"net_force": severity}


@pytest.mark.parametrize("what", ["energy", "forces"])
def test_zero_for_a_missing_label(found, molecules, what):
    molecules[7] = molecules[7] | {what: np.zeros(np.shape(molecules[7][what]))}
    assert found(molecules) == {"zeros": "warning"}


def test_lone_and_overlapping_atoms(found, molecules):
    far, close = dict(molecules[7]), dict(molecules[8])
    far["positions"] = far["positions"] + np.array([[0, 0, 0], [20.0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert found([*molecules[:7], far, *molecules[8:]]) == {"lone_atoms": "warning"}
    close["positions"] = close["positions"] + np.array([[0, 0, 0], [-0.55, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]])
    assert found([*molecules[:8], close, *molecules[9:]]) == {"overlapping_atoms": "warning"}


def test_frames_that_an_ingest_leaves_out(diagnose, molecules):
    bad = dict(molecules[7], positions=molecules[7]["positions"] * [0, 0, 0])
    diagnosis = diagnose([*molecules, bad, dict(molecules[8], energy="nan")])
    assert {(f.check, f.severity) for f in diagnosis.findings} == {("rejected", "warning")}
    assert diagnosis.n_rejected == 2
    assert diagnosis.n_frames == 60


def test_element_in_one_structure(found, molecules):
    changed = dict(molecules[7], numbers=np.array([14, 1, 1, 1, 1]), energy=-7900.0)
    assert found([*molecules, changed]) == {"rare_elements": "note"}


def test_missing_labels(diagnose, molecules):
    frames = [*molecules[:50], *({k: v for k, v in f.items() if k != "forces"} for f in molecules[50:])]
    (finding,) = diagnose(frames).findings
    assert (finding.check, finding.severity) == ("missing_labels", "note")
    assert "10 of 60 labelled frames have no forces" in finding.message


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda f: f | {"energy": f["energy"] / HARTREE}, "energy_unit"),
        (lambda f: f | {"forces": -f["forces"]}, "forces"),
        (lambda f: f | {"forces": f["forces"] / HARTREE}, "energy_unit"),
    ],
)
def test_units_and_signs_of_energy_and_forces(found, molecules, change, check):
    assert found([change(f) for f in molecules]) == {check: "error"}


def test_sign_and_unit_of_stress(found, crystals):
    assert found([f | {"stress": -f["stress"]} for f in crystals]) == {"stress_sign": "error"}
    in_kbar = found([f | {"stress": 1602.2 * f["stress"]} for f in crystals])
    assert in_kbar == {"stress_unit": "error", "large_stress": "warning"}


def test_pressure_of_compressed_cells(found, structures):
    """Frames of which no two have the same composition tell the sign too, by what solids hold."""
    frames = [structures.crystal(0.0, scale) for scale in np.linspace(0.65, 0.75, 12)]
    for i, frame in enumerate(frames):
        frame["numbers"] = np.array([14, 8, 8, 20 + i])  # another element in each
    ignored = {"rare_elements"}
    assert set(found(frames)) <= ignored
    assert set(found([f | {"stress": -f["stress"]} for f in frames])) - ignored == {"stress_sign"}
    in_kbar = found([f | {"stress": 1602.2 * f["stress"]} for f in frames])
    assert set(in_kbar) - ignored == {"stress_unit", "large_stress"}


def test_elements_in_cells_of_one_atom_are_crystals(diagnose, structures):
    """They are duplicates like any other; a free atom in a box is not."""
    copper = {"numbers": np.array([29]), "positions": np.zeros((1, 3)), "energy": -3.7}
    copper["cell"] = np.array([[0, 1.8, 1.8], [1.8, 0, 1.8], [1.8, 1.8, 0]])
    box = copper | {"cell": 12.0 * np.eye(3), "energy": -0.2}
    moved = {"positions": np.array([[0.3, 0.2, 0.1]])}
    findings = diagnose([copper, copper | moved, box, box | moved]).findings
    assert [f.check for f in findings] == ["duplicates"]
    assert "1 structure is there more than once, 1 frames too many" in findings[0].message


def test_two_levels_under_one_name(diagnose, molecules):
    shifted = [f | {"energy": f["energy"] + 5.0} for f in molecules[30:]]
    (finding,) = diagnose(molecules[:30], shifted).findings
    assert (finding.check, finding.severity) == ("level_of_theory", "error")
    assert "30 energies of set1.extxyz off by +" in finding.message


def test_two_levels_on_shared_structures(found, molecules, turned):
    """A shift too small for the element fits shows where both files have the same structures."""
    other = [turned(f) | {"energy": f["energy"] + 0.02} for f in molecules[25:30]]
    assert found(molecules[:30], [*molecules[30:], *other]) == {"level_of_theory": "error", "overlap": "warning"}


def atom(z: int, energy: float):
    return {"numbers": np.array([z]), "positions": np.zeros((1, 3)), "energy": energy}


def test_isolated_atoms(found, molecules):
    """Carbon and hydrogen that methane's bonds fit to, a singlet carbon, and atoms of another code."""
    right = [atom(1, -13.6), atom(6, -1028.6)]
    assert found([*molecules, *right]) == {}
    assert found([*molecules, atom(1, -13.6), atom(6, -1026.2)]) == {"isolated_atoms": "warning"}
    assert found([*molecules, atom(1, -13.6), atom(6, -148.0)]) == {"isolated_atoms": "error"}


def test_benchmark_by_geometry(diagnose, molecules, turned, write_frames):
    held = write_frames(
        "held.extxyz", [turned(molecules[4]), {"numbers": np.array([8, 1]), "positions": np.eye(3)[:2]}]
    )
    (finding,) = diagnose(molecules, against=[held]).findings
    assert (finding.check, finding.severity) == ("benchmark", "error")
    assert "1 of 2 structures" in finding.message


def test_benchmark_by_prototype(found, crystals, write_frames):
    """The same compound with another lattice constant."""
    pytest.importorskip("spglib")
    salt = {
        "numbers": np.array([11] * 4 + [17] * 4),
        "positions": 5.6 * np.array(
            [[0, 0, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5],
             [0.5, 0, 0], [0, 0.5, 0], [0, 0, 0.5], [0.5, 0.5, 0.5]]
        ),
        "cell": 5.6 * np.eye(3),
    }  # fmt: skip
    blende = salt | {"positions": np.concatenate([salt["positions"][:4], salt["positions"][:4] + 1.4])}
    larger = {k: v * (1.02 if k in ("positions", "cell") else 1) for k, v in salt.items()}
    data = [*crystals, salt | {"energy": -27.0}, salt | {"positions": salt["positions"] + 1.0, "energy": -27.0}]
    expected = {"missing_labels", "duplicates"}
    assert set(found(data, against=[write_frames("same.extxyz", [larger])])) - expected == {"benchmark_prototype"}
    assert set(found(data, against=[write_frames("other.extxyz", [blende])])) - expected == set()


def test_a_store_and_what_its_ingest_rejected(molecules, turned, write_frames, data_config, tmp_path):
    """The ingest keeps the first of two labels; a turned copy it takes for another structure."""
    train, test = with_info(molecules[:40], split="train"), with_info(molecules[40:], split="test")
    conflicting = dict(train[2], energy=train[2]["energy"] + 1.0)
    write_frames("data.extxyz", [*train, *test, turned(train[3]) | {"info": {"split": "test"}}, conflicting])
    ingest(data_config(splits={"key": "split"}), tmp_path, progress=False)
    diagnosis = examine([tmp_path / "store"])
    assert {f.check: f.severity for f in diagnosis.findings} == {"leak": "error", "conflict": "error"}
    assert diagnosis.fidelities == ["pbe", "ccsdt"]


def test_nothing_to_examine(tmp_path, write_frames):
    with pytest.raises(InputError, match="no such file"):
        examine([tmp_path / "none.extxyz"])
    with pytest.raises(InputError, match="no store there"):
        examine([tmp_path])
    lone = write_frames("bad.extxyz", [{"numbers": np.array([1, 1]), "positions": np.zeros((2, 3)), "energy": 1.0}])
    with pytest.raises(InputError, match=r"no frame that can be examined; the first is left out for: atoms 0 and 1"):
        examine([lone])
