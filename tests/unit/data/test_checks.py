"""Checks: bad frames, and what a set says about its units and signs."""

import numpy as np
import pytest

from mffm.data import checks
from mffm.data.identity import geometry_hash, lookup_keys, same_geometry
from mffm.data.ingest import ingest
from mffm.data.store import Store
from mffm.frame import Frame

TRICLINIC = np.array([[4.0, 0, 0], [2.5, 3.0, 0], [1.0, -1.2, 3.5]])
PERIODIC = np.ones(3, bool)
FREE = np.zeros(3, bool)


def frame(**changes) -> Frame:
    values = {
        "atomic_numbers": np.array([8, 14], np.uint8),
        "positions": np.array([[0.0, 0, 0], [1.6, 0, 0]]),
        "cell": TRICLINIC,
        "pbc": PERIODIC,
        "labels": {("pbe", "energy"): np.float64(-1.0), ("pbe", "forces"): np.zeros((2, 3))},
    }
    return Frame(**(values | changes))


def test_a_good_frame_passes():
    assert checks.frame_fault(frame(), 0.3) == ""
    assert checks.frame_fault(frame(pbc=FREE, cell=np.zeros((3, 3))), 0.3) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positions": np.array([[0.0, 0, 0], [0.1, 0, 0]])}, "0 and 1 are 0.100 Å apart"),
        ({"positions": np.array([[0.05, 0, 0], [-0.1, 0, 0]]) + TRICLINIC.sum(0)}, "0.150 Å apart"),
        ({"cell": np.zeros((3, 3))}, "zero volume"),
        ({"cell": np.array([[4.0, 0, 0], [8.0, 0, 0], [0, 0, 4]])}, "zero volume"),
        ({"atomic_numbers": np.array([8, 119], np.uint8)}, "119 is outside"),
        ({"atomic_numbers": np.array([0, 8], np.uint8)}, "0 is outside"),
        ({"positions": np.array([[0.0, 0, 0], [np.inf, 0, 0]])}, "not finite"),
        ({"labels": {("pbe", "energy"): np.float64("nan")}}, "pbe energy: nan"),
        ({"labels": {("pbe", "forces"): np.full((2, 3), np.inf)}}, "pbe forces: inf"),
        ({"labels": {("pbe", "forces"): np.zeros((3, 3))}}, r"expected shape [2, 3], found [3, 3]"),
        ({"labels": {("pbe", "stress"): np.zeros(6)}}, "expected shape [3, 3], found [6]"),
    ],
)
def test_bad_frames(changes, reason):
    assert reason in checks.frame_fault(frame(**changes), 0.3)


def test_slab_without_a_third_vector_is_good():
    slab = np.array([[3.0, 0, 0], [0, 3.0, 0], [0, 0, 0]])
    assert checks.frame_fault(frame(cell=slab, pbc=np.array([True, True, False])), 0.3) == ""


@pytest.mark.parametrize("pbc", [PERIODIC, np.array([True, False, True]), FREE])
def test_closest_pair_is_that_of_all_images(pbc):
    """Against all images written out, in a skewed cell with atoms outside it, at radii up to the plane spacing."""
    rng = np.random.default_rng(3)
    shifts = np.array(list(np.ndindex(7, 7, 7))) - 3
    shifts = shifts[(shifts[:, ~pbc] == 0).all(1)]
    found = 0
    for within in (0.3, 0.9, 1.6):
        for _ in range(40):
            x = rng.uniform(-0.5, 1.5, (5, 3)) @ TRICLINIC
            best = np.inf
            for i in range(5):
                for j in range(5):
                    d = np.linalg.norm(x[j] - x[i] + shifts @ TRICLINIC, axis=1)
                    best = min(best, d[d > 0].min(initial=np.inf) if i == j else d.min())
            pair = checks.closest_pair(x, TRICLINIC, pbc, within)
            assert (pair is None) == (best >= within)
            if pair is not None:
                found += 1
                assert pair[0] == pytest.approx(best, abs=1e-9)
    assert found > 10


def test_many_atoms_take_the_neighbor_list():
    grid = np.stack(np.meshgrid(*[np.arange(7.0)] * 3), -1).reshape(-1, 3)
    cell = np.eye(3) * 7
    assert checks.closest_pair(grid, cell, PERIODIC, 0.5) is None
    grid[200] = grid[17] + [0.0, 0.1, 0.2]
    distance, i, j = checks.closest_pair(grid, cell, PERIODIC, 0.5)
    assert distance == pytest.approx(np.sqrt(0.05))
    assert {i, j} == {17, 200}


