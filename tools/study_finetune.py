"""Fine-tuning with a few labels of a new level of theory: against scratch, and what is forgotten. Resumable.

    mffm ingest configs/data/molecules_wide.yaml
    python tools/study_finetune.py --workers 2                              # report: studies/finetune/report.md
    python tools/study_finetune.py --release my-release --trained-on stores/its-store --folder studies/of-mine

For each seed a release is made from labels of the old level (or the given one is taken), and fine-tuned with
`--labels` frames of the new one in every mode, with and without replay. Compared with training from scratch on the same
frames and the release with refitted element references. All choose their weights by the same `--labels` validation
frames; errors are those of the whole test split, none of which a given release may have been trained on: it is refused
with the pairs. The same command goes on after a stop; what is finished is not done
again.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import trainings
import typer
import yaml

from mffm import plots
from mffm.config.base import apply_overrides, as_overrides, read_yaml
from mffm.data.checks import same_structures
from mffm.data.pools import build_pools
from mffm.data.store import Store
from mffm.errors import InputError
from mffm.evaluate import parity
from mffm.executor import Job, locked
from mffm.fidelity import FidelityTable
from mffm.release import load, read_json, refit_references, save, write_json, write_text
from mffm.training.finetune import recipe_of

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "finetune.yaml"
PRETRAIN = ROOT / "configs" / "quickstart_pretrain.yaml"
WITHIN = 1.10  # of the old fidelity's error before, with replay


@dataclass(frozen=True)
class Method:
    """One way to use the labels: overrides of the fine-tuning recipe, or of a training from scratch."""

    title: str
    changes: dict[str, Any] = field(default_factory=dict)
    is_scratch: bool = False


REPLAYED = {"train.best": "val/loss"}  # of all fidelities: what a replay is for
METHODS = {
    "scratch": Method("from scratch", {"optim.lr": 0.003}, is_scratch=True),
    "full": Method("full"),
    "lora": Method("lora", {"fine_tune.mode": "lora"}),
    "frozen": Method("frozen backbone", {"fine_tune.mode": "frozen"}),
    "heads": Method("heads", {"fine_tune.mode": "heads"}),
    "replay_data": Method("full, replay of data", REPLAYED | {"fine_tune.replay": "data"}),
    "replay_predictions": Method("full, replay of predictions", REPLAYED | {"fine_tune.replay": "predictions"}),
    "lora_replay": Method("lora, replay of data", REPLAYED | {"fine_tune.mode": "lora", "fine_tune.replay": "data"}),
}


@dataclass(frozen=True)
class Study:
    """What all runs of the comparison have in common."""

    folder: Path
    store: Store
    old: str
    new: str
    labels: int
    base_steps: int
    steps: int
    lr: float
    heads_first: float
    seeds: Sequence[int]
    release: Path | None
    backbone: dict[str, Any]

    def base(self, seed: int) -> Path:
        return self.release or self.folder / "releases" / f"s{seed}"

    def run(self, name: str, seed: int) -> Path:
        return self.folder / "runs" / f"{name}-s{seed}"

    def pool(self, seed: int) -> dict[str, Any]:
        own = self.properties(self.new)
        return {"fidelity": self.new, "properties": own, "max_frames": self.labels, "seed": seed}

    def properties(self, fidelity: str) -> list[str]:
        return [p for p in ("energy", "forces") if self.store.label_counts("train").get(fidelity, {}).get(p)]

    def common(self, name: str, seed: int) -> dict[str, Any]:
        return {
            "run": str(self.run(name, seed)), "seed": seed, "data.store": str(self.store.path),
            "data.validation_max_frames": self.labels, "train.threads": 1, "log.wandb": "disabled",
        }  # fmt: skip

    def base_job(self, seed: int) -> Job:
        pools = [{"fidelity": self.old, "properties": ["energy", "forces"]}]
        changes = self.common("base", seed) | {
            "data.plan.pools": pools, "train.steps": self.base_steps, "train.best": f"val/{self.old}/loss",
            "model.backbone": self.backbone,
        }  # fmt: skip
        return trainings.job(self.folder, f"base-s{seed}", ["train", str(PRETRAIN), *as_overrides(changes)])

    def job(self, name: str, seed: int) -> Job:
        method = METHODS[name]
        changes = self.common(name, seed) | {
            "data.plan.pools": [self.pool(seed)], "train.best": f"val/{self.new}/loss", "train.steps": self.steps,
            "optim.lr": self.lr,
        }  # fmt: skip
        if not method.is_scratch:
            changes["fine_tune.heads_first"] = self.heads_first
        changes |= method.changes
        if method.is_scratch:  # as many steps as the release and its fine-tuning had
            changes |= {"train.steps": self.base_steps + self.steps, "model": self._model(seed)}
            path = self.folder / "recipes" / f"{name}-s{seed}.yaml"
            content = {k: v for k, v in read_yaml(RECIPE).items() if k != "fine_tune"}
            write_json(path, apply_overrides(content, as_overrides(changes)))  # JSON is YAML
            return trainings.job(self.folder, f"{name}-s{seed}", ["train", str(path)])
        arguments = ["finetune", str(self.base(seed)), str(RECIPE), *as_overrides(changes)]
        return trainings.job(self.folder, f"{name}-s{seed}", arguments)

    def _model(self, seed: int) -> dict[str, Any]:
        model = load(self.base(seed)).spec.model
        return {"backbone": model.backbone.model_dump(mode="json", exclude_none=True)}

    def is_finished(self, name: str, seed: int) -> bool:
        return trainings.is_finished(self.folder, f"{name}-s{seed}")


def errors_of(study: Study, name: str, seed: int) -> dict[str, dict[str, float]]:
    """Return fidelity → property → MAE on the test split; energies meV/atom, forces meV/Å."""
    if name == "refitted":
        loaded = load(study.base(seed))
        recipe = recipe_of(study.base(seed), RECIPE, as_overrides({"data.plan.pools": [study.pool(seed)]}))
        table = FidelityTable([study.store.fidelities[study.new]])
        (pool,) = build_pools(study.store, recipe.data.plan, table, recipe.model.backbone.cutoff)
        tried = {}
        compositions = study.store.composition(pool.rows)
        for asked in loaded.fidelities.names:
            if not loaded.spec.references.covers(asked, compositions).all():
                continue
            refitted = refit_references(loaded, study.store, pool.rows, study.new, asked)
            found = parity.evaluate(loaded, study.store, "test", [study.new], asked, refitted)
            tried[asked] = {row["property"]: row["mae"] for row in found.rows()}
        last = study.properties(study.new)[-1]
        best = min(tried, key=lambda asked: tried[asked][last])  # the most favourable for what is compared with
        old = parity.evaluate(loaded, study.store, "test", [study.old])
        return {study.new: tried[best], study.old: {row["property"]: row["mae"] for row in old.rows()}}
    loaded = load(study.run(name, seed))
    own = [n for n in (study.old, study.new) if n in loaded.fidelities]
    rows = parity.evaluate(loaded, study.store, "test", own).rows()
    return {n: {row["property"]: row["mae"] for row in rows if row["fidelity"] == n} for n in own}


def train(study: Study, workers: int) -> None:
    """Train what is not finished.

    Raises:
        InputError: a training failed.
    """
    if study.release is None:
        trainings.run_all([study.base_job(s) for s in study.seeds if not study.is_finished("base", s)], workers)
    for seed in study.seeds:
        if not study.base(seed).exists():
            save(study.run("base", seed), study.base(seed))
    trainings.run_all([study.job(n, s) for s in study.seeds for n in METHODS if not study.is_finished(n, s)], workers)


def judge(study: Study) -> dict[str, list[dict[str, dict[str, float]]]]:
    """Return method → errors of each seed; those that were judged before are read."""
    path = study.folder / "errors.json"
    content = read_json(path) if path.is_file() else {}
    for name in ["refitted", *METHODS]:
        for seed in study.seeds:
            key = f"{name}-s{seed}"
            if key not in content:
                content[key] = errors_of(study, name, seed)
                write_json(path, content)
    return {name: [content[f"{name}-s{seed}"] for seed in study.seeds] for name in ["refitted", *METHODS]}


def report(study: Study, errors: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    """Return the report as Markdown, and write the figure."""
    titles = {"refitted": "release, references refitted"} | {n: m.title for n, m in METHODS.items()}
    base = "the release given" if study.release else f"{study.base_steps} steps on {study.old}"
    lines = [
        f"# Fine-tuning to {study.new} with {study.labels} labels",
        "",
        f"Store {study.store.path.name} (`{study.store.fingerprint[:12]}`); release: {base}; fine-tuning: "
        f"{study.steps} steps, learning rate {study.lr:g}, heads first for {study.heads_first:g} of the steps; "
        f"from scratch: as many steps as both. {len(study.seeds)} seeds, of weights and of the {study.labels} frames. "
        f"Weights chosen by the loss of {study.labels} validation frames, on {study.new} labels, with replay on "
        "those of all fidelities. Mean absolute errors on the test split, mean ± standard deviation over seeds.",
        "",
        f"| method | {study.new} energy, meV/atom | {study.new} forces, meV/Å | {study.old} energy | "
        f"{study.old} forces | {study.old} after / before, energy, forces |",
        "|---|---|---|---|---|---|",
    ]
    for name, seeds in errors.items():
        cells = [titles[name]]
        for fidelity in (study.new, study.old):
            for prop in ("energy", "forces"):
                values = [s[fidelity][prop] for s in seeds if prop in s.get(fidelity, {})]
                cells.append(f"{np.mean(values):.1f} ± {np.std(values):.1f}" if values else "")
        ratios = [forgotten(errors, name, prop) for prop in ("energy", "forces")]
        cells.append(", ".join(f"{r:.2f}" for r in ratios if r is not None))
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| claim | |", "|---|---|"]
    lines += [f"| {claim} | {'shown' if holds else '**not shown**'} |" for claim, holds in claims(study, errors)]
    return "\n".join(lines) + "\n"


def forgotten(errors: dict[str, list[dict[str, dict[str, float]]]], name: str, prop: str) -> float | None:
    """Return the old fidelity's mean error after ÷ before; None where the method has no old fidelity."""
    pairs = [
        (after[old][prop], before[old][prop])
        for after, before in zip(errors[name], errors["refitted"], strict=True)
        for old in list(before)[1:]
        if prop in after.get(old, {})
    ]
    return float(np.mean([a for a, _ in pairs]) / np.mean([b for _, b in pairs])) if pairs else None


