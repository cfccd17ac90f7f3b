"""SevenNet's own multi-fidelity training on the cells of a study, in the study's report. Resumable.

    python tools/peers/install.py sevennet
    python tools/study_sevennet.py configs/studies/crystals.yaml --workers 2      # when the study's cells are trained
    mffm study configs/studies/crystals.yaml --report-only

Each cell gets the very frames of the study's cell with the same number of high-fidelity labels and the same seed: the
pools of `--like`'s recipe, the study's validation split for the best checkpoint, its splits and judges for the errors.
Everything else is SevenNet's: trainer, multi-fidelity preset (one-hot at the preset's layers, element references by
fidelity, Huber, weights of the labels, linear decay), batch and optimiser. It trains for the CPU time of `--time-of`'s
cell, its stages included, or for `--minutes`: up to 1.15 times that, or less where the schedule ends first, as a probe
says how many epochs fit. Counted from the first step on (tools/peers/clock.py); the study's time has start-up too.

The presets' networks are large (128 channels): at a few CPU minutes they make few steps. `--model base` takes the
preset's fidelity switches on the smaller network of SevenNet's preset `base`; several --name may stand in one report.

    multi_modal   6 Å, lmax 3, 3 layers; forces of the low fidelity weigh 0.1, of the high one 10
    MF_0          5 Å, lmax 2, 5 layers; all labels of the high fidelity weigh 7
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import ase.io
import bench_training
import numpy as np
import typer
from ase import Atoms
from peers import install

from mffm.config.base import validate
from mffm.config.external import ExternalResults
from mffm.config.study import StudyConfig, load_study
from mffm.data.pools import build_pools, choose
from mffm.data.records import Geometry
from mffm.data.store import Store
from mffm.errors import InputError, known
from mffm.evaluate.parity import Evaluation
from mffm.executor import LocalExecutor, locked
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY, FORCES, N_ELEMENTS, PROPERTIES, STRESS
from mffm.release import read_json, sha256, write_json
from mffm.study import external, judges
from mffm.study.grid import Cell, Grid, expand
from mffm.study.run import StudyRun, write_frames

LOW_AND_HIGH = {
    "multi_modal": ({"energy": 1.0, "force": 0.1, "stress": 1.0}, {"energy": 1.0, "force": 10.0, "stress": 1.0}),
    "MF_0": ({"energy": 1.0, "force": 1.0, "stress": 1.0}, {"energy": 7.0, "force": 7.0, "stress": 7.0}),
}
BATCH = 16  # of the preset multi_modal; MF_0's 64 is for a data base of a million
PROBE = 15  # steps timed, behind the first 10


@dataclass(frozen=True)
class Plan:
    """What is the same for all cells.

    Attributes:
        folder: of this training code in the study's folder.
        minutes: CPU time of a cell.
    """

    grid: Grid
    folder: Path
    preset: str
    model: str | None
    minutes: Callable[[Cell], float]

    @property
    def high(self) -> str:
        return self.grid.config.high

    @property
    def has_stress(self) -> bool:
        return bool(self.grid.store.label_counts("train").get(self.high, {}).get(STRESS))

    def of(self, cell: Cell) -> Path:
        return self.folder / f"n{cell.n_high}-s{cell.seed}"


def bare(geometry: Geometry) -> Atoms:
    """Return a structure without labels."""
    numbers, positions, cell, pbc = geometry
    return Atoms(numbers, positions, cell=cell, pbc=pbc)


def export(path: Path, frames: Sequence[Atoms]) -> Path:
    """Write frames as extxyz, aside and renamed; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".partial")
    ase.io.write(aside, list(frames), format="extxyz")
    return aside.replace(path)


def labelled(store: Store, rows: np.ndarray, fidelity: str) -> list[Atoms]:
    """Return frames with their labels; energies whole, as SevenNet fits references of its own."""
    return [bench_training.frame(store, int(row), fidelity, np.zeros(N_ELEMENTS + 1)) for row in rows]


