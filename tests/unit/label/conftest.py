"""Structures for labelling, and the codes that it needs."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from mffm.frame import Frame
from mffm.label.journal import Limits
from mffm.label.publish import Summary
from mffm.label.run import label
from mffm.label.structures import Source
from mffm.label.work import Request

sys.path.insert(0, str(Path(__file__).parent))  # where spawned workers find fates


@pytest.fixture(scope="session")
def label_codes() -> None:
    """Skip, with the remedy, where PySCF and tblite (the ``label`` extra) are missing."""
    missing = [name for name in ("pyscf", "tblite") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: labels cannot be computed; pip install -e '.[label]'")


@pytest.fixture(scope="session", name="frame_of")
def _frame_of() -> Callable[..., Frame]:
    return frame_of


def frame_of(atoms: Atoms, **given: int) -> Frame:
    """Return a structure of ASE as a frame; ``charge`` and ``spin_multiplicity`` as given."""
    return Frame(atoms.numbers.astype(np.uint8), atoms.positions, atoms.cell.array, atoms.pbc, **given)


@pytest.fixture(scope="session", name="labelled")
def _labelled() -> Callable[..., Summary]:
    return labelled


def labelled(
    source: Path, level: str, out: Path | None = None, name: str | None = None, layer: str = "new",
    n: int | None = None, workers: int = 1, limits: Limits = Limits(),  # noqa: B008 - frozen
) -> Summary:  # fmt: skip
    """Label a store or a file in this process."""
    request = Request(Source.of([source]), level, name, n)
    found = label(request, layer, out, workers, limits, lambda *_: None)
    assert isinstance(found, Summary), found
    return found
