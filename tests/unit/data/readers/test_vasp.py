"""vasprun.xml: the same numbers as ASE and pymatgen; unconverged and cut files."""

import gzip
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import pytest

from mffm.config.base import validate
from mffm.config.data import SourceSpec
from mffm.data.readers import RejectedFrame, read
from mffm.errors import InputError
from mffm.frame import Frame


def spec() -> SourceSpec:
    return validate(SourceSpec, {"name": "a", "preset": "vasp", "path": "-", "fidelity": "pbe"}, "test")


@pytest.fixture
def written(samples: Any, make_vasprun: Any, tmp_path: Path) -> Path:
    path = tmp_path / "vasprun.xml"
    path.write_text(make_vasprun(samples["crystals"](4)))
    return path


def test_agrees_with_ase(written: Path) -> None:
    for ours, theirs in zip(read(written, spec()), ase.io.iread(written, index=":"), strict=True):
        assert ours.atomic_numbers.tolist() == theirs.numbers.tolist()
        np.testing.assert_allclose(ours.positions, theirs.positions, atol=1e-10)
        assert float(ours.labels["pbe", "energy"]) == pytest.approx(theirs.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(ours.labels["pbe", "forces"], theirs.get_forces(), atol=1e-10)
        np.testing.assert_allclose(ours.labels["pbe", "stress"], theirs.get_stress(voigt=False), atol=1e-10)


@pytest.mark.filterwarnings("ignore")
def test_agrees_with_pymatgen(written: Path) -> None:
    from pymatgen.io.vasp import Vasprun

    run = Vasprun(str(written), parse_dos=False, parse_eigen=False, parse_potcar_file=False)
    for ours, theirs in zip(read(written, spec()), run.ionic_steps, strict=True):
        np.testing.assert_allclose(ours.positions, theirs["structure"].cart_coords, atol=1e-10)
        assert float(ours.labels["pbe", "energy"]) == pytest.approx(float(theirs["e_0_energy"]))
        np.testing.assert_allclose(ours.labels["pbe", "forces"], theirs["forces"], atol=1e-10)


def test_an_unconverged_step_is_rejected(samples: Any, make_vasprun: Any, tmp_path: Path) -> None:
    path = tmp_path / "vasprun.xml"
    path.write_text(make_vasprun(samples["crystals"](3), lambda k: 60 if k == 1 else 9))
    frames = list(read(path, spec()))
    assert [type(f) for f in frames] == [Frame, RejectedFrame, Frame]
    assert "step 2: the electronic loop did not converge in NELM = 60 steps" in frames[1].reason


def test_a_killed_job_keeps_its_whole_steps_and_says_so(written: Path) -> None:
    text = written.read_text()
    packed = written.with_name("vasprun.xml.gz")
    for cut in (text.rfind("<calculation>") + 700, text.find('<structure name="finalpos"')):
        written.write_text(text[:cut])
        packed.write_bytes(gzip.compress(text[:cut].encode()))
        frames = list(read(written, spec()))
        whole = text[:cut].count("</calculation>")
        assert [type(f) for f in frames] == [Frame] * whole + [RejectedFrame]
        assert f"damaged or cut short after {whole} ionic steps" in frames[-1].reason
        from mffm.data.readers import READERS
        from mffm.data.readers.convert import wanted

        want = wanted(spec())
        of_packed = [
            f for c in READERS["vasp"].chunks(packed, want, 0, 0) for f in READERS["vasp"].parse(c, want).frames
        ]
        assert [type(f) for f in of_packed] == [type(f) for f in frames]


def test_numbers_that_vasp_could_not_print(written: Path) -> None:
    text = written.read_text()
    at = text.find('name="forces"', text.find("</calculation>"))
    at = text.find("<v>", at)
    written.write_text(text[: at + 4] + "*" * 20 + text[at + 24 :])
    frames = list(read(written, spec()))
    assert [type(f) for f in frames] == [Frame, RejectedFrame, Frame, Frame]


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "vasprun.xml"
    for text, what in (
        ("text", "not readable as vasprun.xml"),
        ("", "not readable as vasprun.xml"),
        ("<modeling></modeling>", "no ionic step"),
        ('<modeling><parameters><i name="NELM">x</i></parameters></modeling>', "not a vasprun.xml as VASP writes it"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=what):
            list(read(path, spec()))
