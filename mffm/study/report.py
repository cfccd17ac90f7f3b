"""The report of a study: one summary (JSON), the page made from it (Markdown) and the learning curves (PNG)."""

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mffm import plots
from mffm.executor import machine
from mffm.keys import REPORT_UNITS
from mffm.release import code_version, write_json, write_text
from mffm.study import curves, external, judges
from mffm.study.advice import advice
from mffm.study.compare import not_worse
from mffm.study.gate import Gate
from mffm.study.grid import Grid
from mffm.study.page import KINDS, markdown
from mffm.study.run import Judged

Errors = dict[tuple[str, str], dict[str, dict[int, dict[int, float]]]]  # panel → method → labels → seed → MAE


def by_panel(grid: Grid, judged: Sequence[Judged]) -> Errors:
    """Return (kind of split, property) → method → labels → seed → MAE, in the study's order."""
    panels: Errors = {(kind, prop): {} for kind in grid.config.splits for prop in grid.config.properties}
    for one in judged:
        for panel, methods in panels.items():
            if panel in one.errors:
                labels = methods.setdefault(one.cell.method, {}).setdefault(one.cell.n_high, {})
                labels[one.cell.seed] = one.errors[panel]
    return panels


def summarise(
    grid: Grid, judged: Sequence[Judged], gates: Sequence[Gate], failed: Mapping[str, str],
    others: Sequence[external.External] = (),
) -> dict[str, Any]:  # fmt: skip
    """Return all that the report says, as JSON.

    Args:
        others: of other codes; in all but the advice.
    """
    config, own = grid.config, by_panel(grid, judged)
    found = [(o.cell.method, o.cell.n_high, o.cell.seed, o.found) for o in judged]
    methods = {name: _method(grid, name) for name in config.methods} | {o.name: o.method() for o in others}
    errors = {
        panel: {**of_methods, **{o.name: of_other for o in others if (of_other := o.errors(panel))}}
        for panel, of_methods in own.items()
    }
    done = {one.cell.name for one in judged}
    split_counts = {kind: grid.store.label_counts(split).get(config.high, {}) for kind, split in config.splits.items()}
    return {
        "study": config.name,
        "date": time.strftime("%Y-%m-%d"),
        "machine": "; ".join(dict.fromkeys(m for one in judged for m in one.machines)) or machine(),
        "versions": code_version(),
        "store": {"name": grid.store.path.name, "fingerprint": grid.store.fingerprint},
        "high": config.high,
        "splits": {k: {"split": s, "labels": split_counts[k]} for k, s in config.splits.items()},
        "seeds": config.seeds,
        "methods": methods,
        "baselines": config.baselines,
        "cells": [_cell(grid, one) for one in judged],
        "missing": [cell.name for cell in grid.cells if cell.name not in done],
        "failed": dict(failed),
        "curves": {"/".join(panel): _curves(methods) for panel, methods in errors.items()},
        "factors": {"/".join(panel): _factors(grid, methods) for panel, methods in errors.items()},
        "not_worse": not_worse(grid, judged, others),
        "judges": judges.summarise(grid.judges, [*found, *(cell for o in others for cell in o.judged())]),
        "cpu_minutes": _cpu(grid, judged) | {o.name: o.cpu_minutes() for o in others},
        "tuning": _tuning(grid, judged),
        "fairness": fairness(grid, judged),
        "gates": [
            {"low": g.low, "split": g.split, "frames": g.n_frames, "r2": g.r2, "force_cosine": g.force_cosine}
            for g in gates
        ],
        "advice": advice(grid, own),
    }  # fmt: skip


def _method(grid: Grid, name: str) -> dict[str, Any]:
    spec = grid.config.methods[name]
    return {
        "title": grid.config.title(name),
        "external": None,
        "changes": spec.changes,
        "start_from": spec.start_from,
        "refit": spec.refit,
        "plus": spec.plus,
        "stages": {stage: grid.config.stages[stage].changes for stage in spec.stages},
        "needs_lf_at_inference": spec.needs_lf_at_inference,
        "steps": grid.steps_of(name),
    }


def _tuning(grid: Grid, judged: Sequence[Judged]) -> dict[str, Any] | None:
    """Return the number of trials of a cell, and each tuned method's trials with the number of cells of each choice."""
    trials = {name: grid.config.trials(name) for name in grid.config.methods}
    tuned = {name: values for name, values in trials.items() if values[0]}
    if not tuned:
        return None
    chosen = {n: [grid.trainings[one.cell.training].tuned for one in judged if one.cell.method == n] for n in tuned}
    return {
        "trials": max(len(values) for values in tuned.values()),
        "methods": {
            name: [{"values": trial, "cells": chosen[name].count(trial)} for trial in values]
            for name, values in tuned.items()
        },
    }


def _cell(grid: Grid, one: Judged) -> dict[str, Any]:
    cell = one.cell
    return {
        "method": cell.method, "n_high": cell.n_high, "seed": cell.seed, "training": cell.training, "plus": cell.plus,
        "tuned": dict(grid.trainings[cell.training].tuned),
        "high_frames": cell.draw, "plan": one.plan, "last_step": one.last_step, "cpu_seconds": one.cpu_seconds,
        "stage_cpu_seconds": one.stage_cpu_seconds, "errors": one.rows,
    }  # fmt: skip


def _curves(methods: Mapping[str, Mapping[int, Mapping[int, float]]]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [
            {"n_high": n, "mean": curves.mean(s.values()), "least": min(s.values()), "most": max(s.values()),
             "seeds": len(s)}
            for n, s in sorted(labels.items())
        ]
        for name, labels in methods.items()
    }  # fmt: skip


