"""One page of a benchmark run: scores beside the leaderboard, failures by structure, timings, what was not run."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mffm import __version__, plots
from mffm.evaluate import published
from mffm.evaluate.benchmark.run import Finished, NotRun, Outcome
from mffm.evaluate.benchmark.task import LAMBENCH, MATBENCH_DISCOVERY, name_of
from mffm.evaluate.lambench import scores
from mffm.evaluate.matbench_discovery.scores import combined
from mffm.release import write_text

NAMED = (  # of the 62 rows of Matbench Discovery, from the first generation to the newest
    "CHGNet", "MACE-MP-0", "SevenNet-0", "SevenNet-l3i5", "MACE-MPA-0", "SevenNet-MF-ompa", "eSEN-30M-OAM",
    "PET-OAM-XL",
)  # fmt: skip
FAILURES_SHOWN = 40
SIGNED = ("κ_SRD",)  # the nearer to 0 the better
SPOKES_OF = 3  # published models in the radar plot
HIGHER_IS_BETTER = ("F1", "DAF", "Precision", "Recall", "Accuracy", "R2", "success_rate", "symmetry_match")
Runs = Mapping[str, Sequence[Outcome]]  # label of a run (a fidelity) → its tasks


def write(folder: Path, potential: str, runs: Runs) -> Path:
    """Write ``report.md`` and, where there is something to draw, ``lambench.png``; return the page's path."""
    parts = [
        f"# Benchmark of {potential}\n\n{time.strftime('%Y-%m-%d %H:%M %Z')}, mffm {__version__}",
        *(
            _suite(s, runs, folder)
            for s in (MATBENCH_DISCOVERY, LAMBENCH)
            if any(o.task.suite == s for o in _outcomes(runs))
        ),
        _aggregates(folder, runs),
        _failures(runs),
        _timings(runs),
        _not_run(runs),
    ]
    path = folder / "report.md"
    write_text(path, "\n\n".join(p for p in parts if p) + "\n")
    return path


def _outcomes(runs: Runs) -> list[Outcome]:
    return [o for outcomes in runs.values() for o in outcomes]


def _finished(runs: Runs, suite: str) -> dict[str, dict[str, Finished]]:
    """Return task → run → what was finished of a suite."""
    found: dict[str, dict[str, Finished]] = {}
    for label, outcomes in runs.items():
        for outcome in outcomes:
            if isinstance(outcome, Finished) and outcome.task.suite == suite:
                found.setdefault(name_of(outcome.task), {})[label] = outcome
    return found


