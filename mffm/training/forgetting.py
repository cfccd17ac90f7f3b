"""Errors of all fidelities before and after a fine-tuning: what was learned, and what was forgotten, as numbers.

RUN/finetune.json and finetune.md. Before is the release (of a new fidelity: its parent with refitted references),
which RUN/weights/start.safetensors keeps; after are the run's best weights. On the validation split, and on ``test``
where the store has one. A fidelity without labels there is compared with what the release predicts.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mffm import distributed
from mffm.batch import reference_energy
from mffm.data.loader import evaluation_batches
from mffm.data.pools import choose
from mffm.fidelity import FidelityTable
from mffm.keys import ENERGY, FORCES, REPORT_UNITS, STRESS
from mffm.loss import ErrorSums
from mffm.models.potential import Potential
from mffm.release import read_json, read_weights, write_json, write_text, write_weights
from mffm.training import modes, predicted

if TYPE_CHECKING:
    from mffm.training.setup import Setup

NAME = "finetune"
TEST = "test"
EVALUATION_EDGES = 20_000


def begin(run: Path, setup: "Setup", potential: Potential, ranks: distributed.Ranks) -> list[str]:
    """Measure the start and write it down; return what the log says. Every rank calls this, rank 0 writes."""
    before = {split: measure(setup, potential, split, ranks) for split in _splits(setup)}
    content = {**facts(setup), "before": before}
    if ranks.is_main:
        write_weights(_start(run), potential.state_dict())
        write_json(run / f"{NAME}.json", content)
    lines = [
        f"{name!r} starts from {entry['parent']!r}" + (f", the nearest: {_tried(entry)}" if entry["tried"] else "")
        for name, entry in content["new"].items()
    ]
    if content["split_heads"]:
        lines.append("the release has one head for all fidelities: each has a copy of its own now")
    lines += [
        f"pool {pool['name']}: {pool['frames']} structures, {_share(pool)} of the draws"
        + (", labels predicted by the release" if pool["predicted"] else "")
        for pool in content["pools"]
    ]
    if content["not_replayed"]:
        lines.append(f"not replayed, as the store has nothing for them: {', '.join(content['not_replayed'])}")
    return [*lines, "step 0: the release's fidelities predict what it does"]


def _start(run: Path) -> Path:
    return run / "weights" / "start.safetensors"


def _share(pool: dict[str, Any]) -> str:
    """Return a pool's part of the draws at first; those of a paired plan are of several pools together."""
    return "a part" if pool["share"] is None else f"{100 * pool['share']:.0f} %"


def _tried(entry: dict[str, Any]) -> str:
    return "; ".join(
        f"{old} " + ", ".join(f"{p} {e * REPORT_UNITS[p][1]:.4g} {REPORT_UNITS[p][0]}" for p, e in found.items())
        for old, found in entry["tried"].items()
    )


def finish(run: Path, setup: "Setup", potential: Potential, ranks: distributed.Ranks) -> list[str]:
    """Measure the run's best weights and write the report; return the lines of the log."""
    best = run / "weights" / "best.safetensors"
    path = best if best.is_file() else run / "weights" / "last.safetensors"
    potential.load_state_dict(read_weights(path))
    content = read_json(run / f"{NAME}.json")
    after = {split: measure(setup, potential, split, ranks) for split in content["before"]}
    rows = [
        {
            "split": split, "fidelity": row["fidelity"], "is_new": row["fidelity"] in content["new"],
            "property": row["property"], "unit": row["unit"], "n_systems": row["n_systems"],
            "before": was["mae"], "after": row["mae"],
            "ratio": row["mae"] / was["mae"] if was["mae"] > 0 else None,
        }
        for split, found in after.items()
        for was, row in zip(content["before"][split], found, strict=True)
    ]  # fmt: skip
    split = setup.recipe.data.validation_split
    measured = {row["fidelity"] for row in rows if row["split"] == split}
    old = [n for n in setup.fidelities.names if n not in measured and n not in content["new"]]
    drift = _drift(run, setup, potential, split, old, ranks)
    content |= {"weights": path.stem, "after": after, "rows": rows, "drift": drift}
    if ranks.is_main:
        write_json(run / f"{NAME}.json", content)
        write_text(run / f"{NAME}.md", markdown(content))
    return [
        f"{r['split']} {r['fidelity']} {r['property']}: "
        f"MAE {r['before']:.4g} before, {r['after']:.4g} {r['unit']} after"
        for r in rows
    ] + [
        f"{split} {r['fidelity']} {r['property']}: no labels; {r['mad']:.4g} {r['unit']} from the release's predictions"
        for r in drift
    ]