def _factors(grid: Grid, methods: Mapping[str, Mapping[int, Mapping[int, float]]]) -> dict[str, Any]:
    """Return baseline → method → k at each number of labels, with every seed's, and k at the baseline's best."""
    found: dict[str, Any] = {}
    for baseline in grid.config.baselines:
        if baseline not in methods:
            continue
        base = curves.mean_curve(methods[baseline])
        found[baseline] = {}
        for name, labels in methods.items():
            if name == baseline:
                continue
            points = []
            for n, seeds in sorted(labels.items()):
                k = curves.factor(base, n, curves.mean(seeds.values()))
                own = curves.factors_of_seeds(methods[baseline], seeds, n)
                points.append({"n_high": n, **_bounded(k), "seeds": {s: _bounded(b) for s, b in own.items()}})
            best = curves.factor_at_best(base, curves.mean_curve(labels))
            found[baseline][name] = {"points": points, "at_best": _bounded(best)}
    return found


def _bounded(k: curves.Bounded) -> dict[str, Any]:
    return {"k": k.value, "bound": k.bound}


def _cpu(grid: Grid, judged: Sequence[Judged]) -> dict[str, dict[str, float | None]]:
    """Return method → mean CPU minutes of a cell's own training and of the stage that it uses; None: not measured."""
    found: dict[str, dict[str, float | None]] = {}
    for name in grid.config.methods:
        ours = [one for one in judged if one.cell.method == name]
        found[name] = {}
        for key, values in (
            ("own", [one.cpu_seconds for one in ours]), ("stage", [one.stage_cpu_seconds for one in ours])
        ):  # fmt: skip
            known = [v for v in values if v is not None]
            found[name][key] = sum(known) / len(known) / 60 if known else None
    return found


def fairness(grid: Grid, judged: Sequence[Judged]) -> dict[str, Any]:
    """Return what is the same for all methods, checked on the runs, and what is not."""
    draws: dict[tuple[int, int], dict[str, list[str]]] = {}
    for one in judged:
        of_point = draws.setdefault((one.cell.n_high, one.cell.seed), {})
        of_point.setdefault(one.cell.draw, []).append(one.cell.method)
    unequal = [
        f"{n} frames, seed {seed}: " + " against ".join(", ".join(m) for m in groups.values())
        for (n, seed), groups in draws.items() if len(groups) > 1
    ]  # fmt: skip
    plans: dict[tuple[tuple[int, int, str], ...], list[str]] = {}
    for name in grid.config.methods:
        if grid.config.methods[name].refit is None:
            key = tuple((one.cell.n_high, one.cell.seed, one.plan) for one in judged if one.cell.method == name)
            plans.setdefault(key, []).append(name)
    sizes: dict[str, dict[str, set[int]]] = {}
    for one in judged:
        for kind, rows in one.rows.items():
            for row in (r for r in rows if r["property"] in grid.config.properties):
                sizes.setdefault(kind, {}).setdefault(row["property"], set()).add(row["n_systems"])
    steps = {name: grid.steps_of(name) for name in grid.config.methods}
    stopped = [
        one.cell.name for one in judged
        if not one.cell.is_refit and one.last_step < grid.trainings[one.cell.training].recipe.train.steps
    ]  # fmt: skip
    a_recipe = next(iter(grid.trainings.values())).recipe
    validation = grid.store.label_counts(a_recipe.data.validation_split).get(grid.config.high, {})
    limits = {
        one.cell.n_high: grid.trainings[one.cell.training].recipe.data.validation_max_frames
        for one in judged if not one.cell.is_refit
    }  # fmt: skip
    return {
        "steps": steps,
        "steps_equal": len({tuple(s) for s in steps.values()}) == 1,
        "stopped_early": stopped,
        "high_frames_equal": not unequal,
        "high_frames_unequal": unequal,
        "high_frames_nested": all(
            set(a.cell.high_rows) <= set(b.cell.high_rows)
            for a, b in itertools.pairwise(sorted(judged, key=lambda one: (one.cell.seed, one.cell.n_high)))
            if a.cell.seed == b.cell.seed
        ),
        "same_batches": [names for key, names in plans.items() if key],
        "test_labels": {kind: {p: sorted(n) for p, n in props.items()} for kind, props in sizes.items()},
        "test_equal": all(len(n) == 1 for props in sizes.values() for n in props.values()),
        "validation_split": a_recipe.data.validation_split,
        "validation_labels": validation,
        "validation_max_frames": {n: limit for n, limit in sorted(limits.items()) if limit is not None},
    }


def write(grid: Grid, summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write report.md, report.json, learning_curves.png and the judges' figures; return their paths."""
    paths = [folder / "report.md", folder / "report.json", folder / "learning_curves.png"]
    write_json(paths[1], summary)
    write_text(paths[0], markdown(summary))
    titles = {n: method["title"] + (" ‡" if method["external"] else "") for n, method in summary["methods"].items()}
    apart = {titles[n] for n, method in summary["methods"].items() if method["needs_lf_at_inference"]}
    panels = {}
    for panel, methods in summary["curves"].items():
        kind, prop = panel.split("/")
        label = f"{KINDS[kind]} ({grid.config.splits[kind]}), {prop} MAE, {REPORT_UNITS[prop][0]}"
        panels[label] = {
            titles[name]: [(p["n_high"], p["mean"], p["least"], p["most"]) for p in points]
            for name, points in methods.items()
        }
    plots.label_curves(paths[2], panels, f"frames with {grid.config.high} labels", len(grid.config.properties), apart)
    return paths + judges.draw(summary["judges"], titles, grid.config.high, folder)
