"""A selection from end to end: options → what is left to choose from → picks with their reasons."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from ase.formula import Formula

from mffm.deploy.at_fidelity import AtFidelity
from mffm.deploy.ensemble import require_ensemble
from mffm.errors import InputError, known
from mffm.keys import N_ELEMENTS
from mffm.release import Loaded, load, uncertainty
from mffm.select.criteria import Criterion, Distances, LargestCluster, MaxDet, Random, Weighted
from mffm.select.greedy import Limits, Pick, greedy
from mffm.select.latent import measure
from mffm.select.pool import Structures, first_of_each, labelled_origin, pool_origin

WAYS = ("random", "fps", "lcmd", "maxdet", "uncertainty", "disagreement")
MEASURED = "measured"  # folder of what the potential was asked, within the output

Progress = Callable[[str, int, int | None], None]  # what is counted, how many, of how many where it is known


@dataclass(frozen=True)
class Options:
    """What to choose, and how.

    Attributes:
        by: one of ``WAYS``.
        n: how many; None: what the budget buys.
        fidelity: level at which the potential is asked; the latent features and σ are of it.
        against: level that ``disagreement`` compares with.
        budget, cost: sum of the costs at most; "atoms^p", or a file with a cost for each structure of the pool.
        labelled: stores or files of what is labelled already.
        level: rows of a store with a label of it count as labelled; None: none of the pool's, all of ``labelled``'s.
        split: of a store as the pool; "all": any.
        elements: only structures of these.
        compositions_first: pick structures whose composition those of labels do not span before others: a new
            element, or a new ratio of known ones, which element references need.
        covered: [n, N_ELEMENTS + 1] element counts of labels; None: those of all that is labelled already.
        per_formula: at most so many of a formula.
        max_std: meV/atom; what is less certain is never chosen.
        ensemble: further releases, whose spread is σ; without them the last layer's.
        without: rows of stores in the pool that are no candidates.
    """

    by: str
    n: int | None
    fidelity: str
    against: str | None = None
    budget: float | None = None
    cost: str | None = None
    labelled: Sequence[Path] = ()
    level: str | None = None
    split: str = "train"
    elements: Sequence[str] = ()
    compositions_first: bool = True
    covered: np.ndarray | None = None
    per_formula: int | None = None
    max_std: float | None = None
    ensemble: Sequence[Path] = ()
    seed: int = 0
    device: str = "cpu"
    weights: str = "best"
    without: Sequence[int] = ()

    def check(self) -> None:
        """Raises:
        InputError: values that are none, or that do not go together.
        """
        if self.by not in WAYS:
            raise InputError(f"--by {self.by}: known are {', '.join(WAYS)}")
        if self.n is None and self.budget is None:
            raise InputError("say how many: --n 50, or --cost with a --budget")
        if self.budget is not None and (self.cost is None or not 0 < self.budget < math.inf):
            need = "needs --cost, in whose unit it is" if self.cost is None else "must be a positive number"
            raise InputError(f"--budget {self.budget:g} {need}")
        if (self.by == "disagreement") != (self.against is not None):
            raise InputError(
                "--by disagreement needs --against, the level to compare with"
                if self.against is None
                else f"--against {self.against} is of --by disagreement; --by is {self.by}"
            )
        if self.against == self.fidelity:
            raise InputError(f"--against {self.against}: the same level as --fidelity; name the other one")
        unknown = [e for e in self.elements if e not in chemical_symbols[1:]]
        if unknown:
            raise InputError(f"--elements: {unknown[0]!r} is no element; write symbols with commas: H,C,O")
        if self.max_std is not None and not self.max_std > 0:
            raise InputError(f"--max-std {self.max_std:g}: expected a positive number, meV/atom")


@dataclass
class Selection:
    """What was chosen, and all that explains it.

    Attributes:
        candidates: [n] index in the pool of what could be chosen.
        left_out: reason → number of structures of the pool that could not.
        x, labelled_x: latent features, centred, of mean square length 1. [n, d], [m, d]
        stds: [n] eV/atom; None where nothing needed them.
        differences: [n] eV/atom between the two levels; None but for ``disagreement``.
        costs: [n] or None.
        scale: what the features were divided by.
        ridge: λ of ``maxdet``.
    """

    options: Options
    pool: Structures
    labelled: Structures
    potential: dict[str, Any]
    candidates: np.ndarray
    left_out: dict[str, int]
    x: np.ndarray
    labelled_x: np.ndarray
    stds: np.ndarray | None
    differences: np.ndarray | None
    costs: np.ndarray | None
    scale: float
    ridge: float | None = None
    picks: list[Pick] = field(default_factory=list)

    def place_of_nearest(self, number: int) -> str:
        """Return where a point that distances are counted to is: labelled ones first, then picks in their order."""
        n_labelled = len(self.labelled.all)
        if number < n_labelled:
            return self.labelled.place(number)
        return f"pick {number - n_labelled + 1}"


def select(release: Path, pool: Sequence[Path], options: Options, folder: Path, progress: Progress) -> Selection:
    """Choose structures of a pool; what the potential is asked is kept in ``folder``, and not asked again.

    Args:
        pool: stores and files, one behind the other.

    Raises:
        InputError: options that do not go together; nothing to choose from; more asked for than there is; a structure
            that the potential cannot calculate.
    """
    options.check()
    loaded = load(release, options.weights, options.device)
    others = [load(path, options.weights, options.device) for path in options.ensemble]
    _check_release(loaded, others, options)
    origins = [pool_origin(path, options.split, options.level, options.without) for path in pool]
    structures = Structures(origins, lambda n: progress("pool", n, None))
    if not structures.all:
        raise InputError(f"{', '.join(map(str, pool))}: no structures in it: nothing to choose from")
    origins = [labelled_origin(path, options.level) for path in options.labelled]
    labelled = Structures(origins, lambda n: progress("labelled", n, None))
    costs = _costs(options.cost, structures)
    candidates, left_out = _candidates(structures, labelled, options)
    found = _measured(loaded, others, structures, labelled, candidates, options, folder, progress)
    if options.max_std is not None:
        assert found.stds is not None
        keep = found.stds * 1e3 <= options.max_std
        left_out[f"σ above {options.max_std:g} meV/atom"] = int((~keep).sum())
        found.candidates, found.x, found.stds = found.candidates[keep], found.x[keep], found.stds[keep]
        found.differences = None if found.differences is None else found.differences[keep]
    found.left_out = left_out
    found.costs = None if costs is None else costs[found.candidates]
    _pick(found)
    return found


def _check_release(loaded: Loaded, others: Sequence[Loaded], options: Options) -> None:
    loaded.fidelities.index(options.fidelity)
    if options.against is not None:
        loaded.fidelities.index(options.against)
    if others:
        require_ensemble([loaded, *others], [options.fidelity])
    elif options.by == "uncertainty" or options.max_std is not None:
        uncertainty.of(loaded, options.fidelity)


def _costs(cost: str | None, structures: Structures) -> np.ndarray | None:
    """Return the cost of each structure of the pool. [n]

    Raises:
        InputError: neither atoms^p nor a file of positive numbers, one for each structure.
    """
    if cost is None:
        return None
    power = re.fullmatch(r"atoms(?:\^(\d+(?:\.\d*)?))?", cost)
    if power:
        n_atoms = np.array([len(one.geometry[0]) for one in structures.all], np.float64)
        return np.asarray(n_atoms ** float(power[1] or 1))
    path = Path(cost)
    if not path.is_file():
        raise InputError(f"--cost {cost}: neither atoms^p, such as atoms^2.4, nor a file of numbers")
    try:
        values = np.array(path.read_text().split(), np.float64)
    except ValueError as error:
        raise InputError(f"{path}: expected numbers, a cost for each structure of the pool ({error})") from error
    if len(values) != len(structures.all):
        raise InputError(f"{path}: {len(values)} costs for {len(structures.all)} structures of the pool; one for each")
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    if len(bad):
        raise InputError(f"{path}: cost {values[bad[0]]:g} of structure {bad[0]}: expected a positive number")
    return values


def _candidates(structures: Structures, labelled: Structures, options: Options) -> tuple[np.ndarray, dict[str, int]]:
    """Return the indices of what may be chosen, and for each reason how many may not."""
    same = first_of_each(structures.all, labelled.all)
    left_out = {"labelled already": int((same == -2).sum()), "the same as one before": int((same >= 0).sum())}
    keep = same == -1
    if options.elements:
        numbers = [chemical_symbols.index(e) for e in options.elements]
        inside = np.array([bool(np.isin(one.geometry[0], numbers).all()) for one in structures.all])
        left_out["other elements"] = int((keep & ~inside).sum())
        keep &= inside
    return np.flatnonzero(keep), left_out


def _measured(
    loaded: Loaded,
    others: Sequence[Loaded],
    structures: Structures,
    labelled: Structures,
    candidates: np.ndarray,
    options: Options,
    folder: Path,
    progress: Progress,
) -> Selection:
    at = AtFidelity(loaded, options.fidelity, device=options.device)
    if not len(candidates):
        raise InputError("nothing to choose from: every structure of the pool is labelled already, or left out")
    chosen = [structures.all[i] for i in candidates.tolist()]
    made_of = [structures.describe(), candidates.tolist()]

    def place(index: int) -> str:
        return structures.place(int(candidates[index]))

    def counted(what: str, n: int) -> Callable[[int], None]:
        return lambda done: progress(what, done, n)

    keep = folder / MEASURED
    features = measure(at, "features", chosen, place, made_of, keep, counted("latent features", len(chosen)))
    known_features = features[:0]
    if labelled.all:
        shown = counted("latent features, labelled", len(labelled.all))
        known_features = measure(at, "features", labelled.all, labelled.place, labelled.describe(), keep, shown)
    stds = differences = None

    def energies(one: AtFidelity, what: str) -> np.ndarray:
        return measure(one, "energies", chosen, place, made_of, keep, counted(what, len(chosen)))

    n_atoms = np.array([len(one.geometry[0]) for one in chosen], np.float64)
    if options.by == "uncertainty" or options.max_std is not None:
        if others:
            members = [at, *(AtFidelity(one, options.fidelity, device=options.device) for one in others)]
            totals = [energies(one, f"energies, member {i}")[:, 1] for i, one in enumerate(members)]
            stds = np.std(totals, axis=0, ddof=1) / n_atoms
        else:  # σ of F / n_atoms is σ of the energy per atom
            stds = uncertainty.of(loaded, options.fidelity).of(features.astype(np.float64))
    if options.against is not None:
        both = [at, AtFidelity(loaded, options.against, device=options.device)]
        own, other = (energies(one, f"energies at {one.fidelity}")[:, 0] / n_atoms for one in both)
        differences = own - other
        differences -= np.median(differences)  # a constant is no disagreement: references mend it
    centre = np.concatenate([features, known_features]).mean(0, dtype=np.float64)
    scale = math.sqrt(float(np.mean(np.square(features - centre).sum(1)))) or 1.0
    x, labelled_x = (((f - centre) / scale).astype(np.float32) for f in (features, known_features))
    return Selection(
        options, structures, labelled, at.describe(), candidates, {}, x, labelled_x, stds, differences, None, scale
    )


def _pick(found: Selection) -> None:
    options = found.options
    n_left = len(found.candidates)
    formulas = [found.pool.all[i].formula for i in found.candidates.tolist()]
    names, formula = np.unique(formulas, return_inverse=True) if n_left else (np.array([]), np.zeros(0, np.int64))
    possible = n_left
    if options.per_formula is not None:
        possible = int(np.minimum(np.bincount(formula), options.per_formula).sum())
    if options.n is not None and options.n > possible:
        why = "; ".join(f"{count} {reason}" for reason, count in found.left_out.items() if count) or "none left out"
        limit = "" if possible == n_left else f", {possible} at {options.per_formula} of each of {len(names)} formulas"
        raise InputError(
            f"--n {options.n}: the pool has {len(found.pool.all)} structures ({why}): {n_left} can be chosen{limit}; "
            "ask for fewer, or give a larger pool"
        )
    budget = math.inf if options.budget is None else options.budget
    if found.costs is not None and n_left and found.costs.min() > budget:
        raise InputError(f"--budget {budget:g}: the cheapest structure costs {found.costs.min():g}; give more")
    if not n_left:
        raise InputError("nothing to choose from: " + "; ".join(f"{n} {why}" for why, n in found.left_out.items() if n))
    criterion = _criterion(found)
    limits = Limits(options.n, found.costs, budget, formula, options.per_formula, *_fractions(found, names.tolist()))
    note = _noted(criterion)
    found.ridge = criterion.ridge if isinstance(criterion, MaxDet) else None
    found.picks = greedy(criterion, limits, np.ones(n_left, bool), note, by_cost=options.by != "random")


def _fractions(found: Selection, formulas: Sequence[str]) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Return the fractions of atoms of the candidates' formulas and of labels: [n, N_ELEMENTS + 1] each, or None."""
    if not found.options.compositions_first:
        return None, None
    counts = found.options.covered
    if counts is None:
        counts = _counts(sorted({one.formula for one in found.labelled.all}))
    both = [c / c.sum(1, keepdims=True) for c in (_counts(formulas), np.asarray(counts, np.float64))]
    return both[0], np.unique(both[1], axis=0)