def test_same_structure_within_a_thousandth(structures):
    """Noise below 1e-3 Å, wrapping and reprinting keep a structure the same; a larger change does not."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        crystal = structures.crystal()
        z, x, cell = crystal["numbers"], crystal["positions"], crystal["cell"]
        keys = lookup_keys(z, x, cell, PERIODIC)
        moved = x + rng.uniform(-5e-4, 5e-4, x.shape) + rng.integers(-1, 2, (4, 3)) @ cell
        assert keys[0] in lookup_keys(z, moved, cell, PERIODIC)
        assert same_geometry((z, x, cell, PERIODIC), (z, moved, cell, PERIODIC))
        far = x.copy()
        far[2, 1] += 2e-3
        assert not same_geometry((z, x, cell, PERIODIC), (z, far, cell, PERIODIC))
        assert not same_geometry((z, x, cell, PERIODIC), (z, x, cell * 1.001, PERIODIC))
        assert not same_geometry((z, x, cell, PERIODIC), (z[::-1].copy(), x, cell, PERIODIC))


def test_charge_is_part_of_a_structures_name(structures):
    molecule = structures.molecule()
    geometry = (molecule["numbers"], molecule["positions"], np.zeros((3, 3)), FREE)
    assert geometry_hash(*geometry, charge=0) == geometry_hash(*geometry)
    assert geometry_hash(*geometry, charge=1) != geometry_hash(*geometry)


def test_leak_between_two_sets(structures):
    crystals = [structures.crystal() for _ in range(20)]
    train = [(c["numbers"], c["positions"], c["cell"], PERIODIC) for c in crystals]
    test = [(z, x + 4e-4, cell, pbc) for z, x, cell, pbc in train[5:7]]
    assert checks.same_structures(train, test) == [(5, 0), (6, 1)]
    assert checks.same_structures(train[:5], test) == []


def test_conflicts_name_both_values():
    assert checks.conflict("energy", np.float64(-63.27), np.float64(-62.91), 28) != ""
    assert "-62.91 contradicts -63.27" in checks.conflict("energy", np.float64(-63.27), np.float64(-62.91), 28)
    assert checks.conflict("energy", np.float64(-63.27), np.float64(-63.2701), 28) == ""
    forces = np.ones((4, 3))
    assert checks.conflict("forces", forces.astype(np.float32), forces + 1e-4, 4) == ""
    assert checks.conflict("forces", forces, forces + 0.1, 4) != ""


@pytest.fixture
def findings(write_frames, structures, data_config, tmp_path):
    """Return a function: frames changed by ``change`` → the kinds of findings and their text after ingest."""

    def find(frames, change=lambda frame: frame):
        write_frames("data.extxyz", [change(dict(frame)) for frame in frames])
        labels = {"pbe": {p: p for p in ("energy", "forces", "stress") if p in frames[0]}}
        store = tmp_path / f"store{len(list(tmp_path.glob('store*')))}"
        report = ingest(data_config(source_labels=labels), tmp_path, store, progress=False)
        kinds = {f.check: f.message for f in checks.check_store(Store(store))}
        assert set(kinds.values()) <= {w.partition(": ")[2] for w in report.warnings}
        return kinds

    return find


def test_right_units_are_silent(findings, structures):
    assert findings([structures.molecule() for _ in range(60)]) == {}


@pytest.mark.parametrize(("unit", "factor"), [("Hartree", 1 / 27.211386), ("kcal/mol", 23.060548)])
def test_energy_read_in_a_wrong_unit(findings, structures, unit, factor):
    """All-electron energies and the work of the forces both give it away; the first also without forces."""
    frames = [structures.molecule() for _ in range(60)]
    kinds = findings(frames, lambda f: f | {"energy": f["energy"] * factor})
    assert f"energy in {unit}" in kinds["energy_unit"]
    bare = [{k: v for k, v in f.items() if k != "forces"} for f in frames]
    kinds = findings(bare, lambda f: f | {"energy": f["energy"] * factor})
    assert f"look like {unit} read as eV" in kinds["energy_unit"]


def test_gradients_read_as_forces(findings, structures):
    kinds = findings([structures.molecule() for _ in range(60)], lambda f: f | {"forces": -f["forces"]})
    assert "negate: true" in kinds["forces"]


def crystals(structures):
    return [structures.crystal(0.03, scale) for scale in np.linspace(0.9, 1.1, 12)]


def test_stress_sign_and_unit(findings, structures):
    frames = crystals(structures)
    assert findings(frames) == {}
    assert "negate: true" in findings(frames, lambda f: f | {"stress": -f["stress"]})["stress_sign"]
    assert "GPa" in findings(frames, lambda f: f | {"stress": 160.2 * f["stress"]})["stress_unit"]
    assert "kbar" in findings(frames, lambda f: f | {"stress": 1602 * f["stress"]})["stress_unit"]
    too_soft = findings(frames, lambda f: f | {"stress": f["stress"] / 160.2})["stress_unit"]
    assert "eV/Å³ read as GPa" in too_soft


def test_outliers_are_named(findings, structures):
    frames = [structures.molecule() for _ in range(60)]
    frames[7]["energy"] += 300.0
    kinds = findings(frames)
    assert "1 of 60" in kinds["outliers"]
    assert "row 7" in kinds["outliers"]


def test_lattice_planes_that_touch_are_a_fault():
    """A byte too many in a file of boxes made such a cell; its neighbor list needs more images than there is memory."""
    flat = np.array([[4.0, 0, 0], [0, 4, 0], [3.9, 2.0, 0.01]])
    assert "lattice planes 0.01 Å apart, closer than 0.1 Å" in checks.cell_fault(flat, PERIODIC)
    assert checks.cell_fault(flat, np.array([True, True, False])) == ""
    sheared = np.array([[4.0, 0, 0], [7.0, 4, 0], [-5.0, 9.0, 4.0]])
    assert checks.cell_fault(sheared, PERIODIC) == ""