def claims(study: Study, errors: dict[str, list[dict[str, dict[str, float]]]]) -> list[tuple[str, bool]]:
    """Return what the comparison is for, and whether the means over seeds show it."""
    found = []
    for name in ("full", "replay_data"):
        for other in ("scratch", "refitted"):
            for prop in study.properties(study.new):
                mine, theirs = (np.mean([s[study.new][prop] for s in errors[n]]) for n in (name, other))
                text = f"{METHODS[name].title} beats {other}: {study.new} {prop}, {mine:.1f} against {theirs:.1f}"
                found.append((text, bool(mine < theirs)))
    for name in ("replay_data", "replay_predictions", "lora_replay"):
        for prop in ("energy", "forces"):
            ratio = forgotten(errors, name, prop)
            if ratio is None:
                continue
            text = f"{METHODS[name].title}: {study.old} {prop} within 10 %, {ratio:.2f} of before"
            found.append((text, ratio <= WITHIN))
    return found


def require_untouched(store: Store, release: Path, trained_on: Path | None) -> None:
    """Refuse a test split with structures that trained a release or chose its weights: "before" would be too good.

    Args:
        trained_on: the release's store; None: the study's own, which its provenance must say.
    """
    stated = load(release).spec.provenance.get("store_fingerprint")
    if trained_on is None and stated == store.fingerprint:
        return  # its splits are the study's
    if trained_on is None:
        raise InputError(
            f"{release}: trained on another store (fingerprint {stated}) than {store.path} ({store.fingerprint}), and "
            "test frames may be among what it was trained on; name its store by --trained-on"
        )
    own = Store(trained_on)
    if own.fingerprint != stated:
        raise InputError(f"{trained_on}: fingerprint {own.fingerprint}; {release} was trained on {stated}")
    test = store.rows(split="test")
    read = np.concatenate([own.rows(split="train"), own.rows(split="val")])
    pairs = same_structures(map(store.geometry, map(int, test)), map(own.geometry, map(int, read)))
    if pairs:
        told = ", ".join(f"{store.frame_id(int(test[a]))} is {own.frame_id(int(read[b]))}" for a, b in pairs[:5])
        raise InputError(
            f"{store.path}: {len(pairs)} of {len(test)} test frames trained {release} or chose its weights (within "
            f"1e-3 Å): {told}{', ...' if len(pairs) > 5 else ''}; ingest this store with the splits of {trained_on}"
        )


