"""The tasks of the suites, by name."""

from collections.abc import Sequence
from pathlib import Path

from mffm.errors import InputError, known
from mffm.evaluate.benchmark.task import SUITES, DataFile, Presence, Task, name_of
from mffm.evaluate.lambench import (
    binding,
    elastic,
    force_field,
    interface,
    neb,
    nve_md,
    phonon_mdr,
    pressure,
    rxn_barrier,
    stacking_fault,
    surface,
    torsionnet,
    vacancy,
    wiggle150,
)
from mffm.evaluate.matbench_discovery import phonondb, wbm

_ALL: tuple[Task, ...] = (
    wbm.Wbm972(),
    wbm.Wbm(),
    phonondb.Kappa103(),
    elastic.TASK,
    phonon_mdr.TASK,
    rxn_barrier.TASK,
    wiggle150.TASK,
    wiggle150.TASK_MINI,
    torsionnet.TASK,
    torsionnet.TASK_MINI,
    binding.TASK,
    vacancy.TASK,
    surface.TASK,
    interface.TASK,
    stacking_fault.TASK,
    pressure.TASK,
    neb.TASK,
    nve_md.TASK,
    *force_field.TASKS,
)
TASKS: dict[str, Task] = {name_of(t): t for t in _ALL}


def task(name: str) -> Task:
    """Return a task by ``suite/name``.

    Raises:
        InputError: there is none of that name.
    """
    if name not in TASKS:
        raise InputError(f"no task {name!r}; known: {known(TASKS)}")
    return TASKS[name]


def of_suite(suite: str) -> list[str]:
    """Return the names of a suite's tasks; ``all`` has those of every suite.

    Raises:
        InputError: there is no such suite.
    """
    if suite not in (*SUITES, "all"):
        raise InputError(f"no suite {suite!r}; known: {known([*SUITES, 'all'])}")
    return [n for n, t in TASKS.items() if suite in (t.suite, "all")]


def check_data(data: Path, names: Sequence[str]) -> list[tuple[str, DataFile, Presence]]:
    """Return, for each file of each task, whether it is there and whole."""
    return [(name, file, file.check(data)) for name in names for file in task(name).files]
