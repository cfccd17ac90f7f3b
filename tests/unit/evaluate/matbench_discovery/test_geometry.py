"""RMSD and symmetry against structures whose answer is known."""

import pytest

from mffm.evaluate.matbench_discovery import geometry
from mffm.evaluate.matbench_discovery.geometry import Comparison, Symmetry

core = pytest.importorskip("pymatgen.core", reason="needs pymatgen: pip install 'mffm[properties]'")


def rock_salt(a: float = 5.6, shift: float = 0.0):
    sodium = [[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
    chlorine = [[x + 0.5, y, z] for x, y, z in sodium]
    structure = core.Structure(core.Lattice.cubic(a), ["Na"] * 4 + ["Cl"] * 4, sodium + chlorine)
    structure.translate_sites([0], [shift, 0, 0], frac_coords=False)
    return structure


def test_rmsd_is_in_units_of_the_distance_between_atoms():
    assert geometry.rmsd(rock_salt(), rock_salt()) == pytest.approx(0, abs=1e-6)
    # The matcher goes to the primitive cell first, which averages the four Na: one moved 0.1 Å is all moved 0.025 Å,
    # and the best overlay of Na and Cl leaves half of that on each. The unit is (V/N)^(1/3) = 2.8 Å.
    assert geometry.rmsd(rock_salt(shift=0.1), rock_salt()) == pytest.approx(0.1 / 4 / 2 / 2.8, rel=1e-3)
    assert geometry.rmsd(rock_salt(6.2), rock_salt()) == pytest.approx(0, abs=1e-6)  # sites alone, not the volume
    assert geometry.rmsd(rock_salt(), core.Structure(core.Lattice.cubic(3), ["Fe"], [[0, 0, 0]])) is None


def test_symmetry_of_rock_salt_and_of_a_distorted_one():
    assert geometry.symmetry(rock_salt(), 1e-5) == Symmetry(225, 192)
    broken = geometry.symmetry(rock_salt(shift=0.05), 1e-5)
    assert broken is not None
    assert (broken.space_group, broken.n_operations) == (99, 8)
    assert geometry.symmetry(rock_salt(shift=1e-3), 1e-2) == Symmetry(225, 192)


def test_metrics_count_failures_as_one_and_leave_them_out_of_symmetry():
    cubic, tetragonal = Symmetry(225, 192), Symmetry(139, 32)
    found = geometry.metrics(
        [
            Comparison(0.1, cubic, cubic),
            Comparison(0.2, tetragonal, cubic),
            Comparison(0.3, cubic, tetragonal),
            Comparison(None, None, cubic),  # failed
            Comparison(0.4, Symmetry(221, 192), cubic),  # another group, as many operations: neither up nor down
        ]
    )
    assert found["rmsd"] == pytest.approx((0.1 + 0.2 + 0.3 + 1 + 0.4) / 5)
    assert found["n_structures"] == 4
    assert found["n_sym_ops_mae"] == pytest.approx(2 * 160 / 4)
    shares = [found[k] for k in ("symmetry_match", "symmetry_decrease", "symmetry_increase")]
    assert shares == [0.25, 0.25, 0.25]
