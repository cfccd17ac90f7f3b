"""Levels that cost nothing, in a module that spawned workers can import."""

import os
import time
from pathlib import Path

import labelling
from ase import Atoms
from labelling import Job, Level

from mffm.label.level import Label, NotConverged


def fake(frame: Atoms) -> Label:
    """A level that costs nothing; a frame's info says what goes wrong with it."""
    fate = frame.info.get("fate", "")
    if fate == "unconverged":
        raise NotConverged('"quoted" message\nof two lines')
    if fate == "nan":
        return Label(float("nan"))
    if fate == "die":
        os._exit(9)
    if fate == "die once" and not Path(frame.info["marker"]).exists():
        Path(frame.info["marker"]).touch()
        os._exit(9)
    if fate == "slow":
        time.sleep(1.5)
    return Label(float(frame.positions.sum()), -frame.positions)


def steady(frame: Atoms) -> Label:
    return Label(1.0)


LEVELS = {"fake": Level((), fake), "steady": Level((), steady)}


def label(job: Job) -> Atoms:
    return labelling.compute(job, LEVELS)
