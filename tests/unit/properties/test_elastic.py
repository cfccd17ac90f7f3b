"""Elastic constants of an ASE calculator: symmetry, the relation to the equation of state, and the report."""

from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT

from mffm.errors import InputError
from mffm.properties import elastic as module
from mffm.properties.eos import eos
from mffm.properties.relax import relax

pytest.importorskip("pymatgen.analysis.elasticity")


def test_copper(tmp_path: Path):
    """EMT's copper: C11 174, C12 116, C44 89 GPa to a few %; K is that of its equation of state."""
    start = bulk("Cu", cubic=True, a=3.6)
    start.calc = EMT()
    atoms = relax(start, cell="full", fmax=1e-4).atoms
    atoms.calc = EMT()
    seen: list[int] = []
    result = module.elastic(atoms, relaxed=False, each=lambda done, of: seen.append(done))
    c = result.tensor
    assert c[0, 0] == pytest.approx(c[2, 2], rel=1e-3)
    assert (c[0, 0], c[0, 1], c[3, 3]) == (
        pytest.approx(174, rel=0.05), pytest.approx(116, rel=0.05), pytest.approx(89, rel=0.05)
    )  # fmt: skip
    np.testing.assert_allclose(c[:3, 3:], 0, atol=1)
    fitted = eos(atoms, strain=0.02, points=7).fit
    assert fitted is not None
    assert result.bulk[2] == pytest.approx(fitted.bulk_modulus, rel=0.02)
    assert module.elastic(atoms, relaxed=False, shear=(-0.06, 0.06)).tensor[3, 3] > 1.05 * c[3, 3]
    assert result.found()["is_stable"]
    assert seen[-1] == 24
    module.draw(result, tmp_path / "elastic.png")
    assert (tmp_path / "elastic.png").stat().st_size > 5000


def test_relaxed_atoms_are_softer():
    start = bulk("Cu", "hcp", a=2.55, c=4.16)
    start.calc = EMT()
    atoms = relax(start, cell="full", fmax=1e-4).atoms
    atoms.calc = EMT()
    clamped, free = (module.elastic(atoms, relaxed=r, fmax=1e-3) for r in (False, True))
    assert free.tensor[5, 5] < clamped.tensor[5, 5] - 1
    assert free.n_not_relaxed == 0


def test_a_molecule():
    with pytest.raises(InputError, match="N2 is not periodic"):
        module.elastic(molecule("N2"))
