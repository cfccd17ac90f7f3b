"""What a selection leaves behind: the structures, a JSON with scores and reasons, and a plot."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from ase.io.extxyz import write_extxyz

from mffm import plots
from mffm.release import code_version, write_json, write_text
from mffm.select.greedy import Pick
from mffm.select.run import Selection

SHOWN = 4_000  # points of the pool in the plot


def write(found: Selection, folder: Path) -> list[Path]:
    """Write selected.extxyz (in the order of the picks), selection.json and selection.png; return their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "selected.extxyz", folder / "selection.json", folder / "selection.png"]
    chosen = [int(found.candidates[pick.index]) for pick in found.picks]
    text = io.StringIO()
    for atoms in found.pool.take(chosen):
        write_extxyz(text, [atoms])
    write_text(paths[0], text.getvalue())
    write_json(paths[1], summary(found))
    _draw(found, paths[2])
    return paths


def summary(found: Selection) -> dict[str, Any]:
    """Return all that is to be said of a selection, as JSON."""
    options = found.options
    return {
        "by": options.by,
        "n": options.n,
        "seed": options.seed,
        "budget": options.budget,
        "cost": options.cost,
        "spent": None if found.costs is None else float(found.costs[[p.index for p in found.picks]].sum()),
        "fidelity": options.fidelity,
        "against": options.against,
        "max_std": options.max_std,
        "per_formula": options.per_formula,
        "elements": list(options.elements),
        "potential": found.potential,
        "ensemble": [str(path) for path in options.ensemble],
        "versions": code_version(),
        "n_pool": len(found.pool.all),
        "n_labelled": len(found.labelled.all),
        "n_candidates": len(found.candidates),
        "left_out": found.left_out,
        "scale_of_features": found.scale,
        "ridge": found.ridge,
        "chosen": [_chosen(found, rank, pick) for rank, pick in enumerate(found.picks, 1)],
    }


def _chosen(found: Selection, rank: int, pick: Pick) -> dict[str, Any]:
    index = int(found.candidates[pick.index])
    structure = found.pool.all[index]
    entry: dict[str, Any] = {
        "pick": rank,
        "place": found.pool.place(index),
        "formula": structure.formula,
        "n_atoms": len(structure.geometry[0]),
        "score": pick.gain,
        "reason": reason(found, pick),
    }
    if pick.note is not None and np.isfinite(pick.note[0]):
        entry["distance"] = pick.note[0]
    if found.stds is not None:
        entry["std_meV_per_atom"] = 1e3 * float(found.stds[pick.index])
    if found.differences is not None:
        entry["difference_meV_per_atom"] = 1e3 * float(found.differences[pick.index])
    if found.costs is not None:
        entry["cost"] = float(found.costs[pick.index])
    return entry


def reason(found: Selection, pick: Pick) -> str:
    """Return in words why a structure was chosen."""
    new = "a composition that labels and picks do not determine; " if pick.is_new else ""
    return new + _criterion(found, pick)


def _criterion(found: Selection, pick: Pick) -> str:
    options = found.options
    per_cost = "" if found.costs is None or options.by == "random" else " for its cost"
    if options.by == "random":
        return f"drawn with seed {options.seed}"
    if options.by == "maxdet":
        return f"adds {pick.gain:.3g} to log det{per_cost}"
    distance, which = pick.note
    if which < 0:
        away = "nothing is labelled, farthest from the mean"
    else:
        away = f"{distance:.3g} from {found.place_of_nearest(which)}, the nearest that is labelled or chosen"
    if options.by == "uncertainty":
        assert found.stds is not None
        return f"σ {1e3 * found.stds[pick.index]:.3g} meV/atom, {away}{per_cost}"
    if options.by == "disagreement":
        assert found.differences is not None
        return (
            f"{options.fidelity} and {options.against} differ by {1e3 * found.differences[pick.index]:.3g} meV/atom, "
            f"{away}{per_cost}"
        )
    return f"{away}{per_cost}"


def _draw(found: Selection, path: Path) -> None:
    """Draw the pool, what is labelled and the picks in the two main directions of the pool, and the scores."""
    picked = found.x[[pick.index for pick in found.picks]]
    shown, labelled = (x[:: -(-len(x) // SHOWN) or 1] for x in (found.x, found.labelled_x))
    _, _, directions = np.linalg.svd(shown - shown.mean(0), full_matrices=False)
    main = np.zeros((2, found.x.shape[1]))
    main[: len(directions[:2])] = directions[:2]
    points = {f"pool ({len(found.x)})": (*(shown @ main.T).T, ".")}
    if len(labelled):
        points[f"labelled ({len(found.labelled_x)})"] = (*(labelled @ main.T).T, "x")
    points[f"chosen ({len(picked)})"] = (*(picked @ main.T).T, "o")
    scores = {found.options.by: (np.arange(1, len(picked) + 1), np.array([p.gain for p in found.picks]), "o-")}
    plots.curves(path, [("first direction of the features", "second direction", points), ("pick", "score", scores)])