def _counts(formulas: Sequence[str]) -> np.ndarray:
    """Return how many atoms of each element: [len(formulas), N_ELEMENTS + 1], column = atomic number."""
    counts = np.zeros((len(formulas), N_ELEMENTS + 1))
    for row, formula in enumerate(formulas):
        for element, count in Formula(str(formula)).count().items():
            counts[row, atomic_numbers[element]] = count
    return counts


def _criterion(found: Selection) -> Criterion:
    match found.options.by:
        case "random":
            return Random(len(found.x), found.options.seed)
        case "fps":
            return Distances(found.x, found.labelled_x)
        case "lcmd":
            return LargestCluster(found.x, found.labelled_x)
        case "maxdet":
            return MaxDet(found.x, found.labelled_x)
        case "uncertainty":
            assert found.stds is not None
            return Weighted(found.x, found.labelled_x, found.stds)
        case "disagreement":
            assert found.differences is not None
            return Weighted(found.x, found.labelled_x, found.differences)
    raise AssertionError(known(WAYS))


def _noted(criterion: Criterion) -> Callable[[int], tuple[float, int] | None]:
    """Return what is noted of a pick before it is added: distance to the nearest point, and which point."""
    if isinstance(criterion, Distances):
        return lambda i: (math.sqrt(criterion.squared[i]), int(criterion.nearest[i]))
    return lambda i: None