def rows_of(plan: Plan, cell: Cell) -> dict[str, np.ndarray]:
    """Return fidelity → rows of the store that a cell's recipe trains on."""
    recipe, store = plan.grid.trainings[cell.training].recipe, plan.grid.store
    table = FidelityTable([store.fidelities[name] for name in recipe.fidelities])
    found: dict[str, list[np.ndarray]] = {}
    for pool in build_pools(store, recipe.data.plan, table, recipe.model.backbone.cutoff):
        found.setdefault(pool.fidelity, []).append(pool.rows)
    return {fidelity: np.unique(np.concatenate(parts)) for fidelity, parts in found.items()}


def job_of(plan: Plan, cell: Cell) -> dict[str, Any]:
    """Write the frames of a cell and return what tools/peers/train_sevennet.py trains."""
    folder, store = plan.of(cell), plan.grid.store
    rows = rows_of(plan, cell)
    low, high = LOW_AND_HIGH[plan.preset]
    train = [
        {
            "data_modality": fidelity,
            "file_list": [{"file": str(export(folder / f"{fidelity}.xyz", labelled(store, of, fidelity)))}],
            "data_weight": high if fidelity == plan.high else low,
        }
        for fidelity, of in rows.items()
    ]
    recipe = plan.grid.trainings[cell.training].recipe
    val = store.rows(split=recipe.data.validation_split, fidelity=plan.high, prop=ENERGY)
    val = choose(store, val, 0, recipe.data.validation_max_frames)
    path = export(folder / "val.xyz", labelled(store, val, plan.high))
    options = {"preset": plan.preset} | ({"model": plan.model} if plan.model else {})
    return {
        "folder": str(folder), "marks": [plan.minutes(cell)], "seed": cell.seed, "train": train,
        "val": [{"data_modality": plan.high, "file_list": [{"file": str(path)}]}],
        "n_train": sum(len(of) for of in rows.values()), "n_val": len(val), "batch": BATCH, "cutoff": None,
        "stress": plan.has_stress, "options": options, "slack": bench_training.SLACK,
    }  # fmt: skip


def train(plan: Plan, cell: Cell) -> None:
    """Train a cell, or go on with it; one that is finished is left.

    Raises:
        InputError: the folder holds a training on other frames or labels, or of another time.
    """
    minutes = plan.minutes(cell)
    recipe = plan.grid.trainings[cell.training].recipe
    drawn = {fidelity: replace(cell, high_rows=rows).draw for fidelity, rows in rows_of(plan, cell).items()}
    own = {"draw": cell.draw, "frames": drawn, "fingerprint": recipe.data.fingerprint, "minutes": minutes}
    _require_same(plan.of(cell) / "cell.json", own)
    if (plan.of(cell) / f"at-{minutes:g}.json").exists():
        return
    job = job_of(plan, cell)
    steps = bench_training.probe("sevennet", job, PROBE, job["n_val"] / job["n_train"], minutes)
    path = plan.of(cell) / "job.json"
    path.write_text(json.dumps({**job, "probe": None, "steps": max(steps, 2)}))
    bench_training.start("sevennet", "train_sevennet.py", str(path))


def best_of(plan: Plan, cell: Cell) -> Path:
    """Return a cell's best checkpoint by validation.

    Raises:
        InputError: SevenNet has written none.
    """
    best = plan.of(cell) / "checkpoint_best.pth"
    if not best.is_file():
        raise InputError(
            f"{best}: is missing; SevenNet writes it at its first validation, which takes a whole epoch: give more "
            f"--minutes and another --name; if it was removed, remove {best.parent} to train the cell again"
        )
    return best


