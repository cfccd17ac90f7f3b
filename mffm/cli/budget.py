"""How many labels of each level to buy: plan."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mffm.cli.output import console, say
from mffm.errors import InputError

if TYPE_CHECKING:
    from mffm.budget.costs import CostModel
    from mffm.budget.curves import Curve
    from mffm.budget.plan import Level, Plan

_SECONDS = {"s": 1.0, "min": 60.0, "h": 3_600.0, "d": 86_400.0}


def plan(
    budget: Annotated[str, typer.Option(help="CPU time to spend: 90min, 24h, 3.5d")],
    levels: Annotated[str, typer.Option(help="levels to buy labels of, one to three: gfn2,pbe,ccsdt")],
    costs: Annotated[
        list[Path],
        typer.Option(help="file of labels with CPU seconds (cpu_s_<level>); may be given several times"),
    ],
    curve: Annotated[
        list[str],
        typer.Option(help="LEVEL=REPORT.json, or with #METHOD: a study over numbers of this level's labels; for each"),
    ],
    panel: Annotated[str | None, typer.Option(help="error to plan for: iid/energy, ood/forces, ...")] = None,
    pool: Annotated[
        list[Path] | None,
        typer.Option(help="store or file of the structures to label; where not given, they are like those of --costs"),
    ] = None,
    outcome: Annotated[
        list[str] | None,
        typer.Option(help="LEVEL=LABELS:ERROR, what came out with so many labels in all; may be given several times"),
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON to write")] = Path("plan.json"),
) -> None:
    """Propose how many labels of each level to buy for a budget, with the error to expect; then told the outcome."""
    from mffm.budget import costs as costs_module
    from mffm.budget import curves
    from mffm.budget.plan import FIRST, duration, levels_of, propose
    from mffm.release import code_version, write_json

    names = [name.strip() for name in levels.split(",") if name.strip()]
    seconds = _time(budget)
    paths = dict(_pair(text, "--curve", "LEVEL=REPORT.json") for text in curve)
    read = {}
    for name, path in paths.items():
        file, _, method = path.partition("#")
        read[name] = curves.read(Path(file), panel, method or None)
        if read[name].level != name:
            raise InputError(f"--curve {name}={path}: a study of labels of {read[name].level!r}; name that level")
    checks = []
    outcomes: dict[str, list[tuple[float, float]]] = {}
    for text in outcome or []:
        name, n_labels, error = _outcome(text)
        if name not in read:
            raise InputError(f"--outcome {text}: no --curve of level {name!r}")
        before = outcomes.setdefault(name, [])
        curve_so_far = read[name]
        for n_before, error_before in before:
            curve_so_far = curve_so_far.with_outcome(n_before, error_before)
        checks.append(_judged(curve_so_far, n_labels, error))
        before.append((n_labels, error))
    measured = costs_module.read(costs, names)
    to_label = costs_module.sizes_of(pool) if pool else None
    models = {name: costs_module.fit(name, measured[name], to_label) for name in names}
    chosen = levels_of(names, models, read, outcomes)
    proposal = propose(chosen, seconds)
    _show(chosen, proposal)
    for line in checks:
        say(line)
    first = ", ".join(f"{math.ceil(FIRST * share.buy)} {share.level}" for share in proposal.shares if share.buy)
    say(
        f"Buy a third first ({first}), train, and give the outcome: --outcome LEVEL=LABELS:ERROR, with the budget left."
    )
    write_json(out, _report(chosen, proposal, seconds, models, checks) | {"versions": code_version()})
    say(f"{out}: {duration(seconds)}, of which {duration(proposal.unspent)} are left")


def _time(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(s|min|h|d)", text.strip())
    if not found:
        raise InputError(f"--budget {text!r}: expected a CPU time with its unit (s, min, h, d), such as 24h")
    return float(found[1]) * _SECONDS[found[2]]


def _pair(text: str, option: str, form: str) -> tuple[str, str]:
    name, sign, value = text.partition("=")
    if not (sign and name and value):
        raise InputError(f"{option} {text}: expected {form}")
    return name, value


def _outcome(text: str) -> tuple[str, float, float]:
    name, value = _pair(text, "--outcome", "LEVEL=LABELS:ERROR, such as pbe=300:24.5")
    labels, _, error = value.partition(":")
    try:
        return name, float(labels), float(error)
    except ValueError as reason:
        raise InputError(f"--outcome {text}: expected LEVEL=LABELS:ERROR, such as pbe=300:24.5") from reason


def _judged(curve: "Curve", n_labels: float, error: float) -> str:
    """Return how an outcome compares with what the curve said before it."""
    from mffm.budget.curves import posterior

    middle, low, high = posterior(curve).interval(n_labels)
    where = "inside" if low <= error <= high else "below" if error < low else "above"
    return (
        f"{curve.level}: with {n_labels:g} labels {middle:.3g} {curve.unit} was expected ({low:.3g} to {high:.3g}); "
        f"{error:.3g} is {where}"
    )


def _show(levels: "Sequence[Level]", proposal: "Plan") -> None:
    from mffm.budget.plan import duration

    unit, panel = levels[0].curve.unit, levels[0].curve.panel
    table = Table("level", "a label", "grows as", "have", "buy", "within 5 %", "CPU", "× of curve")
    for level, share in zip(levels, proposal.shares, strict=True):
        cost = level.cost
        grows = "" if cost.exponent is None else f"{cost.measure}^{cost.exponent:.2g}"
        table.add_row(
            level.name, duration(cost.mean), grows, f"{level.have:g}", str(share.buy),
            f"{share.least} to {share.most}", duration(share.seconds), f"{share.factor:.3g}",
        )  # fmt: skip
    console.print(table)
    middle, low, high = proposal.error
    for level in levels:
        say(f"{level.name}: curve of {level.curve.method}; costs scatter by {100 * level.cost.scatter:.0f} %")
    say(f"{panel}: {middle:.3g} {unit}, 90 % between {low:.3g} and {high:.3g}; now {proposal.now[0]:.3g}")
    for warning in proposal.warnings:
        say(f"warning: {warning}")


def _report(
    levels: "Sequence[Level]", proposal: "Plan", seconds: float, models: "dict[str, CostModel]", checks: Sequence[str]
) -> dict[str, Any]:
    curves = {
        level.name: {
            "panel": level.curve.panel,
            "method": level.curve.method,
            "unit": level.curve.unit,
            "points": [vars(point) for point in level.curve.points],
        }
        for level in levels
    }
    costs = {name: model.to_dict() for name, model in models.items()}
    return {
        "budget_seconds": seconds, "costs": costs, "curves": curves, "outcomes": list(checks), **proposal.to_dict()
    }  # fmt: skip