def number(value: float | str | None) -> str:
    """Return a value as a cell shows it."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return value if isinstance(value, str) else str(value) if isinstance(value, int) else f"{value:.4g}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [" | ".join(header), "|".join("---" for _ in header), *(" | ".join(map(number, r)) for r in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def _suite(suite: str, runs: Runs, folder: Path) -> str:
    found = _finished(runs, suite)
    source = published.MATBENCH_DISCOVERY if suite == MATBENCH_DISCOVERY else published.LAMBENCH
    parts = [f"## {suite}\n\nPublished rows: {source}."]
    for by_run in found.values():
        first = next(iter(by_run.values()))
        # A part of a set, easier or harder than the whole, is never put beside published rows.
        compare = first.score.compare if all(o.is_whole for o in by_run.values()) else {}
        labels = list(by_run)
        rows = []
        for metric in first.score.metrics:
            values = [by_run[x].score.metrics.get(metric) for x in labels]
            rows.append([metric, *values, *_gain(metric, values), *_published(suite, first.task.name, compare, metric)])
        models = NAMED if suite == MATBENCH_DISCOVERY else tuple(published.lambench())
        shown = models if compare else ()
        header = ["metric", *labels, *(["gain"] if len(labels) > 1 else []), *shown]
        counts = ", ".join(f"{x}: {o.score.n - o.score.n_failed} of {o.score.n} structures" for x, o in by_run.items())
        remark = f" {first.score.remark}." if first.score.remark else ""
        parts.append(f"### {first.task.title}\n\n{first.score.unit}. {counts}.{remark}\n\n{table(header, rows)}")
        if any((o.folder / "parity.png").is_file() for o in by_run.values()):
            parts.append("\n".join(f"![{x}]({o.folder.relative_to(folder)}/parity.png)" for x, o in by_run.items()))
    return "\n\n".join(parts)


def _gain(metric: str, values: Sequence[float | None]) -> list[str]:
    """Return by how much the last fidelity is better than the first, in percent of the first."""
    if len(values) < 2:
        return []
    first, last = values[0], values[-1]
    if metric in SIGNED:
        first, last = (None if v is None else abs(v) for v in (first, last))
    if first is None or last is None or not first or math.isnan(first) or math.isnan(last):
        return ["–"]
    better = last - first if metric in HIGHER_IS_BETTER else first - last
    return [f"{100 * better / abs(first):+.0f} %"]


def _published(suite: str, name: str, compare: Mapping[str, str], metric: str) -> list[float | None]:
    if not compare:
        return []
    key = compare.get(metric)
    if suite == LAMBENCH:
        rows = [
            {**m["property"].get(name, {}), **m["force_field"].get(name, {}), "M_IS": m["M_IS"]}
            for m in published.lambench().values()
        ]
        return [r.get(key) if key else None for r in rows]
    by_name = {r["model"]: r for r in published.matbench_discovery()}
    texts = [by_name[m].get(key, "") if key else "" for m in NAMED]
    return [float(t) if t else None for t in texts]


def _aggregates(folder: Path, runs: Runs) -> str:
    """Return the suites' single numbers, for what was run of their own sets, and draw the normalised errors."""
    rows: list[list[Any]] = []
    sets: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {}
    for label, outcomes in runs.items():
        done = [o for o in outcomes if isinstance(o, Finished) and o.is_whole and o.score.compare]
        metrics = {o.task.name: o.score.metrics for o in done if o.task.suite == LAMBENCH}
        properties = {t: m for t, m in metrics.items() if t in scores.PROPERTY}
        forces = {t: m for t, m in metrics.items() if t in scores.FORCE_FIELD and scores.is_scorable(t, m)}
        sets[label] = (forces, properties)
        rows += [[label, name, value] for name, value in _normalised(forces, properties).items()]
        found = scores.aggregate(forces, properties)
        for what, by_domain in (("properties", found.property_domains), ("force fields", found.force_field_domains)):
            rows += [[label, f"**{d}, {what}**", v] for d, v in by_domain.items() if v is not None]
        numbers = {"M_PC": found.property, "M_FF": found.force_field, "CPS": _cps(done)}
        rows += [[label, f"**{name}**", value] for name, value in numbers.items() if value is not None]
    if not rows:
        return ""
    text = (
        "LAMBench: 0 is perfect, 1 a dummy that predicts the mean; whole sets only. A domain needs all of its tasks, "
    )
    text += f"M_PC and M_FF all domains.\n\n{table(('run', 'what', 'value'), rows)}"
    if _draw(folder / "lambench.png", sets):
        text += "\n\n![normalised errors](lambench.png)"
    return f"## Normalised errors and aggregates\n\n{text}"


def _normalised(forces: Mapping[str, Any], properties: Mapping[str, Any]) -> dict[str, float]:
    errors = {t: scores.property_errors(t, m) for t, m in properties.items()}
    errors |= {t: scores.force_field_errors(t, m) for t, m in forces.items()}
    return {f"{t} {m}": v for t, parts in errors.items() for m, v in parts.items()}