class Predictor:
    """Predicts with a cell's best checkpoint at the high fidelity, in SevenNet's environment."""

    def __init__(self, plan: Plan, cell: Cell):
        self.model = best_of(plan, cell)
        self.peer = f"sevennet={plan.high}"

    def predict(self, structures: Sequence[Geometry]) -> dict[str, np.ndarray]:
        """Return what tools/peers/evaluate.py writes."""
        with tempfile.TemporaryDirectory() as folder:
            frames = export(Path(folder) / "frames.xyz", [bare(one) for one in structures])
            output = Path(folder) / "predicted.npz"
            bench_training.start("sevennet", "evaluate.py", self.peer, str(self.model), f"{frames}@:", str(output))
            return dict(np.load(output))

    def energies(self, structures: Sequence[Geometry]) -> np.ndarray:
        """Return energies [n], eV; with references, which cancel in all that judges ask."""
        return self.predict(structures)["energy"]


def evaluate(
    predict: Callable[[Sequence[Geometry]], Mapping[str, np.ndarray]], store: Store, split: str, high: str
) -> Evaluation:  # fmt: skip
    """Return the errors of predictions on a split, as `mffm.evaluate.parity` has them of ours."""
    rows = store.rows(split=split, fidelity=high)
    found = predict([store.geometry(int(row)) for row in rows])
    labels = [store.labels(int(row), high) for row in rows]
    n_atoms = np.asarray(store.n_atoms[rows], np.int64)
    ends = np.cumsum(n_atoms)
    result = Evaluation(split)
    for prop, counts in ((ENERGY, np.ones_like(n_atoms)), (FORCES, 3 * n_atoms), (STRESS, np.full_like(n_atoms, 9))):
        has = [prop in label for label in labels]
        if not any(has) or len(found[prop]) == 0:
            continue
        of_frame = np.split(found[prop], ends[:-1]) if prop == FORCES else list(found[prop])
        pairs = [(p, label[prop]) for p, label, there in zip(of_frame, labels, has, strict=True) if there]
        scale = n_atoms[has] if prop == ENERGY else 1.0
        predictions, values = (np.concatenate([np.ravel(pair[i]) for pair in pairs]) for i in (0, 1))
        result.predictions[high, prop] = predictions.astype(np.float64) / scale
        result.labels[high, prop] = values.astype(np.float64) / scale
        result.frames[high, prop] = rows[has], counts[has]
    return result


def judged_before(plan: Plan, cell: Cell) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a cell is judged by, its weights included, and what was found by just that; empty where nothing.

    Raises:
        InputError: the cell has no best checkpoint.
    """
    grid, path = plan.grid, plan.of(cell) / "judged.json"
    key = {
        "weights_sha256": sha256(best_of(plan, cell)), "labels": external.fingerprint(grid),
        "splits": grid.config.splits, "judges": judges.digests(grid.judges),
    }  # fmt: skip
    content = read_json(path) if path.is_file() else {}
    return key, content if content.get("key") == key else {}


def judge(plan: Plan, cell: Cell, name: str, folder: Path) -> dict[str, Any]:
    """Return a cell's entry of the results; one that was judged before is read."""
    facts = read_json(plan.of(cell) / f"at-{plan.minutes(cell):g}.json")
    grid = plan.grid
    key, content = judged_before(plan, cell)
    if not content:
        predictor = Predictor(plan, cell)
        found = {
            kind: evaluate(predictor.predict, grid.store, split, plan.high)
            for kind, split in grid.config.splits.items()
        }
        frames = {(k, p): e for k, evaluation in found.items() for p, e in evaluation.frame_errors(plan.high).items()}
        write_frames(external.frames_path(folder, name, cell.n_high, cell.seed), frames)
        errors = {kind: evaluation.rows() for kind, evaluation in found.items()}
        by_judge = {one.name: one.judge(predictor.energies) for one in grid.judges}
        content = {"key": key, "errors": errors, "found": by_judge}
        write_json(plan.of(cell) / "judged.json", content)
    return {
        "n_high": cell.n_high, "seed": cell.seed, "draw": cell.draw, "errors": content["errors"],
        "found": content["found"], "cpu_seconds": facts["cpu_s"], "steps": facts["step"],
    }  # fmt: skip


