"""Labels that ``mffm select`` chooses against random ones: fine-tunings with as many of each. Resumable.

    for name in molecules_many molecules solids; do mffm ingest configs/data/$name.yaml; done
    python tools/study_selection.py diverse --workers 2           # report: studies/selection/diverse/report.md

For each case a release is trained on the cheap level's labels of the training split. It chooses, by each way, from a
pool of structures with an expensive label; it is fine-tuned on the first n of them, for growing n, and judged on the
test split and on groups that no training set holds. A way other than random chooses the same structures whatever the
seed, which is that of the training. All choose their weights by the same validation frames. The same command goes on
after a stop.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import trainings
import typer

from mffm import plots
from mffm.config.base import as_overrides
from mffm.data.store import Store
from mffm.errors import InputError, known
from mffm.evaluate import parity
from mffm.executor import locked
from mffm.keys import ENERGY, FORCES
from mffm.release import load, read_json, save, write_json, write_text
from mffm.select import run as selection
from mffm.study import curves

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "finetune.yaml"
PRETRAIN = ROOT / "configs" / "quickstart_pretrain.yaml"
WAYS = ("random", "fps", "lcmd", "maxdet")
VALIDATION = 20
SHARE, FLOOR = 0.6, 0.85  # of random's labels, where a choice is meant to pay

Errors = dict[str, dict[str, float]]  # split → metric → error


@dataclass(frozen=True)
class Case:
    """What is chosen from.

    Attributes:
        low, high: the release's level, and that of the labels to buy.
        few: groups of which the pool has all frames, those with the most; of every other group it has one. None: the
            pool is the training split.
    """

    title: str
    store: str
    low: str
    high: str
    n: tuple[int, ...]
    few: int | None = None


CASES = {
    "diverse": Case("a thermal frame each of hundreds of molecules", "stores/molecules_many", "gfn2", "pbe",
                    (12, 25, 50, 100)),
    "redundant": Case("many frames of six molecules, one of each of the others", "stores/molecules", "gfn2", "pbe",
                      (12, 25, 50), few=6),
    "ccsdt": Case("energies of many frames of six molecules, one of each of the others", "stores/molecules", "pbe",
                  "ccsdt", (12, 25, 50), few=6),
    "solids": Case("cells of compounds and pseudo-binaries", "stores/solids", "pbe_gpaw", "r2scan_gpaw", (16, 32, 64)),
}  # fmt: skip


@dataclass(frozen=True)
class Study:
    """One case, and what its trainings have in common."""

    name: str
    folder: Path
    seeds: Sequence[int]
    base_steps: int
    steps: int
    ways: Sequence[str]

    @property
    def case(self) -> Case:
        return CASES[self.name]

    @property
    def store(self) -> Store:
        return Store(Path(self.case.store))

    @property
    def base(self) -> Path:
        return self.folder / "release"

    def cells(self) -> list[tuple[str, int, int]]:
        """Return way, labels and seed of every fine-tuning."""
        return [(way, n, seed) for seed in self.seeds for n in self.case.n for way in self.ways]

    def common(self, name: str, seed: int) -> dict[str, Any]:
        return {
            "run": str(self.folder / "runs" / name), "seed": seed, "data.store": self.case.store,
            "data.validation_max_frames": VALIDATION, "train.threads": 1, "log.wandb": "disabled",
        }  # fmt: skip

    def properties(self, fidelity: str) -> list[str]:
        return list(self.store.label_counts("train").get(fidelity, {}))

    def base_job(self) -> Any:
        case = self.case
        changes = self.common("base", 0) | {
            "data.plan.pools": [{"fidelity": case.low, "properties": self.properties(case.low)}],
            "train.steps": self.base_steps, "train.validate_every": 100, "train.save_every": 100,
            "train.best": f"val/{case.low}/loss",
        }  # fmt: skip
        if "stress" in self.properties(case.low):
            changes["loss.stress"] = {"weight": 1}
        return trainings.job(self.folder, "base", ["train", str(PRETRAIN), *as_overrides(changes)])

    def job(self, way: str, n: int, seed: int) -> Any:
        case, name = self.case, name_of(way, n, seed)
        pool = {"fidelity": case.high, "properties": self.properties(case.high), "only": str(self.chosen(way, n, seed))}
        changes = self.common(name, seed) | {
            "data.plan.pools": [pool], "train.steps": self.steps, "train.best": f"val/{case.high}/loss",
        }  # fmt: skip
        if "stress" in pool["properties"]:
            changes["loss.stress"] = {"weight": 1}
        return trainings.job(
            self.folder, name, ["finetune", str(self.base), str(RECIPE), *as_overrides(changes)]
        )  # fmt: skip

    def chosen(self, way: str, n: int, seed: int) -> Path:
        """Return the file that names the labels of a fine-tuning."""
        which = f"{way}-s{seed}" if way == "random" else way
        return self.folder / "chosen" / f"{which}-n{n}.txt"


def name_of(way: str, n: int, seed: int) -> str:
    return f"{way}-n{n}-s{seed}"


def pool_rows(store: Store, case: Case) -> np.ndarray:
    """Return the rows that may be chosen."""
    rows = store.rows(split="train", fidelity=case.high)
    if case.few is None:
        return rows
    groups, counts = np.unique(store.group[rows], return_counts=True)
    most = groups[np.argsort(-counts, kind="stable")[: case.few]]
    first = np.unique(store.group[rows], return_index=True)[1]
    return np.union1d(rows[np.isin(store.group[rows], most)], rows[first])


def choose(study: Study) -> None:
    """Write the files of chosen ids that are not there yet."""
    store, case = study.store, study.case
    rows = pool_rows(store, case)
    if len(rows) < max(case.n):
        raise InputError(f"{store.path}: the pool has {len(rows)} structures, {max(case.n)} are to be chosen")
    others = np.setdiff1d(store.rows(split="train"), rows)
    for way in study.ways:
        for seed in study.seeds if way == "random" else study.seeds[:1]:
            if all(study.chosen(way, n, seed).is_file() for n in case.n):
                continue
            options = selection.Options(way, max(case.n), case.low, seed=seed, without=others.tolist())
            found = selection.select(study.base, [store.path], options, study.folder / "asked", lambda *_: None)
            picked = found.pool.take(found.candidates[[pick.index for pick in found.picks]].tolist())
            ids = [atoms.info["frame_id"] for atoms in picked]
            for n in case.n:
                file = study.chosen(way, n, seed)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_text(file, "\n".join(ids[:n]) + "\n")


def train(study: Study, workers: int) -> None:
    """Train what is not finished; choose in between."""
    if not study.base.exists():
        if not trainings.is_finished(study.folder, "base"):
            trainings.run_all([study.base_job()], 1)
        save(study.folder / "runs" / "base", study.base)
    choose(study)
    left = [cell for cell in study.cells() if not trainings.is_finished(study.folder, name_of(*cell))]
    trainings.run_all([study.job(*cell) for cell in left], workers)


def errors_of(study: Study, cell: tuple[str, int, int]) -> Errors:
    """Return the errors of a fine-tuned potential: energies meV/atom, forces meV/Å."""
    store, case = study.store, study.case
    loaded = load(study.folder / "runs" / name_of(*cell))
    found: Errors = {}
    for split in ("test", "ood"):
        if split not in store.split_names or not len(store.rows(split=split, fidelity=case.high)):
            continue
        of_frames = parity.evaluate(loaded, store, split, [case.high]).frame_errors(case.high)
        if ENERGY not in of_frames:  # elements without references at this level
            continue
        found[split] = {}
        for prop in [p for p in (ENERGY, FORCES) if p in of_frames]:
            frames = of_frames[prop]
            means = frames.sums / frames.counts
            groups = store.group[frames.rows]
            found[split] |= {
                prop: float(means.mean()),
                f"{prop}_p99": float(np.percentile(means, 99)),
                f"{prop}_worst_group": max(float(means[groups == g].mean()) for g in np.unique(groups)),
            }
    return found


def judge(study: Study) -> dict[str, Errors]:
    """Return the errors of every cell; those that were judged before are read."""
    path = study.folder / "errors.json"
    content = read_json(path) if path.is_file() else {}
    for cell in study.cells():
        if name_of(*cell) not in content:
            content[name_of(*cell)] = errors_of(study, cell)
            write_json(path, content)
    return dict(content)


def by_labels(
    study: Study, errors: dict[str, Errors], way: str, split: str, metric: str
) -> dict[int, dict[int, float]]:
    """Return labels → seed → error."""
    return {n: {seed: errors[name_of(way, n, seed)][split][metric] for seed in study.seeds} for n in study.case.n}


def share(study: Study, errors: dict[str, Errors], way: str, split: str, metric: str, n: int) -> curves.Bounded:
    """Return the labels of a way ÷ those that random needs for the same mean error."""
    random = curves.mean_curve(by_labels(study, errors, "random", split, metric))
    k = curves.factor(random, n, curves.mean(by_labels(study, errors, way, split, metric)[n].values()))
    flipped: dict[str, Any] = {"=": "=", "<=": ">=", ">": "<"}
    return curves.Bounded(1 / k.value, flipped[k.bound])


def report(study: Study, errors: dict[str, Errors]) -> tuple[str, dict[str, Any]]:
    """Return the report as Markdown, and as JSON."""
    case, store = study.case, study.store
    rows = pool_rows(store, case)
    splits = list(next(iter(errors.values())))
    metrics = list(next(iter(errors.values()))[splits[0]])
    shares: dict[str, Any] = {}
    n = {split: len(store.rows(split=split, fidelity=case.high)) for split in ("val", *splits)}
    n["val"] = min(n["val"], VALIDATION)
    held = f" and {n['ood']} of groups that no training has (ood)" if "ood" in splits else ""
    lines = [
        f"# Choosing {case.high} labels: {case.title}", "",
        f"Store {store.path.name} (`{store.fingerprint[:12]}`), {len(rows)} structures to choose from in "
        f"{len(np.unique(store.group[rows]))} groups; release: {study.base_steps} steps on {case.low}; fine-tuning: "
        f"{study.steps} steps; {len(study.seeds)} seeds. Weights chosen by {n['val']} validation frames, judged on "
        f"{n['test']} test frames{held}. Mean over "
        "seeds ± standard deviation; in brackets the labels ÷ those that random needs for the same error. Energies "
        "meV/atom, forces meV/Å, mean absolute errors of a frame: their mean, 99th percentile, and the mean of the "
        "worst group.", "",
    ]  # fmt: skip
    for split in splits:
        for metric in metrics:
            lines += [f"## {split}: {metric.replace('_', ' ')}", "", "| | " + " | ".join(map(str, case.n)) + " |"]
            lines.append("|---|" + "---|" * len(case.n))
            for way in study.ways:
                cells = []
                for n_labels, seeds in by_labels(study, errors, way, split, metric).items():
                    values = list(seeds.values())
                    cells.append(f"{np.mean(values):.1f} ± {np.std(values):.1f}")
                    if way != "random":
                        found = share(study, errors, way, split, metric, n_labels)
                        shares[f"{split}/{metric}/{way}/{n_labels}"] = found.text()
                        cells[-1] += f" ({found.text()})"
                lines.append(f"| {way} | " + " | ".join(cells) + " |")
            lines.append("")
    lines += ["## Claims", "", "| claim | |", "|---|---|"]
    told = claims(study, errors, splits, metrics)
    lines += [f"| {claim} | {found} |" for claim, found in told]
    return "\n".join(lines) + "\n", {"errors": errors, "shares": shares, "claims": told}


def verdict_of(shares: Sequence[float]) -> str:
    """Return what shares of random's labels, at several numbers of labels, say of the claim."""
    if max(shares) <= FLOOR:
        return "shown" if max(shares) <= SHARE else "floor"
    return "in part" if min(shares) <= SHARE else "floor in part" if min(shares) <= FLOOR else "**not shown**"


