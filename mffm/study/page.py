"""The page of a study: Markdown from its summary."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mffm.keys import REPORT_UNITS
from mffm.study import judges
from mffm.study.curves import Bounded
from mffm.study.tables import spread, table

KINDS = {"iid": "IID", "ood": "OOD"}
Summary = Mapping[str, Any]


def markdown(summary: Summary) -> str:
    """Return the report as Markdown."""
    parts = [
        [f"# Study {summary['study']}", "", _made(summary)],
        _incomplete(summary),
        ["## Advice", "", *(f"- {line}" for line in summary["advice"])],
        ["## Learning curves", "", "![learning curves](learning_curves.png)", "", _curves_note(summary)],
        *(_errors(summary, panel) for panel in summary["curves"]),
        _factors(summary),
        _not_worse(summary),
        *judges.sections(summary["judges"], _titles(summary), summary["high"]),
        _cost(summary),
        _fairness(summary),
        _gates(summary),
        _methods(summary),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _made(summary: Summary) -> str:
    splits = "; ".join(
        f"{KINDS[kind]}: split `{s['split']}`, {', '.join(f'{n} {p}' for p, n in s['labels'].items())}"
        for kind, s in summary["splits"].items()
    )
    seeds = ", ".join(str(s) for s in summary["seeds"])
    return (
        f"Errors on `{summary['high']}` labels. {splits}. Seeds {seeds}. Made {summary['date']} on "
        f"{summary['machine']}, mffm {summary['versions']['mffm']}, torch {summary['versions']['torch']}. Store "
        f"`{summary['store']['name']}`, fingerprint `{summary['store']['fingerprint'][:16]}`."
    )


def _incomplete(summary: Summary) -> list[str]:
    if not summary["missing"]:
        return []
    lines = [f"**Not complete:** {len(summary['missing'])} cells are missing: {', '.join(summary['missing'])}."]
    return lines + [f"- {name} failed: {why}" for name, why in summary["failed"].items()]


def _ordered(summary: Summary, names: Iterable[str]) -> list[str]:
    """Return methods with those last that need a low-fidelity calculation at inference."""
    return sorted(names, key=lambda n: summary["methods"][n]["needs_lf_at_inference"])


def _title(summary: Summary, name: str) -> str:
    method = summary["methods"][name]
    return method["title"] + (" †" if method["needs_lf_at_inference"] else " ‡" if method["external"] else "")


def _titles(summary: Summary) -> dict[str, str]:
    return {name: _title(summary, name) for name in _ordered(summary, summary["methods"])}


def _curves_note(summary: Summary) -> str:
    text = "Geometric means over the seeds; in brackets, and as bars in the figure, the least and the most of a seed."
    if any(m["needs_lf_at_inference"] for m in summary["methods"].values()):
        text += " † needs a low-fidelity calculation for every prediction (broken lines); ranked apart."
    if any(m["external"] for m in summary["methods"].values()):
        text += " ‡ is another code's training on the same labels; no advice names it."
    return text


def _errors(summary: Summary, panel: str) -> list[str]:
    kind, prop = panel.split("/")
    methods = summary["curves"][panel]
    labels = sorted({p["n_high"] for points in methods.values() for p in points})
    rows = []
    for name in _ordered(summary, methods):
        at = {p["n_high"]: p for p in methods[name]}
        rows.append([_title(summary, name), *(spread(at.get(n)) for n in labels)])
    unit = REPORT_UNITS[prop][0]
    return [
        f"### {KINDS[kind]} {prop}, MAE in {unit}", "",
        *table([f"`{summary['high']}` frames", *(str(n) for n in labels)], rows),
    ]  # fmt: skip


def _factors(summary: Summary) -> list[str]:
    lines = [
        "## Labels saved", "",
        "k = labels that a baseline needs for a method's error ÷ labels of the method, from straight lines between the "
        "baseline's points in the logarithms of labels and error, at the first crossing. `>`: the baseline does not "
        "get so good with its most labels; `≤`: it is as good with its least. In brackets: the least and the most of a "
        "seed, each against the baseline of the same seed. Last column: k at the least error that the baseline "
        "reaches; `≥`: the method is as good with its least labels; `<`: it never is.",
    ]  # fmt: skip
    for baseline in summary["baselines"]:
        for panel, found in summary["factors"].items():
            methods = found.get(baseline)
            if not methods:
                continue
            kind, prop = panel.split("/")
            labels = sorted({p["n_high"] for m in methods.values() for p in m["points"]})
            rows = []
            for name in _ordered(summary, methods):
                at = {p["n_high"]: p for p in methods[name]["points"]}
                cells = [_k(at.get(n)) for n in labels]
                rows.append([_title(summary, name), *cells, _text(methods[name]["at_best"])])
            head = [f"`{summary['high']}` frames", *(str(n) for n in labels), "at the baseline's best"]
            lines += ["", f"### k against {summary['methods'][baseline]['title']}, {KINDS[kind]} {prop}", ""]
            lines += table(head, rows)
    return lines


def _k(point: Mapping[str, Any] | None) -> str:
    if point is None:
        return ""
    seeds = sorted(point["seeds"].values(), key=lambda b: b["k"])
    spread = f" ({_text(seeds[0])} to {_text(seeds[-1])})" if len(seeds) > 1 else ""
    return _text(point) + spread


def _text(k: Mapping[str, Any]) -> str:
    return Bounded(k["k"], k["bound"]).text()


def _not_worse(summary: Summary) -> list[str]:
    found = summary["not_worse"]
    if found is None:
        return []
    ours, (low, high) = summary["methods"][found["candidate"]]["title"], found["limits"]
    resampled = "test frames alone, as there is one seed" if len(summary["seeds"]) == 1 else "seeds and test frames"
    lines = [
        f"## Is {ours} not worse than the others?", "", *(f"- {line}" for line in found["verdict"]), "",
        f"Error of {ours} ÷ error of the method in the row, on the same frames with the same seeds, geometric mean "
        f"over the seeds; then the bound that the ratio stays below with {100 * found['level']:.0f} % confidence, by "
        f"{found['draws']} bootstrap draws of {resampled}. ✗: the bound is above {low}; ✗✗: above {high}. A bound "
        "above a limit is no proof of the opposite. Methods that need a low-fidelity calculation for a prediction are "
        "left out.",
    ]  # fmt: skip
    if found["missing"]:
        lines += ["", f"**Not compared, or not with all seeds:** {', '.join(found['missing'])}."]
    if found["without_common_number"]:
        names = ", ".join(summary["methods"][name]["title"] for name in found["without_common_number"])
        lines += ["", f"No number of labels in common: {names}."]
    for panel, methods in found["panels"].items():
        kind, prop = panel.split("/")
        points = [point for of_method in methods.values() for point in of_method]
        if not points:
            continue
        sizes = dict.fromkeys(
            f"{p['frames']} frames" + (f" of {p['units']} groups, resampled as wholes" if p["unit"] == "groups" else "")
            for p in points
        )  # fmt: skip
        labels = sorted({point["n_high"] for point in points})
        rows = []
        for name, of_method in methods.items():
            at = {point["n_high"]: point for point in of_method}
            rows.append([_title(summary, name), *(_bound(at.get(n), low, high) for n in labels)])
        lines += ["", f"### {ours} against the others, {KINDS[kind]} {prop}: {' or '.join(sizes)}", ""]
        lines += table([f"`{summary['high']}` frames", *(str(n) for n in labels)], rows)
    return lines


def _bound(point: Mapping[str, Any] | None, low: float, high: float) -> str:
    if point is None:
        return ""
    mark = " ✗✗" if point["upper"] > high else " ✗" if point["upper"] > low else ""
    return f"{point['ratio']:.3f} (< {point['upper']:.3f}){mark}"


def _cost(summary: Summary) -> list[str]:
    def minutes(value: float | None) -> str:
        return "not measured" if value is None else f"{value:.2g}"

    rows = []
    for name in _ordered(summary, summary["methods"]):
        own, stage = summary["cpu_minutes"][name]["own"], summary["cpu_minutes"][name]["stage"]
        steps = " or ".join(str(s) for s in summary["methods"][name]["steps"])
        rows.append([_title(summary, name), steps, minutes(own), minutes(stage)])
    tuning = summary["tuning"]
    trials = f" Own trainings are those of the chosen trial; {tuning['trials']} were made for each." if tuning else ""
    head = ["method", "optimiser steps, stage and own", "CPU minutes of a cell's training", "CPU minutes of its stage"]
    return [
        "## CPU time", "",
        "Means over the cells; start-up, validation and every attempt included. A stage is trained once per seed, for "
        "all cells." + trials, "",
        *table(head, rows),
    ]  # fmt: skip


def _fairness(summary: Summary) -> list[str]:
    fair, title = summary["fairness"], lambda n: summary["methods"][n]["title"]
    lines = ["## What is equal", ""]
    if fair["steps_equal"]:
        lines.append(f"- Optimiser steps: {next(iter(fair['steps'].values()))[0]} for every method, stages included.")
    else:
        each = ", ".join(f"{title(n)} {' or '.join(str(s) for s in steps)}" for n, steps in fair["steps"].items())
        lines.append(f"- **Optimiser steps are not equal**: {each}.")
    if fair["stopped_early"]:
        lines.append(f"- Stopped early on validation (train.patience): {', '.join(fair['stopped_early'])}.")
    test = "; ".join(
        f"{KINDS[kind]} " + ", ".join(f"{' or '.join(str(n) for n in sizes)} {p}" for p, sizes in props.items())
        for kind, props in fair["test_labels"].items()
    )
    if fair["test_equal"]:
        lines.append(f"- Test set: the same labels for every cell ({test}).")
    else:
        lines.append(f"- **The test sets are not equal**: labels counted are {test}.")
    if fair["high_frames_equal"]:
        nested = "are a part of more" if fair["high_frames_nested"] else "are **not** a part of more"
        lines.append(
            f"- High-fidelity frames: at equal number and seed all methods have the same ones, and fewer {nested}."
        )
    else:
        lines.append(f"- **High-fidelity frames differ**: {'; '.join(fair['high_frames_unequal'])}.")
    alike = [names for names in fair["same_batches"] if len(names) > 1]
    shown = "; ".join(", ".join(title(n) for n in names) for names in alike)
    lines.append(
        f"- Batches: the same draws of (frame, fidelity), step by step as far as they go, for {shown}; other methods "
        "have other pools."
        if alike else "- Batches: no two methods have the same pools, so each has its own draws."
    )  # fmt: skip
    counts = ", ".join(f"{n} {p}" for p, n in fair["validation_labels"].items()) or "none"
    lines.append(
        f"- Validation: the best weights are chosen on split `{fair['validation_split']}`, which has {counts} labels "
        f"of `{summary['high']}` beside those counted above, the same for every method that uses them."
    )
    if fair["validation_max_frames"]:
        each = ", ".join(f"{limit} with {n}" for n, limit in fair["validation_max_frames"].items())
        lines[-1] += f" Of these it uses so many frames at most: {each}."
    lines += [
        f"- {method['title']} ‡: trained by {method['external']}, {method['made']}, on the same high-fidelity frames "
        f"and judged on the same labels. {' '.join(method['notes'])}".rstrip()
        for method in summary["methods"].values() if method["external"]
    ]  # fmt: skip
    return lines + _tuning(summary)


def _tuning(summary: Summary) -> list[str]:
    tuning = summary["tuning"]
    if tuning is None:
        return [
            "- Tuning: none is part of the study. Every method has the base recipe's values but for the changes below."
        ]
    lines = [
        f"- Tuning: {tuning['trials']} trials for each cell with a training of its own; the one with the best "
        "validation value of its `train.best` is judged. Stages are not tuned. Cells in which a trial was chosen:"
    ]
    for name, trials in tuning["methods"].items():
        shown = "; ".join(
            ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in trial["values"].items())
            + f" in {trial['cells']}"
            for trial in trials
        )  # fmt: skip
        lines.append(f"  - {summary['methods'][name]['title']}: {shown}.")
    return lines


def _gates(summary: Summary) -> list[str]:
    if not summary["gates"]:
        return []
    rows = [
        [f"`{g['low']}`", f"`{g['split']}`", str(g["frames"]), *("not known" if g[k] is None else f"{g[k]:.3f}" for k in
         ("r2", "force_cosine"))]
        for g in summary["gates"]
    ]  # fmt: skip
    head = ["low fidelity", "split", "frames with both", "R² of energies after references", "cosine of forces"]
    return [f"## How far the low fidelity is from `{summary['high']}`", "", *table(head, rows)]


def _methods(summary: Summary) -> list[str]:
    rows = []
    for name in _ordered(summary, summary["methods"]):
        method = summary["methods"][name]
        changes = "<br>".join(f"`{k}: {json.dumps(v)}`" for k, v in method["changes"].items()) or "none"
        if method["refit"]:
            changes = "no training: references refitted"
        if method["external"]:
            changes = f"none of ours: {method['external']}<br>{changes}"
        stages = [
            "<br>".join([_stage(method, stage), *(f"`{k}: {json.dumps(v)}`" for k, v in changed.items())])
            for stage, changed in method["stages"].items()
        ]
        rows.append([f"{_title(summary, name)} (`{name}`)", changes, "<br>".join(stages)])
    return ["## Methods", "", *table(["method", "changes in the base recipe", "stage, and its changes"], rows)]


def _stage(method: Mapping[str, Any], stage: str) -> str:
    uses = {"start_from": "starts from it", "plus": "its prediction is added"}
    shown = [text for key, text in uses.items() if method[key] == stage]
    return f"`{stage}`" + (f" ({', '.join(shown)})" if shown else "")