def chosen(grid: Grid, like: str, n_high: Sequence[int]) -> list[Cell]:
    """Return the cells of a method that are to be trained.

    Raises:
        InputError: no such method, one that has no training of its own or leaves out labels of its frames, or no cell
            with such a number.
    """
    cells = [cell for cell in grid.cells if cell.method == like]
    if not cells or cells[0].is_refit or cells[0].fidelity != grid.config.high or cells[0].plus:
        usable = [m for m, spec in grid.config.methods.items() if not spec.refit and not spec.fidelity]
        raise InputError(f"--like {like}: is not a method that trains on labels of both levels: {known(usable)}")
    recipe = grid.trainings[cells[0].training].recipe
    if len(recipe.fidelities) < 2:
        raise InputError(f"--like {like}: trains one fidelity; name a method that trains several")
    for pool in recipe.data.plan.pools:
        there = {"split": pool.split, "source": pool.source, "fidelity": pool.fidelity}
        left = [p for p in PROPERTIES if p not in pool.properties and len(grid.store.rows(**there, prop=p))]
        if left:
            raise InputError(
                f"--like {like}: leaves out {known(left)} of {pool.fidelity}, which this tool cannot; name a method "
                "that uses all labels of its frames"
            )
    unknown = set(n_high) - {cell.n_high for cell in cells}
    if unknown:
        numbers = known({cell.n_high for cell in cells})
        raise InputError(f"--n-high: no cell of {like} with {known(unknown)}; there are {numbers}")
    return [cell for cell in cells if not n_high or cell.n_high in n_high]


def minutes_of(run: StudyRun, method: str) -> Callable[[Cell], float]:
    """Return a function: cell → CPU minutes of a method's cell with the same labels and seed, stages included.

    Raises:
        InputError: no such cell, or one without a measured time.
    """
    cells = {(cell.n_high, cell.seed): cell for cell in run.grid.cells if cell.method == method}

    def minutes(cell: Cell) -> float:
        ours = cells.get((cell.n_high, cell.seed))
        if ours is None:
            raise InputError(f"--time-of {method}: has no cell with {cell.n_high} frames and seed {cell.seed}")
        seconds = run.cpu_seconds(ours)
        if seconds[0] is None or seconds[1] is None:
            raise InputError(f"{ours.name}: its CPU time is not known: train the study first, or give --minutes")
        return round((seconds[0] + seconds[1]) / 60, 3)

    return minutes


def notes_of(settings: StudyConfig, like: str, time_of: str, minutes: float | None) -> list[str]:
    """Return what the report says of the training."""
    same = f"that of {settings.title(time_of)}, cell by cell" if minutes is None else f"{minutes:g} minutes"
    return [
        f"CPU time: up to {bench_training.SLACK:g} times {same}, or less where the schedule ends first; from the first "
        "step on, probes and start-up left out.",
        f"Frames: those of {settings.title(like)}; its validation labels choose SevenNet's best checkpoint.",
        "Optimiser, schedule, batch, loss and element references are the preset's.",
    ]


def title_of(network: str, minutes: float | None) -> str:
    """Return the name in the report: a study may hold several of these results."""
    return f"SevenNet's own code ({network}{'' if minutes is None else f', {minutes:g} CPU minutes'})"


