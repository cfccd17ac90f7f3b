"""The report of tools/foundation.py: errors of a mixture and of its specialists, compared, told and drawn."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mffm import plots
from mffm.evaluate.benchmark.report import number
from mffm.keys import PROPERTIES, REPORT_UNITS

MIXTURE = "mixture"
WITHIN = 1.10  # of the specialist's error
SMALL = 300  # training frames: a domain in which the mixture is to be better
DRAWS = 2000  # of the bootstrap over test frames


def compare(n_train: Mapping[str, int], errors: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return one entry per domain and property, of the frames that both predict.

    An entry has both MAEs and their ratio with a 90 % interval (bootstrap over test frames); specialist and ratio are
    None where the specialist predicts none of them.

    Args:
        n_train: domain → training frames.
        errors: mixture or domain → domains → domain → property → rows, sums and counts, as ``parity.FrameErrors``.
    """
    entries = []
    for domain, n in n_train.items():
        for prop in PROPERTIES:
            mixture = errors[MIXTURE]["domains"][domain].get(prop)
            own = errors[domain]["domains"][domain].get(prop)
            if mixture is None:
                continue
            entry: dict[str, Any] = {"domain": domain, "property": prop, "unit": REPORT_UNITS[prop][0], "n_train": n}
            if own is None:
                mae = sum(mixture["sums"]) / sum(mixture["counts"])
                entry |= {"n_test": len(mixture["rows"]), "mixture": mae, "specialist": None, "ratio": None}
                entries.append(entry)
                continue
            _, i, j = np.intersect1d(mixture["rows"], own["rows"], return_indices=True)
            a, b = np.array(mixture["sums"])[i], np.array(own["sums"])[j]
            n_labels = np.array(own["counts"])[j].sum()
            draws = np.random.default_rng(0).integers(len(j), size=(DRAWS, len(j)))
            low, high = np.percentile(a[draws].sum(1) / b[draws].sum(1), [5, 95])
            entry |= {"n_test": len(j), "mixture": float(a.sum() / n_labels), "specialist": float(b.sum() / n_labels)}
            entry |= {"ratio": float(a.sum() / b.sum()), "interval": [float(low), float(high)]}
            entries.append(entry)
    return entries


def claims(entries: Iterable[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Return what the mixture is to be, and whether the ratios of the errors show it."""
    known = [e for e in entries if e["ratio"] is not None]
    worse = [f"{e['domain']} {e['property']} {e['ratio']:.2f}" for e in known if not e["ratio"] <= WITHIN]
    small = [e for e in known if e["n_train"] < SMALL]
    not_better = [f"{e['domain']} {e['property']} {e['ratio']:.2f}" for e in small if not e["ratio"] < 1]
    told = [
        (f"no domain is worse than its specialist by more than {100 * (WITHIN - 1):.0f} %", worse, known),
        (f"better in the domains of fewer than {SMALL} training frames", not_better, small),
    ]
    return [
        (
            f"{text}: so for {len(of) - len(bad)} of {len(of)} errors" + (f"; not {', '.join(bad)}" if bad else ""),
            not bad,
        )
        for text, bad, of in told
    ]


def text_of(content: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    steps, doctor, trained = content["steps"], content["doctor"], content["trainings"]
    lines = [
        "# A foundation model beside its specialists",
        "",
        f"{content['date']}, {content['machine']}; mffm {content['version']}. {content['cpu_minutes'] / 60:.2f} core-"
        f"hours of training, resumed {content['resumed']} time(s). {content['n_elements']} elements; the doctor found "
        f"{doctor['error']} errors, {doctor['warning']} warnings, {doctor['note']} notes in the store "
        f"`{content['store'][:12]}`.",
        "",
        f"Mixture: {steps[f'{MIXTURE}-direct']} steps of direct forces, {steps[MIXTURE]} conservative ones, "
        f"{content['n_parameters']:,} parameters. A specialist has the same recipes on its domain alone, for the CPU "
        "time that the mixture spends on it. Mean absolute errors on test frames; ratio: mixture ÷ specialist, with a "
        "90 % interval (bootstrap over test frames; the spread of seeds is not in it).",
        "",
        "![ratios](ratios.png)",
        "",
        "| domain | training frames | property | test frames | mixture | specialist | unit | ratio | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for e in content["errors"]:
        cells = [e["domain"], e["n_train"], e["property"], e["n_test"], f"{e['mixture']:.3g}"]
        if e["ratio"] is None:
            cells += ["no prediction", e["unit"], "", ""]
        else:
            low, high = e["interval"]
            verdict = "better" if high < 1 else "**worse**" if e["ratio"] > WITHIN else "within 10 %"
            cells += [f"{e['specialist']:.3g}", e["unit"], f"{e['ratio']:.2f} ({low:.2f} to {high:.2f})", verdict]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| claim | |", "|---|---|"]
    lines += [f"| {claim} | {'shown' if holds else '**not shown**'} |" for claim, holds in content["claims"]]
    if content["without_test"]:
        lines += ["", f"Energies without a test, as no training frame has the element: {content['without_test']}."]
    lines += [
        "",
        "| run | steps | share of the mixture's work | CPU minutes | CPU ms a step |",
        "|---|---|---|---|---|",
    ]
    for name, row in trained.items():
        share = "" if row["share"] is None else f"{row['share']:.1%}"
        ms = "" if row["ms_a_step"] is None else f"{row['ms_a_step']:.0f}"
        lines.append(f"| {name} | {row['steps']} | {share} | {row['cpu_minutes']:.2f} | {ms} |")
    lines += ["", "| benchmark subset | fidelity | metrics | unit | structures | failed |", "|---|---|---|---|---|---|"]
    for row in content["benchmarks"]:
        cells = [row["task"], row["fidelity"]]
        if "metrics" in row:
            shown = ", ".join(f"{k} {number(v)}" for k, v in list(row["metrics"].items())[:4])
            cells += [shown, row["unit"], f"{row['n']} of {row['n_of_set']}", row["n_failed"]]
        else:
            cells += ["not run: data are missing", "", "", ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def draw(entries: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw the ratios, a panel a property."""
    known = [e for e in entries if e["ratio"] is not None]
    names = list(dict.fromkeys(e["domain"] for e in known))
    panels = {
        f"{prop}, mixture ÷ specialist": {
            e["domain"]: (e["interval"][0], e["ratio"], e["interval"][1]) for e in known if e["property"] == prop
        }
        for prop in PROPERTIES
    }
    plots.ratios(path, names, {title: values for title, values in panels.items() if values}, WITHIN)