def _drift(
    run: Path, setup: "Setup", potential: Potential, split: str, names: Sequence[str], ranks: distributed.Ranks
) -> list[dict[str, Any]]:
    """Return how far predictions went from the release's at fidelities without labels; structures are the split's.

    Collective. Structures with an element that the fidelity does not know are left out.
    """
    if not names:
        return []
    store, cutoff, device = setup.store, setup.recipe.model.backbone.cutoff, next(potential.parameters()).device
    before = setup.spec.build().to(device).eval().requires_grad_(False)
    before.load_state_dict(read_weights(_start(run)))
    every = store.rows(split=split)
    found = []
    for name in names:
        rows = every[setup.spec.references.covers(name, store.composition(every))]
        rows = choose(store, rows, 0, setup.recipe.data.validation_max_frames)
        own, sums = setup.fidelities.index(name), torch.zeros(4, dtype=torch.float64, device=device)
        carrier = FidelityTable([store.fidelities[store.fidelities.names[0]]])  # whose labels nothing reads
        batches = evaluation_batches(store, rows, carrier.names[0], carrier, cutoff, EVALUATION_EDGES)
        for index, batch in enumerate(batches):
            if index % ranks.world_size == ranks.rank:
                batch = batch.to(device)
                batch = batch.with_fidelity(torch.full_like(batch.fidelity_idx, own))
                a, b = before(batch), potential(batch)
                assert a.forces is not None
                assert b.forces is not None
                energies = ((a.energy - b.energy) / batch.n_atoms).abs()
                forces = (a.forces - b.forces).abs().double()
                sums += torch.stack(
                    [energies.sum(), sums.new_tensor(len(energies)), forces.sum(), sums.new_tensor(forces.numel())]
                )
        energy, n, force, n_components = distributed.sum_over_ranks(sums).tolist()
        for prop, total, count in ((ENERGY, energy, n), (FORCES, force, n_components)):
            if count:
                unit, factor = REPORT_UNITS[prop]
                row = {"fidelity": name, "property": prop, "mad": total / count * factor, "unit": unit}
                found.append({**row, "n_systems": int(n)})
    return found


def facts(setup: "Setup") -> dict[str, Any]:
    """Return what the recipe's options came to."""
    recipe, start = setup.recipe, setup.start
    assert recipe.fine_tune is not None
    assert start is not None
    named = setup.potential.named_parameters()
    plain = sum(p.numel() for name, p in named if not name.startswith("adapter."))
    return {
        "release": str(recipe.start_from),
        "mode": recipe.fine_tune.mode,
        "rank": recipe.fine_tune.rank if recipe.fine_tune.mode == "lora" else None,
        "n_parameters": plain,
        "n_trained": sum(p.numel() for p in setup.potential.parameters() if p.requires_grad),
        "n_trained_beside": modes.trained_beside(setup.potential),
        "split_heads": start.split_heads,
        "elements": recipe.fine_tune.elements,
        "replay": recipe.fine_tune.replay,
        "not_replayed": not_replayed(setup) if recipe.fine_tune.replay != "none" else [],
        "new": {
            name: {"parent": parent, "tried": start.candidates.get(name, {})}
            for name, parent in recipe.model.init_from.items()
        },
        "pools": [
            {
                "name": pool.name, "fidelity": pool.fidelity, "frames": len(pool), "labels": pool.label_counts,
                "share": setup.plan.shares().get(pool.name),
                "predicted": predicted.SOURCE in pool.name,
            }
            for pool in setup.plan.pools
        ],
    }  # fmt: skip


def not_replayed(setup: "Setup") -> list[str]:
    """Return the fidelities of the release that no pool trains."""
    assert setup.recipe.fine_tune is not None
    return [n for n in setup.recipe.fine_tune.fidelities if n not in setup.recipe.trained]


def _splits(setup: "Setup") -> list[str]:
    splits = [setup.recipe.data.validation_split]
    return [*splits, TEST] if TEST in setup.store.split_names and TEST not in splits else splits


