"""Which potential is judged, and at which fidelity."""

from pathlib import Path

import pytest
from ase.calculators.emt import EMT

from mffm.errors import InputError
from mffm.evaluate.benchmark.source import Source, fidelity_of, parse_arguments, parse_map

TASKS = ["lambench/elastic", "lambench/wiggle150", "matbench-discovery/wbm"]


def test_a_factory_is_called_with_its_arguments():
    calculator = Source("ase:ase.calculators.emt:EMT", arguments={"asap_cutoff": True}).build()
    assert isinstance(calculator, EMT)
    assert calculator.parameters["asap_cutoff"] is True


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ase:ase.calculators.emt", "expected ase:package.module:factory"),
        ("ase:no_such_package:X", "No module named 'no_such_package'; install the package"),
        ("ase:ase.calculators.emt:Emt", "no function or class 'Emt'; it has: .*EMT"),
        ("ase:pathlib:Path", "expected an ASE calculator"),
    ],
)
def test_what_is_wrong_with_a_factory_is_told(spec: str, message: str):
    with pytest.raises(InputError, match=message):
        Source(spec).build()


def test_unknown_arguments_of_a_factory_are_told():
    with pytest.raises(InputError, match=r"unexpected keyword argument 'mode'.*give arguments by --with"):
        Source("ase:fractions:Fraction", arguments={"mode": 1}).build()


def test_identity_tells_potentials_apart():
    one = Source("ase:ase.calculators.emt:EMT").identity()
    assert one["version"].startswith("3.")
    assert one != Source("ase:ase.calculators.emt:EMT", arguments={"asap_cutoff": True}).identity()


@pytest.mark.parametrize("spec", ["ase:ase.calculators.emt", "ase:no_such_package:X"])
def test_an_identity_that_cannot_be_had_is_told_as_a_calculator_is(spec: str):
    with pytest.raises(InputError, match=r"expected ase:|install the package"):
        Source(spec).identity()


def test_identity_tells_two_checkpoints_of_one_name_apart(tmp_path: Path):
    checkpoint = tmp_path / "checkpoint_best.pth"
    found = []
    for content in (b"first", b"second"):
        checkpoint.write_bytes(content)
        found.append(Source("ase:ase.calculators.emt:EMT", arguments={"model": str(checkpoint), "n": 3}).identity())
    assert found[0] != found[1]
    assert list(found[0]["argument_files"]) == ["model"]


def test_arguments_are_read_as_yaml():
    assert parse_arguments(["method=GFN1-xTB", "n=3", "flag=true", "e=1.0e-5"]) == {
        "method": "GFN1-xTB", "n": 3, "flag": True, "e": 1e-5,
    }  # fmt: skip
    for text in ("method", "a b=1", "x=[1"):
        with pytest.raises(InputError, match="--with"):
            parse_arguments([text])


def test_the_fidelity_of_a_task_is_of_its_name_then_its_suite_then_the_general_one():
    mapped = parse_map(["lambench=wb97m", "lambench/elastic=pbe"], TASKS)
    assert [fidelity_of(t, "r2scan", mapped) for t in TASKS] == ["pbe", "wb97m", "r2scan"]
    assert fidelity_of("matbench-discovery/wbm", None, mapped) is None
    with pytest.raises(InputError, match="no task 'elastic'; known: lambench, lambench/elastic"):
        parse_map(["elastic=pbe"], TASKS)
    with pytest.raises(InputError, match="expected task=fidelity"):
        parse_map(["lambench"], TASKS)
