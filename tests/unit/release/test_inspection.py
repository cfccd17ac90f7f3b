"""``mffm inspect`` and ``mffm diff``: what a release is, what two have differently, whether it predicts what it did."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mffm.cli import app
from mffm.errors import InputError
from mffm.release import inspection, load, outputs, save

GOLDEN = Path(__file__).parents[2] / "golden"


def mffm(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(a) for a in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, " ".join(done.stdout.split())


def test_inspect_tells_what_a_user_asks(tiny_release: Path):
    code, text = mffm("inspect", tiny_release, "--check")
    assert code == 0
    manifest = json.loads((tiny_release / "manifest.json").read_text())
    for wanted in (
        "PBE/def2-SVP", "20 energy", "H C N O", "fit, rank", "conservative", "MIT", "onehot, delta",
        manifest["own_sha256"], "outputs.json", "10 structures", "float32", "interaction_energy", "ok",
    ):  # fmt: skip
        assert wanted in text, wanted
    assert "DIFFERS" not in text


def test_inspect_of_version_1_a_single_file_and_a_run(tiny_run: Path, tiny_release: Path, tmp_path: Path):
    assert "written by version 1" in mffm("inspect", GOLDEN / "release-v1")[1]
    assert "single file" in mffm("inspect", save(tiny_release, tmp_path / "one.safetensors"))[1]
    assert "a run's folder" in mffm("inspect", tiny_run)[1]


def test_a_check_of_nothing_is_refused(tiny_run: Path, tiny_release: Path):
    for path in (tiny_run, GOLDEN / "release-v1"):
        with pytest.raises(InputError, match="no reference outputs to check"):
            mffm("inspect", path, "--check")
    with pytest.raises(InputError, match="device 'cudda' cannot be used"):
        mffm("inspect", tiny_release, "--check", "--device", "cudda")
    with pytest.raises(InputError, match="device 'cudda' cannot be used"):
        load(tiny_release, device="cudda")


def test_check_sees_what_a_load_does_not(tiny_release: Path, monkeypatch: pytest.MonkeyPatch):
    """Predictions of large structures only go wrong: the two of a load pass, all ten do not."""
    true = outputs.predict

    def wrong(potential, spec, structures, fidelity):
        found = true(potential, spec, structures, fidelity)
        for one in found:
            if len(one.forces) > 10:
                one.forces[0, 0] += 1e-3
        return found

    monkeypatch.setattr(outputs, "predict", wrong)
    loaded = load(tiny_release)
    with pytest.raises(InputError, match=r"structure 7 at 'gfn2': forces differs by 0.001 eV/Å, tolerance"):
        inspection.require_within(inspection.check(loaded), loaded)


def test_an_export_is_checked_against_the_outputs(tiny_release: Path):
    """Any predictor will do: here the ASE calculator in float32, and one in the wrong units."""
    from ase import Atoms

    from mffm.deploy.ase import Calculator

    stored = inspection.stored_outputs(load(tiny_release))
    assert stored is not None

    def predict(factor: float):
        def of(structures, fidelity):
            found = []
            for s in structures:
                atoms = Atoms(s.numbers, s.positions, cell=s.cell, pbc=s.pbc)
                atoms.calc = Calculator(tiny_release, fidelity=fidelity)
                stress = atoms.get_stress(voigt=False) if s.pbc.all() else None
                found.append(outputs.Values(atoms.get_potential_energy(), None, atoms.get_forces() * factor, stress))
            return found

        return of

    some = (0, 3, 6, 8)
    found = outputs.compare(stored, predict(1.0), "float32", some)
    assert all(d.is_within for d in found)
    assert {d.quantity for d in found} == {"energy", "forces", "stress"}
    assert not all(d.is_within for d in outputs.compare(stored, predict(1.001), "float32", some))


def test_tolerances_are_tight(tiny_release: Path):
    """Far below the errors of any potential, above what another order of sums is worth."""
    stored = inspection.stored_outputs(load(tiny_release))
    assert all(1e-9 <= t < 1e-7 for t in stored.tolerances["float64"].values())
    assert all(1e-6 < t < 1e-3 for t in stored.tolerances["float32"].values())


def test_diff_of_a_release_with_itself_is_empty(tiny_release: Path, tmp_path: Path):
    assert mffm("diff", tiny_release, tiny_release) == (0, f"{tiny_release} and {tiny_release} hold the same")
    assert inspection.changes(load(tiny_release), load(save(tiny_release, tmp_path / "x.safetensors"))) == []


def test_diff_names_every_part_that_differs(tiny_run: Path, tiny_release: Path, tmp_path: Path):
    raw = save(tiny_run, tmp_path / "raw", "raw")
    code, text = mffm("diff", tiny_release, raw)
    assert code == 1
    found = inspection.changes(load(tiny_release), load(raw))
    weights = [c for c in found if c.part == "weights"]
    assert len(weights) > 10
    assert all("differing by up to" in c.b for c in weights)
    assert [(c.where, c.a, c.b) for c in found if c.part == "provenance"] == [("release.weights", "best", "raw")]
    assert {c.where for c in found if c.part == "predictions"} == {"gfn2", "pbe"}
    assert "release.weights" in text
    assert mffm("diff", tiny_run, raw, "--weights", "raw")[0] == 1  # of the run: a release has one set only
    assert not [c for c in inspection.changes(load(tiny_run, "raw"), load(raw)) if c.part == "weights"]

    changed = load(tiny_release)
    changed.spec.scale *= 2
    changed.spec.references.table["pbe"] = changed.spec.references.table["pbe"] * 1.0
    changed.spec.references.table["pbe"][6] = 1.5
    parts = {(c.part, c.where) for c in inspection.changes(load(tiny_release), changed)}
    assert parts == {("config", "scale"), ("fidelities", "pbe.references.C")}


def test_diff_of_a_folded_release(tiny_release: Path, tmp_path: Path):
    found = inspection.changes(load(tiny_release), load(save(tiny_release, tmp_path / "pbe", fidelity="pbe")))
    where = {(c.part, c.where): c for c in found}
    assert where["config", "model.heads.kind"].b == "shared"
    assert where["fidelities", "gfn2"].b == "—"
    assert float(where["predictions", "pbe"].b.split()[4]) < 1e-5