def measure(setup: "Setup", potential: Potential, split: str, ranks: distributed.Ranks) -> list[dict[str, Any]]:
    """Return a row for each fidelity and property with labels in a split, errors in the report's units.

    Energies of systems with an element that the fidelity has no reference of are left out. Collective.
    """
    store, recipe, device = setup.store, setup.recipe, next(potential.parameters()).device
    table, names = setup.spec.reference_table(device), setup.fidelities.names
    sums = ErrorSums(names, device=device)
    counts = torch.zeros(len(names), 3, dtype=torch.float64, device=device)
    index = 0
    potential.eval()
    for f, name in enumerate(names):
        if name not in store.fidelities:
            continue
        rows = choose(store, store.rows(split=split, fidelity=name), 0, recipe.data.validation_max_frames)
        cutoff = recipe.model.backbone.cutoff
        for batch in evaluation_batches(store, np.asarray(rows), name, setup.fidelities, cutoff, EVALUATION_EDGES):
            index += 1
            if index % ranks.world_size != ranks.rank:
                continue
            batch = batch.to(device)
            reference = reference_energy(batch, table)
            batch.masks[ENERGY] &= ~reference.isnan()
            stress = potential.has_stress and bool(batch.masks[STRESS].any())
            sums.add(potential(batch, forces=True, stress=stress), batch, torch.nan_to_num(reference))
            masks = (batch.masks[ENERGY], batch.masks[FORCES], batch.masks[STRESS])
            counts[f] += torch.stack([m.sum() for m in masks]).to(counts)
    sums.sums, counts = distributed.sum_over_ranks(sums.sums), distributed.sum_over_ranks(counts)
    return [
        {
            "fidelity": name, "property": prop, "unit": REPORT_UNITS[prop][0],
            "mae": entry["mae"] * REPORT_UNITS[prop][1], "rmse": entry["rmse"] * REPORT_UNITS[prop][1],
            "n_systems": int(counts[names.index(name), (ENERGY, FORCES, STRESS).index(prop)]),
        }
        for name, properties in sums.errors().items()
        for prop, entry in properties.items()
    ]  # fmt: skip


def markdown(content: dict[str, Any]) -> str:
    """Return the report for people."""
    trained = f"{content['n_trained']:,} numbers trained of a potential of {content['n_parameters']:,}"
    rank = f", rank {content['rank']}" if content["rank"] else ""
    but = f", without {', '.join(content['not_replayed'])}" if content["not_replayed"] else ""
    lines = [
        f"# Fine-tuning of {Path(content['release']).name}",
        "",
        f"Mode {content['mode']}{rank}: {trained}. Replay: {content['replay']}{but}. Weights: {content['weights']}.",
        "",
        "| pool | structures | labels | share of the draws | |",
        "|---|---|---|---|---|",
    ]
    for pool in content["pools"]:
        labels = ", ".join(f"{n:,} {prop}" for prop, n in pool["labels"].items())
        origin = "predicted by the release" if pool["predicted"] else ""
        lines.append(f"| {pool['name']} | {pool['frames']:,} | {labels} | {_share(pool)} | {origin} |")
    for name, entry in content["new"].items():
        how = "the nearest fidelity" if entry["tried"] else "as the recipe says"
        lines += ["", f"{name} starts from {entry['parent']}, {how}, with element references of its own."]
    lines += [
        "",
        "Mean absolute errors. Before: the release; of a new fidelity its parent with refitted element references.",
        "",
        "| split | fidelity | | property | before | after | unit | after / before | structures |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in content["rows"]:
        ratio = "" if r["ratio"] is None else f"{r['ratio']:.2f}"
        kind = "new" if r["is_new"] else "old"
        numbers = f"{r['before']:.4g} | {r['after']:.4g} | {r['unit']} | {ratio} | {r['n_systems']}"
        lines.append(f"| {r['split']} | {r['fidelity']} | {kind} | {r['property']} | {numbers} |")
    if content["drift"]:
        lines += [
            "",
            "Fidelities without labels there: mean absolute differences from what the release predicts for the same "
            "structures. Which of the two is nearer to the level of theory they do not tell.",
            "",
            "| fidelity | property | difference | unit | structures |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {r['fidelity']} | {r['property']} | {r['mad']:.4g} | {r['unit']} | {r['n_systems']} |"
            for r in content["drift"]
        ]
    return "\n".join(lines) + "\n"