def _spokes(
    forces: Mapping[str, Any], properties: Mapping[str, Any], by_domain: bool, omol: bool = False
) -> dict[str, float]:
    """Return the errors of the domains that are complete, or the mean error of each task."""
    if by_domain:
        found = scores.aggregate(forces, properties, omol)
        parts = {"properties": found.property_domains, "force fields": found.force_field_domains}
        return {f"{d}\n{what}": v for what, domains in parts.items() for d, v in domains.items() if v is not None}
    errors: dict[str, list[float]] = {}
    for name, value in _normalised(forces, properties).items():
        errors.setdefault(name.partition(" ")[0], []).append(value)
    return {task: statistics.mean(values) for task, values in errors.items()}


def _draw(path: Path, sets: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]]) -> bool:
    """Draw the domains that all runs have, else their tasks, with the leaderboard's first models.

    Two spokes are no figure.

    Args:
        sets: run → metrics by task of force fields and of properties.
    """
    leaders = list(published.lambench().items())[:SPOKES_OF]
    for by_domain in (True, False):
        own = {label: _spokes(*metrics, by_domain) for label, metrics in sets.items()}
        names = [n for n in next(iter(own.values())) if all(n in s for s in own.values())]
        if len(names) >= 3:
            others = {m: _spokes(r["force_field"], r["property"], by_domain, r["supports_omol"]) for m, r in leaders}
            try:
                plots.radar(path, names, {m: [s.get(n, 1.0) for n in names] for m, s in {**own, **others}.items()})
            except ImportError:
                return False  # matplotlib comes with mffm[train]
            return True
    return False


def _cps(done: Sequence[Finished]) -> float | None:
    by_name = {o.task.name: o.score.metrics for o in done}
    if "wbm" not in by_name or "kappa103" not in by_name:
        return None
    wbm = by_name["wbm"]
    return combined(wbm["F1"], by_name["kappa103"]["κ_SRME"], wbm["rmsd"])


def _failures(runs: Runs) -> str:
    rows: list[list[Any]] = []
    counts: Counter[str] = Counter()
    for label, outcomes in runs.items():
        for outcome in outcomes:
            if not isinstance(outcome, Finished):
                continue
            for record in outcome.records:
                if record.result is None or record.doubt is not None:
                    reason = "absurd" if record.result is not None else str(record.reason)
                    counts[reason] += 1
                    text = record.doubt if record.result is not None else record.message
                    rows.append([label, name_of(outcome.task), record.id, reason, (text or "").replace("|", "/")[:120]])
    if not rows:
        return "## Failures\n\nNone."
    summary = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
    more = f"\n\n{len(rows) - FAILURES_SHOWN} more in the tasks' `score.json`." if len(rows) > FAILURES_SHOWN else ""
    header = ("run", "task", "structure", "what", "why")
    return f"## Failures\n\n{summary}.\n\n{table(header, rows[:FAILURES_SHOWN])}{more}"


def _timings(runs: Runs) -> str:
    rows = []
    machines = set()
    for label, outcomes in runs.items():
        for outcome in outcomes:
            if isinstance(outcome, Finished) and outcome.records:
                seconds = [r.seconds for r in outcome.records]
                machines.add(outcome.machine)
                median = statistics.median(seconds)
                rows.append([label, name_of(outcome.task), len(seconds), sum(seconds), median, max(seconds)])
    if not rows:
        return ""
    header = ("run", "task", "structures", "seconds in all", "median", "longest")
    return f"## Timings\n\nOne thread each, {'; '.join(sorted(machines))}.\n\n{table(header, rows)}"


def _not_run(runs: Runs) -> str:
    rows = {}
    for outcome in _outcomes(runs):
        if isinstance(outcome, NotRun):
            for file, state in outcome.missing:
                rows[file.path] = [name_of(outcome.task), f"`{file.path}`", state, file.published, file.layout]
    if not rows:
        return ""
    header = ("task", "file below the data folder", "state", "published", "layout")
    return f"## Not run: data are missing\n\n{table(header, list(rows.values()))}"
