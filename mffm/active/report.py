"""What a loop came to: errors of the test structures against the number of labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mffm import plots
from mffm.config.active import ActiveConfig
from mffm.keys import REPORT_UNITS
from mffm.release import write_json, write_text


def write(config: ActiveConfig, rounds: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Write report.md, report.json and report.png into the loop's folder; return their paths."""
    paths = [folder / f"report.{end}" for end in ("md", "json", "png")]
    write_json(paths[1], {"name": config.name, "select": config.select.by, "rounds": list(rounds)})
    write_text(paths[0], markdown(config, rounds))
    _draw(rounds, paths[2])
    return paths


def markdown(config: ActiveConfig, rounds: Sequence[dict[str, Any]]) -> str:
    """Return the report for people."""
    properties = [row["property"] for row in rounds[-1]["rows"]]
    head = " | ".join(f"{p} MAE, {REPORT_UNITS[p][0]} | R²" for p in properties)
    lines = [
        f"# Active learning: {config.name}",
        "",
        f"{rounds[-1]['fidelity']} labels of {config.store}, chosen by {config.select.by}, {config.n} a round; every "
        f"round fine-tunes {config.release} on all of them. Errors are those of test structures that were chosen at "
        "random before anything else; compare with `select.by: random` before you credit the choice.",
        "",
        f"| round | labels | {head} | 99th percentile of the energy errors |",
        "|" + "---|" * (3 + 2 * len(properties)),
    ]
    for found in rounds:
        cells = [f"{row['mae']:.4g} | {'' if row['r2'] is None else format(row['r2'], '.3f')}" for row in found["rows"]]
        lines.append(f"| {found['round']} | {found['n_labels']} | {' | '.join(cells)} | {found['energy_p99']:.4g} |")
    n = {row["property"]: row["n_systems"] for row in rounds[-1]["rows"]}
    lines += ["", "Test structures: " + ", ".join(f"{count} with {prop}" for prop, count in n.items()) + "."]
    return "\n".join(lines) + "\n"


def _draw(rounds: Sequence[dict[str, Any]], path: Path) -> None:
    panels: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for found in rounds:
        for row in found["rows"]:
            points = panels.setdefault(f"{row['property']} MAE, {row['unit']}", {}).setdefault("test structures", [])
            points.append((found["n_labels"], *[row["mae"]] * 3))
    plots.label_curves(path, panels, f"{rounds[-1]['fidelity']} labels", len(panels))