def main(
    config: Annotated[Path, typer.Argument(help="study YAML")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.key=value, as given to mffm study")] = None,
    folder: Annotated[Path | None, typer.Option(help="of the study; runs/studies/<name> where not given")] = None,
    name: Annotated[str, typer.Option(help="of the results in the folder, and of what trains them")] = "sevennet",
    like: Annotated[str, typer.Option(help="method of the study whose frames are taken")] = "sevennet_mf",
    time_of: Annotated[str, typer.Option(help="method of the study whose CPU time is taken")] = "mffm",
    minutes: Annotated[float | None, typer.Option(help="CPU minutes of a cell, instead")] = None,
    preset: Annotated[str, typer.Option(help=f"of SevenNet: {', '.join(LOW_AND_HIGH)}")] = "multi_modal",
    model: Annotated[str | None, typer.Option(help="another preset's network: base, sevennet-l3i5, MF_0")] = None,
    n_high: Annotated[list[int] | None, typer.Option(help="only cells with so many labels; repeatable")] = None,
    workers: Annotated[int, typer.Option(min=1, help="trainings at a time")] = 1,
) -> None:
    """Train SevenNet on the cells of a study and write external/NAME.json for its report."""
    settings = load_study(config, overrides or [])
    place = folder or Path("runs/studies") / settings.name
    if preset not in LOW_AND_HIGH:
        raise InputError(f"--preset {preset}: known are {known(LOW_AND_HIGH)}")
    if install.python("sevennet") is None:
        raise InputError(install.remedy("sevennet"))
    grid = expand(settings, config, place)
    run = StudyRun(grid, place, LocalExecutor(1))
    cells = chosen(grid, like, n_high or [])
    time_for = minutes_of(run, time_of) if minutes is None else lambda cell: minutes
    home = (place / external.FOLDER).resolve()
    plan = Plan(grid, home / name / "training", preset, model, time_for)
    plan.folder.mkdir(parents=True, exist_ok=True)
    with locked(plan.folder / "lock"):
        # With --minutes no method's time is taken.
        time_from = time_of if minutes is None else None
        own = {"preset": preset, "model": model, "like": like, "time_of": time_from, "minutes": minutes}
        _require_same(plan.folder / "settings.json", own)
        with ThreadPoolExecutor(workers) as pool:
            for cell, _ in zip(cells, pool.map(lambda cell: train(plan, cell), cells), strict=True):
                print(f"n{cell.n_high}-s{cell.seed}: {plan.minutes(cell):g} CPU minutes trained", flush=True)
        entries = [judge(plan, cell, name, place) for cell in cells]
    shown = {"preset": preset, "network": model or preset, "batch": BATCH, "weights low, high": LOW_AND_HIGH[preset]}
    content = {
        "name": name, "title": title_of(model or preset, minutes), "code": install.version("sevennet"),
        "settings": shown, "notes": notes_of(settings, like, time_of, minutes),
        "fingerprint": external.fingerprint(grid), "splits": settings.splits,
        "judges": judges.digests(grid.judges), "machine": bench_training.machine(), "date": time.strftime("%Y-%m-%d"),
        "cells": entries,
    }  # fmt: skip
    results = validate(ExternalResults, content, "the results")
    write_json(home / f"{name}.json", results.model_dump(mode="json"))
    for cell in results.cells:
        shown = ", ".join(f"{k} {r['property']} {r['mae']:.4g}" for k, rows in cell.errors.items() for r in rows)
        print(f"n{cell.n_high}-s{cell.seed}: {cell.steps} steps in {cell.cpu_seconds / 60:.2f} CPU minutes: {shown}")
    print(f"{home / f'{name}.json'}: drawn by mffm study {config} --report-only")


def _require_same(path: Path, own: dict[str, Any]) -> None:
    """Refuse to go on in a folder whose trainings were made from something else; note what they are made from."""
    before = read_json(path) if path.is_file() else own
    changed = [key for key in own if before.get(key) != own[key]]
    if changed:
        told = "; ".join(f"{key}: {before.get(key)}, now {own[key]}" for key in changed)
        raise InputError(f"{path.parent}: holds trainings with another {told}; give another --name, or remove it")
    write_json(path, own)


if __name__ == "__main__":
    from mffm.errors import told

    try:
        typer.run(main)
    except (InputError, OSError) as error:
        message = told(error)
        if message is None:
            raise
        raise SystemExit(f"error: {message}") from error
