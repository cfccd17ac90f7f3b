"""A first foundation model, and what its mixture of levels is worth in every domain: the full line, resumable.

    MFFM_DATA=<folder of the public sets> python tools/foundation.py --workers 2    # studies/foundation/report.md

Store, doctor, direct-force pretraining, conservative training, errors by domain, release, benchmark subsets, report. A
domain is a fidelity, and a source where the recipe's pools name one. Beside the mixture a specialist is trained for
each: the same recipes on that domain's pools alone, for the CPU time that the mixture spends on them, which is the
mixture's CPU time × the domain's share of the work (edges and atoms) of its steps. What a step costs is measured before
by a few steps of each training. The same command goes on after a stop of any kind; the folder may be copied to the same
place of another checkout and gone on with there.
"""

import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import trainings
import typer
from foundation_report import MIXTURE, claims, compare, draw, text_of

from mffm.config.base import apply_overrides, as_overrides, load, read_yaml, validate
from mffm.config.data import DataConfig
from mffm.config.recipe import Recipe
from mffm.data.checks import split_leaks
from mffm.data.doctor import examine
from mffm.data.ingest import ingest
from mffm.data.plan import ATOM_COST, Plan, build_pools
from mffm.data.store import Store
from mffm.errors import EXIT_INTERRUPTED, InputError
from mffm.evaluate import parity
from mffm.evaluate.benchmark import report as benchmark_report
from mffm.evaluate.benchmark import run as benchmark
from mffm.evaluate.benchmark.source import Source
from mffm.executor import handling_stops, locked, machine, process_of
from mffm.fidelity import FidelityTable
from mffm.release import code_version, read_json, save, write_json, write_text
from mffm.release import load as load_potential
from mffm.study.run import Stopped

ROOT = Path(__file__).parents[1]
STAGES = {"direct": "-direct", "conservative": ""}  # stage → what its run's name ends in
GROUPS = dict.fromkeys(("molecules_low", "molecules_many", "molecules_many_low"), "molecules")  # one domain of sources
TASKS = (  # offline, and the fidelity that each is asked at
    "matbench-discovery/wbm972=pbe_mp", "lambench/elastic=pbe_mp", "lambench/rxn_barrier=wb97x",
    "lambench/torsionnet-mini=wb97x", "lambench/wiggle150-mini=wb97x",
)  # fmt: skip
PILOT_STEPS, PILOT_ROW = 40, 10
LOAD_STEPS = 200  # over which the work of a step is averaged


@dataclass(frozen=True)
class Domain:
    """Frames of one fidelity; ``sources``: of these alone, all where there are none."""

    name: str
    fidelity: str
    sources: list[str] = field(default_factory=list)
    pools: list[int] = field(default_factory=list)  # places in the recipe

    def rows(self, store: Store, split: str) -> np.ndarray:
        """Return its rows of a split. int64, ascending"""
        of = [store.rows(split, source, self.fidelity) for source in self.sources or [None]]
        return np.unique(np.concatenate(of))