def claims(
    study: Study, errors: dict[str, Errors], splits: Sequence[str], metrics: Sequence[str]
) -> list[tuple[str, str]]:
    """Return what the comparison is for, and what was found."""
    told = []
    for way in study.ways:
        if way == "random":
            continue
        worse = []
        for mean in [m for m in (ENERGY, FORCES) if m in metrics]:
            mine, theirs = (by_labels(study, errors, w, "test", mean) for w in (way, "random"))
            for n in study.case.n:
                spread = np.std(list(theirs[n].values()), ddof=1) if len(study.seeds) > 1 else 0.0
                over = np.mean(list(mine[n].values())) - np.mean(list(theirs[n].values()))
                if over > spread:
                    worse.append(f"{mean} at {n}")
        told.append((f"{way}: in distribution not worse than random by more than its seeds' spread",
                     "shown" if not worse else f"**not shown**: {', '.join(worse)}"))  # fmt: skip
        hard = [(s, m) for s in splits for m in metrics if s != "test" or m.endswith(("p99", "worst_group"))]
        for split, metric in hard:
            values = [share(study, errors, way, split, metric, n) for n in study.case.n[:-1]]
            verdict = verdict_of([one.value for one in values])
            claim = f"{way}: {split} {metric.replace('_', ' ')}: at most {SHARE:g} ({FLOOR:g}) of random's labels"
            told.append((claim, f"{verdict}: {', '.join(one.text() for one in values)}"))
    return told