def main(
    folder: Annotated[Path, typer.Option(help="of runs and report")] = Path("studies/finetune"),
    store: Annotated[Path, typer.Option(help="with labels of both levels")] = Path("stores/molecules_wide"),
    old: Annotated[str, typer.Option(help="fidelity of the release")] = "gfn2",
    new: Annotated[str, typer.Option(help="new fidelity")] = "pbe",
    release: Annotated[Path | None, typer.Option(help="instead of one made for each seed")] = None,
    trained_on: Annotated[Path | None, typer.Option(help="store of the release, if it is another one")] = None,
    labels: Annotated[int, typer.Option(help="frames of the new fidelity")] = 20,
    base_steps: Annotated[int, typer.Option(help="of the release's training")] = 1500,
    steps: Annotated[int, typer.Option(help="of a fine-tuning")] = 300,
    lr: Annotated[float, typer.Option(help="of a fine-tuning")] = 0.001,
    heads_first: Annotated[float, typer.Option(help="share of a fine-tuning's steps")] = 0.0,
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    backbone: Annotated[str, typer.Option(help="YAML, of the release")] = "{size: S}",
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    docs: Annotated[
        Path | None, typer.Option(help="folder for a copy of report.md, report.json and errors.png")
    ] = None,
) -> None:
    """Compare fine-tunings of a release to a new level of theory."""
    own = [int(s) for s in seeds.split(",")]
    study = Study(
        folder, Store(store), old, new, labels, base_steps, steps, lr, heads_first, own, release,
        yaml.safe_load(backbone),
    )  # fmt: skip
    if release is not None:
        require_untouched(study.store, release, trained_on)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        train(study, workers)
        errors = judge(study)
    text = report(study, errors)
    print(text)
    for target in [folder, *([docs] if docs else [])]:
        target.mkdir(parents=True, exist_ok=True)
        write_text(target / "report.md", text)
        write_json(target / "report.json", {"errors": errors, "claims": [list(c) for c in claims(study, errors)]})
        draw(study, errors, target / "errors.png")


def draw(study: Study, errors: dict[str, list[dict[str, dict[str, float]]]], path: Path) -> None:
    """Draw errors of the new and the old fidelity, one point a method."""
    names = list(errors)
    panels = []
    for fidelity in (study.new, study.old):
        for prop, unit in (("energy", "meV/atom"), ("forces", "meV/Å")):
            values = [[s[fidelity][prop] for s in errors[n] if prop in s.get(fidelity, {})] for n in names]
            if any(values):
                panels.append((f"{fidelity} {prop}, {unit}", values))
    plots.points_by_name(path, names, panels)


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.exit(f"error: {error}")