@dataclass(frozen=True)
class Line:
    """What all stages share.

    Attributes:
        recipes: stage → content of its recipe.
        unvalidated: domains without validation frames: their specialists' best weights are chosen by training frames.
    """

    folder: Path
    recipes: dict[str, dict[str, Any]]
    domains: list[Domain]
    unvalidated: set[str] = field(default_factory=set)

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def run(self, name: str) -> Path:
        return self.folder / "runs" / name

    def content(self, stage: str, name: str, steps: int, is_pilot: bool = False) -> dict[str, Any]:
        """Return the recipe of a training of the mixture or of a domain's specialist."""
        recipe = self.recipes[stage]
        run = f"pilot-{name}" if is_pilot else name
        changes: dict[str, Any] = {
            "name": run + STAGES[stage], "run": str(self.run(run + STAGES[stage])), "data.store": str(self.store),
            "train.steps": steps, "optim.warmup_steps": min(100, steps // 10),
            "train.validate_every": math.ceil(steps / 20), "train.save_every": math.ceil(steps / 50),
        }  # fmt: skip
        if stage == "conservative":
            pretrained = name == MIXTURE or "forces" in self.properties(name)
            changes["start_from"] = str(self.run(name + STAGES["direct"])) if pretrained and not is_pilot else None
        if is_pilot:
            rows = {"log_every": PILOT_ROW, "validate_every": steps, "save_every": steps, "preflight": False}
            changes |= {f"train.{key}": value for key, value in rows.items()}
        if name != MIXTURE:
            pools = recipe["data"]["plan"]["pools"]
            changes |= {"data.plan.pools": [pools[i] for i in self.domain(name).pools], "model.heads.kind": "shared"}
            changes |= {"model.heads.base": None, "model.heads.init_from": {}}
            if name in self.unvalidated:
                changes["data.validation_split"] = "train"
            if stage == "direct":
                changes["model.direct.stress"] = "stress" in self.properties(name)
        return apply_overrides(recipe, as_overrides(changes))

    def domain(self, name: str) -> Domain:
        return next(d for d in self.domains if d.name == name)

    def properties(self, name: str) -> set[str]:
        pools = self.recipes["conservative"]["data"]["plan"]["pools"]
        return {prop for i in self.domain(name).pools for prop in pools[i].get("properties", ("energy", "forces"))}

    def trained(self) -> list[tuple[str, str]]:
        """Return (stage, name) of all trainings. Direct forces need forces."""
        pairs = [(s, n) for n in (MIXTURE, *(d.name for d in self.domains)) for s in STAGES]
        return [(s, n) for s, n in pairs if s != "direct" or n == MIXTURE or "forces" in self.properties(n)]


def domains_of(recipe: Recipe) -> list[Domain]:
    """Return the domains of a recipe's pools, in their order."""
    found: dict[str, Domain] = {}
    for i, pool in enumerate(recipe.data.plan.pools):
        group = GROUPS.get(pool.source or "", pool.source)
        name = f"{pool.fidelity}-{group}" if group else pool.fidelity
        domain = found.setdefault(name, Domain(name, pool.fidelity))
        domain.pools.append(i)
        if pool.source:
            domain.sources.append(pool.source)
    return list(found.values())


def plan_of(content: dict[str, Any], store: Store) -> Plan:
    recipe = validate(Recipe, content, str(content.get("name")))
    table = FidelityTable([store.fidelities[name] for name in recipe.fidelities])
    pools = build_pools(store, recipe.data.plan, table, recipe.model.backbone.cutoff)
    return Plan(pools, recipe.data.plan, recipe.seed, recipe.train.steps)


def work_of(plan: Plan) -> np.ndarray:
    """Return the mean work of a step by pool, in edges; an atom counts as ATOM_COST. [n_pools] float64"""
    work, cursor = np.zeros(len(plan.pools)), plan.start()
    for _ in range(LOAD_STEPS):
        step, cursor = plan.step(cursor)
        work += np.bincount(step.pool, step.n_edges + ATOM_COST * step.n_atoms, minlength=len(work))
    return work / LOAD_STEPS


def refuse_leaks(plan: Plan, line: Line, store: Store, name: str) -> None:
    """Raise where a training draws a frame that is judged.

    Raises:
        InputError: it does, at whatever fidelity; or a structure of the store is in two splits.
    """
    leaks = split_leaks(store)
    if leaks:
        raise InputError(f"{store.path}: {leaks[0]}; ingest again")
    tested = np.unique(np.concatenate([d.rows(store, "test") for d in line.domains]))
    for pool in plan.pools:
        both = np.intersect1d(pool.rows, tested)
        if len(both):
            raise InputError(
                f"{name}: pool {pool.name} trains {len(both)} test frames, the first {store.frame_id(int(both[0]))} "
                f"(row {both[0]}); give the pool split: train"
            )


def seconds_a_step(run: Path) -> float:
    """Return the median CPU time of a step, without start, validation and saving."""
    rows = [row for row in trainings.rows(run) if "train/loss" in row]
    return float(np.median([b["cpu_s"] / (b["step"] - a["step"]) for a, b in pairwise(rows)]))


def cpu_minutes(run: Path) -> float:
    """Return the CPU time of all starts; what a kill lost after the last checkpoint is not in it."""
    return sum(row["cpu_s"] for row in trainings.rows(run)) / 60


def write_recipe(line: Line, stage: str, name: str, steps: int, is_pilot: bool = False) -> trainings.Job:
    content = line.content(stage, name, steps, is_pilot)
    path = line.folder.absolute() / "recipes" / f"{content['name']}.yaml"
    validate(Recipe, content, path.name)
    write_json(path, content)  # JSON is YAML
    return trainings.job(line.folder.absolute(), str(content["name"]), ["train", str(path)])


def schedule(line: Line, store: Store, minutes: float | None, scale: float | None, workers: int) -> dict[str, Any]:
    """Return what was decided at the first start: steps of each run, shares of the work; the same ever after.

    Raises:
        InputError: the folder holds another one.
    """
    asked = {"recipes": line.recipes, "store": store.fingerprint, "minutes": minutes, "scale": scale}
    path = line.folder / "schedule.json"
    if path.is_file():
        content = read_json(path)
        changed = [key for key in asked if content["asked"][key] != asked[key]]
        if changed:
            raise InputError(f"{line.folder}: was begun with other {', '.join(changed)}; give another --folder")
        return content
    work, costs = {}, {}
    for stage, name in line.trained():
        plan = plan_of(line.content(stage, name, PILOT_STEPS), store)
        refuse_leaks(plan, line, store, name)
        work[stage, name] = work_of(plan)
        costs[stage, name] = float(work[stage, name].sum())  # where nothing is measured, relative ones do
    if scale is None:
        names = {pair: f"pilot-{pair[1]}{STAGES[pair[0]]}" for pair in costs}
        left = [pair for pair, name in names.items() if not trainings.is_finished(line.folder, name)]
        trainings.run_all([write_recipe(line, *pair, PILOT_STEPS, is_pilot=True) for pair in left], workers)
        costs = {pair: seconds_a_step(line.run(name)) for pair, name in names.items()}
    full = {stage: int(line.recipes[stage]["train"]["steps"]) for stage in STAGES}
    if scale is None:
        assert minutes is not None
        scale = 30 * minutes / sum(full[stage] * costs[stage, MIXTURE] for stage in STAGES)  # half is the mixture's
    steps: dict[str, int] = {}
    shares: dict[str, dict[str, float]] = {}
    for stage in STAGES:
        steps[MIXTURE + STAGES[stage]] = max(1, round(scale * full[stage]))
        own = work[stage, MIXTURE] / work[stage, MIXTURE].sum()
        for d in line.domains:
            shares.setdefault(d.name, {})[stage] = float(own[d.pools].sum())
    for stage, name in line.trained():
        if name != MIXTURE:
            paid = [stage] if ("direct", name) in costs else list(STAGES)  # without forces both are for the second
            used = sum(shares[name][s] * steps[MIXTURE + STAGES[s]] * costs[s, MIXTURE] for s in paid)
            steps[name + STAGES[stage]] = max(1, round(used / costs[stage, name]))
    measured = {name + STAGES[stage]: cost for (stage, name), cost in costs.items()} if minutes is not None else None
    content = {"asked": asked, "steps": steps, "shares": shares, "seconds_a_step": measured}
    write_json(path, content)
    return read_json(path)


def end_leftovers(folder: Path) -> None:
    """Have the trainings of a start that was killed save and end."""
    for path in sorted((folder.absolute() / "recipes").glob("*.yaml")):
        run = folder.absolute() / "runs" / path.stem
        while (process := process_of(path, run)) is not None:
            print(f"{path.stem}: an earlier start still trains it; process {process} is asked to save", flush=True)
            os.kill(process, signal.SIGTERM)
            time.sleep(2.0)


def train(line: Line, steps: dict[str, int], workers: int) -> None:
    """Train what is not finished: the mixture first, then the specialists, those with the most steps first."""
    left = [
        (stage, name) for stage, name in line.trained()
        if not trainings.is_finished(line.folder, name + STAGES[stage])
    ]  # fmt: skip
    left.sort(key=lambda pair: (pair[1] != MIXTURE, -steps[pair[1]]))
    waits = {name for stage, name in left if stage == "direct"}
    jobs = []
    for stage, name in left:
        job = write_recipe(line, stage, name, steps[name + STAGES[stage]])
        is_second = stage == "conservative" and name in waits
        jobs.append(replace(job, after=[name + STAGES["direct"]] if is_second else []))
    trainings.run_all(jobs, workers)


def judge(line: Line, store: Store) -> dict[str, Any]:
    """Return name → domain → property → test errors by frame; what was judged before with these weights is read."""
    path = line.folder / "errors.json"
    content = read_json(path) if path.is_file() else {}
    for name in (MIXTURE, *(d.name for d in line.domains)):
        loaded = load_potential(line.run(name))
        if content.get(name, {}).get("weights_sha256") == loaded.weights_sha256:
            continue
        refuse_leaks(plan_of(read_yaml(line.run(name) / "recipe.yaml"), store), line, store, name)
        own = line.domains if name == MIXTURE else [line.domain(name)]
        fidelities = list(dict.fromkeys(d.fidelity for d in own))
        evaluation = parity.evaluate(loaded, store, "test", fidelities)
        parity.write(evaluation, loaded, store, line.run(name))
        found: dict[str, Any] = {"weights_sha256": loaded.weights_sha256, "domains": {}}
        for d in own:
            of = found["domains"].setdefault(d.name, {})
            for prop, frames in evaluation.frame_errors(d.fidelity).items():
                mine = np.isin(frames.rows, d.rows(store, "test"))
                if mine.any():
                    columns = {"rows": frames.rows, "sums": frames.sums, "counts": frames.counts}
                    of[prop] = {key: column[mine].tolist() for key, column in columns.items()}
        content[name] = found
        write_json(path, content)
    return content


def benchmarks(line: Line, data: Path, tasks: Sequence[str], limit: int, workers: int) -> list[dict[str, Any]]:
    """Run the subsets of the suites on the release; return a row for each task."""
    release, place, outcomes = line.folder / "release", line.folder / "benchmarks", []
    for text in tasks:
        name, _, fidelity = text.partition("=")
        settings = benchmark.Settings(data, workers, limit=limit)
        source = Source(str(release), fidelity)
        outcomes.append((fidelity, benchmark.run_task(source, name, settings, place, lambda *_: None)))
    benchmark_report.write(place, str(release), {MIXTURE: [outcome for _, outcome in outcomes]})
    rows = []
    for (fidelity, outcome), text in zip(outcomes, tasks, strict=True):
        row: dict[str, Any] = {"task": text.partition("=")[0], "fidelity": fidelity}
        if isinstance(outcome, benchmark.Finished):
            score = outcome.score
            metrics = {k: None if v is None or math.isnan(v) else v for k, v in score.metrics.items()}
            row |= {"metrics": metrics, "unit": score.unit, "n": score.n, "n_failed": score.n_failed}
            row |= {"n_of_set": outcome.n_of_set}
        rows.append(row)
    return rows


def facts_of(line: Line, store: Store, plan: dict[str, Any], starts: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Return what the report says of the trainings, the machine and the store."""
    spec = load_potential(line.run(MIXTURE))
    rows: dict[str, Any] = {}
    for name, steps in plan["steps"].items():
        run = line.run(name)
        is_direct = name.endswith(STAGES["direct"])
        stage, own = ("direct", name.removesuffix(STAGES["direct"])) if is_direct else ("conservative", name)
        share = plan["shares"].get(own, {}).get(stage)
        is_measurable = len([r for r in trainings.rows(run) if "train/loss" in r]) > 1
        cost = 1e3 * seconds_a_step(run) if is_measurable else None
        rows[name] = {"steps": steps, "share": share, "cpu_minutes": cpu_minutes(run), "ms_a_step": cost}
    elements = {e for name in spec.fidelities.names for e in spec.spec.references.elements(name)}
    return {
        "date": time.strftime("%Y-%m-%d"), "machine": "; ".join(dict.fromkeys(s["machine"] for s in starts)),
        "version": code_version()["mffm"], "resumed": len(starts) - 1, "store": store.fingerprint,
        "n_elements": len(elements), "n_parameters": spec.potential.n_parameters, "steps": plan["steps"],
        "doctor": read_json(line.folder / "doctor" / "doctor.json")["counts"], "trainings": rows,
        "cpu_minutes": sum(row["cpu_minutes"] for row in rows.values()),
    }  # fmt: skip


def prepare(folder: Path, data: Path, workers: int) -> Store:
    """Make the store and have the doctor look at it.

    Raises:
        InputError: the doctor finds an error.
    """
    ingest(load(DataConfig, data, as_overrides({"workers": workers})), data.parent, folder / "store")
    found = folder / "doctor" / "doctor.json"
    if not found.is_file():
        examine([folder / "store"], folder=folder / "doctor", workers=workers)
    errors = [f for f in read_json(found)["findings"] if f["severity"] == "error"]
    if errors:
        place = found.with_suffix(".md")
        raise InputError(f"{folder / 'store'}: {errors[0]['check']}: {errors[0]['message']}; see {place}")
    return Store(folder / "store")


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="key.key=value, of both recipes")] = None,
    folder: Annotated[Path, typer.Option(help="of everything")] = Path("studies/foundation"),
    data: Annotated[Path, typer.Option(help="data YAML")] = ROOT / "configs" / "data" / "foundation.yaml",
    direct: Annotated[Path, typer.Option(help="recipe of stage 1")] = ROOT / "configs" / "foundation_direct.yaml",
    recipe: Annotated[Path, typer.Option(help="recipe of stage 2")] = ROOT / "configs" / "foundation.yaml",
    minutes: Annotated[float, typer.Option(help="CPU minutes, half of them the mixture's")] = 360.0,
    scale: Annotated[float | None, typer.Option(help="of the recipes' steps, instead of --minutes")] = None,
    task: Annotated[list[str] | None, typer.Option(help="benchmark task=fidelity, instead of the usual")] = None,
    limit: Annotated[int, typer.Option(min=1, help="structures of a benchmark task")] = 100,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    docs: Annotated[Path | None, typer.Option(help="folder for a copy of report and figures")] = None,
) -> None:
    """Train a foundation model and its specialists, and compare them."""
    public = os.environ.get("MFFM_DATA")
    if not public:
        raise InputError("MFFM_DATA is not set: name the folder of the public data sets, which benchmarks read too")
    folder = Path(os.path.relpath(folder))  # runs hold relative paths: the folder may move with its checkout
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"), handling_stops(stop):
        path = folder / "starts.json"
        starts = read_json(path)["starts"] if path.is_file() else []
        starts.append({"date": time.strftime("%F %T"), "machine": machine()})
        write_json(path, {"starts": starts})
        contents = {
            stage: apply_overrides(read_yaml(file), overrides or [])
            for stage, file in zip(STAGES, (direct, recipe), strict=True)
        }
        end_leftovers(folder)
        store = prepare(folder, data, workers)
        domains = domains_of(validate(Recipe, contents["conservative"], str(recipe)))
        line = Line(folder, contents, domains, {d.name for d in domains if not len(d.rows(store, "val"))})
        plan = schedule(line, store, None if scale else minutes, scale, workers)
        train(line, plan["steps"], workers)
        n_train = {d.name: len(d.rows(store, "train")) for d in line.domains}
        errors = compare(n_train, judge(line, store))
        if not (folder / "release").exists():
            save(line.run(MIXTURE), folder / "release")
        content = facts_of(line, store, plan, starts)
        content |= {"errors": errors, "claims": claims(errors)}
        energies = {e["domain"] for e in errors if e["property"] == "energy"}
        content["without_test"] = ", ".join(d.name for d in line.domains if d.name not in energies)
        content["benchmarks"] = benchmarks(line, Path(public), task or TASKS, limit, workers)
    text = text_of(content)
    print(text)
    for target in [folder, *([docs] if docs else [])]:
        target.mkdir(parents=True, exist_ok=True)
        write_text(target / "report.md", text)
        write_json(target / "report.json", content)
        draw(errors, target / "ratios.png")
        shutil.copy(line.run(MIXTURE) / "parity-test.png", target / "parity.png")


def stop(number: int, frame: object) -> None:
    """Leave by way of the executor, which asks the trainings to save; a second signal does not cut that short."""
    for s in (signal.SIGINT, signal.SIGTERM):
        signal.signal(s, signal.SIG_IGN)
    raise Stopped


if __name__ == "__main__":
    try:
        typer.run(main)
    except InputError as error:
        sys.exit(f"error: {error}")
    except Stopped:
        print("stopped and saved; the same command goes on", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