def draw(study: Study, errors: dict[str, Errors], path: Path) -> None:
    """Draw errors against labels, a panel for each split and metric."""
    panels: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {}
    for split, metrics in next(iter(errors.values())).items():
        for metric in metrics:
            unit = "meV/atom" if metric.startswith(ENERGY) else "meV/Å"
            panel = panels.setdefault(f"{split} {metric.replace('_', ' ')}, {unit}", {})
            for way in study.ways:
                for n, seeds in by_labels(study, errors, way, split, metric).items():
                    values = list(seeds.values())
                    panel.setdefault(way, []).append((n, curves.mean(values), min(values), max(values)))
    plots.label_curves(path, panels, f"{study.case.high} labels", 3)


def main(
    case: Annotated[str, typer.Argument(help=", ".join(CASES))],
    folder: Annotated[Path, typer.Option(help="of runs and reports")] = Path("studies/selection"),
    base_steps: Annotated[int, typer.Option(help="of the release's training")] = 1000,
    steps: Annotated[int, typer.Option(help="of a fine-tuning")] = 200,
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    ways: Annotated[str, typer.Option(help="comma-separated; random is always among them")] = ",".join(WAYS),
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    docs: Annotated[Path | None, typer.Option(help="folder for a copy of the report, case by case")] = None,
) -> None:
    """Compare ways to choose labels."""
    if case not in CASES:
        raise InputError(f"{case}: not a case; known are {known(CASES)}")
    asked = [way for way in WAYS if way == "random" or way in ways.split(",")]
    study = Study(case, folder / case, [int(s) for s in seeds.split(",")], base_steps, steps, asked)
    study.folder.mkdir(parents=True, exist_ok=True)
    with locked(study.folder / "lock"):
        train(study, workers)
        errors = judge(study)
    text, content = report(study, errors)
    print(text)
    for target in [study.folder, *([docs / case] if docs else [])]:
        target.mkdir(parents=True, exist_ok=True)
        write_text(target / "report.md", text)
        write_json(target / "report.json", content)
        draw(study, errors, target / "errors.png")


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.exit(f"error: {error}")
