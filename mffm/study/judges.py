"""All judges of a study beside the errors on its store's splits, in the order of the report."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mffm.config.recipe import Recipe
from mffm.config.study import StudyConfig
from mffm.data.store import Store
from mffm.release import Loaded
from mffm.study import eos, mixing, relative
from mffm.study.cells import Judge, energies_of, require_untrained

MODULES = {module.NAME: module for module in (relative, mixing, eos)}


def judges_of(config: StudyConfig, base: Path, store: Store, recipes: Iterable[Recipe]) -> list[Judge]:
    """Return the judges that a study asks for.

    Args:
        base: folder of the study YAML, which files are relative to.
        recipes: of all trainings; none may read a structure whose label is judged.

    Raises:
        InputError: a file that does not hold what the YAML names, or structures that trainings read.
    """
    judges: list[Judge] = []
    if config.relative_energies:
        judges.append(relative.Relative.read(config, store))
    if config.mixing:
        judge = mixing.Mixing.read(config.mixing, base, config.methods)
        require_untrained(judge.frames, store, list(recipes), "mixing")
        judges.append(judge)
    if config.eos:
        judges.append(eos.Eos.read(config.eos, base))
    return judges


def digests(judges: Sequence[Judge]) -> dict[str, str]:
    """Return what the judges' results depend on besides the weights."""
    return {judge.name: judge.digest for judge in judges}


def judge(judges: Sequence[Judge], loaded: Loaded, asked: str) -> dict[str, Any]:
    """Return what each judge finds of a potential at a fidelity, as JSON."""
    energies = energies_of(loaded, asked)
    return {one.name: one.judge(energies) for one in judges}


def summarise(judges: Sequence[Judge], found: Iterable[tuple[str, int, int, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return judge → what the report says, from (method, labels, seed, what the judges found) of every cell."""
    results: dict[str, dict[str, dict[int, dict[int, Any]]]] = {one.name: {} for one in judges}
    for method, n_high, seed, of_cell in found:
        for name, content in of_cell.items():
            results[name].setdefault(method, {}).setdefault(n_high, {})[seed] = content
    return {one.name: one.summarise(results[one.name]) for one in judges}


def sections(found: Mapping[str, Any], titles: Mapping[str, str], high: str) -> list[list[str]]:
    """Return the sections of the page."""
    return [MODULES[name].section(content, titles, high) for name, content in found.items()]


def draw(found: Mapping[str, Any], titles: Mapping[str, str], high: str, folder: Path) -> list[Path]:
    """Write the figures of the judges that have one; return their paths."""
    return [mixing.draw(found[mixing.NAME], titles, high, folder)] if mixing.NAME in found else []
