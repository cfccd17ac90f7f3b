"""``label``: from structures to published labels, on this machine or through an executor of a cluster."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from mffm.data.records import disk_errors_explained
from mffm.errors import InputError
from mffm.executor import Executor, Job, State, locked
from mffm.label import levels, task
from mffm.label.journal import Limits
from mffm.label.pool import Pool
from mffm.label.publish import Summary, data_yaml_of, finish, layer_is_ours, records_of
from mffm.label.work import Request, Work, begin, settings_hash

Progress = Callable[[int, int, int], None]  # labels and failures so far, of how many structures


def place_of(request: Request, layer: str, output: Path | None) -> Path:
    """Return the working folder: in the store, or beside the output."""
    if request.source.store is not None:
        return request.source.store / "layers" / f".labelling-{layer}"
    assert output is not None
    return output.with_name(f".{output.name}.labelling")


def label(
    request: Request,
    layer: str,
    output: Path | None,
    workers: int,
    limits: Limits,
    progress: Progress,
    cluster: tuple[Executor, int] | None = None,
) -> Summary | str:
    """Label structures; the same call goes on after a kill. Return the summary, or what is there already.

    Args:
        layer: name of the label layer of a store.
        output: extxyz to write where the source is files; None for a store.
        workers: processes; on a cluster of each task.
        cluster: executor of the tasks, and into how many parts the structures are divided the first time.

    Raises:
        InputError: bad input; the codes are missing; nothing could be labelled; a full disk.
    """
    folder = place_of(request, layer, output).resolve()
    with disk_errors_explained(folder):
        there = _there_already(request, layer, output, folder)
        if there:
            shutil.rmtree(folder, ignore_errors=True)  # where the last start was killed at its very end
            return there
        work = begin(folder, request)
        with locked(folder / "lock"):
            _compute(work, workers, limits, progress, cluster)
            ledger = work.ledger()
            left = work.left(limits, ledger, work.chosen())
            if cluster is not None and left:
                raise InputError(
                    f"{len(left)} structures are left: their tasks ended early, see {folder / 'tasks'}; the same "
                    "command goes on with them"
                )
            return finish(work, ledger, layer, output)


def _there_already(request: Request, layer: str, output: Path | None, folder: Path) -> str:
    """Return that the same labelling is complete, or "".

    Raises:
        InputError: the output is something else.
    """
    if output is not None:
        if not output.exists():
            beside = [path for path in (data_yaml_of(output), records_of(output)) if path.exists()]
            if beside and not (folder / "work.json").is_file():
                raise InputError(f"{beside[0]}: exists, and would be written too; give another name with --out")
            return ""
        if not (folder / "work.json").is_file():
            raise InputError(f"{output}: exists; give another name with --out, or remove it")
        begin(folder, request)
        return f"{output}: complete already"
    assert request.source.store is not None
    fidelity = levels.find(request.level, request.name).fidelity
    content = {"settings_hash": settings_hash(fidelity), **request.subset()}
    about = layer_is_ours(request.source.store, layer, content)
    if about is None:
        return ""
    return (
        f"{request.source.store}: complete already: layer {layer} has {about['n_labels']} labels, "
        f"{sum(about['failures'].values())} structures failed; another --layer tries those again"
    )


def _compute(
    work: Work, workers: int, limits: Limits, progress: Progress, cluster: tuple[Executor, int] | None
) -> None:
    chosen = work.chosen()
    ledger = work.ledger()
    todo = work.left(limits, ledger, chosen)
    n_labels = int((ledger.file[chosen] >= 0).sum())
    n_failed = len(chosen) - n_labels - len(todo)
    progress(n_labels, n_failed, len(chosen))
    if not todo:
        return
    if cluster is None:
        Pool(
            work, workers, limits, task.LOCAL,
            lambda labels, failures: progress(n_labels + labels, n_failed + failures, len(chosen)),
        ).run(todo)  # fmt: skip
        return
    executor, n_parts = cluster
    jobs = _jobs(work, n_parts, {index for index, _ in todo}, workers, limits)
    executor.run(jobs, lambda states: _report(states, progress, n_labels, n_failed, len(chosen), len(jobs)))


def _report(
    states: Mapping[str, State], progress: Progress, n_labels: int, n_failed: int, total: int, n_jobs: int
) -> None:
    """Show how far the tasks are; what each has done is in its log."""
    done = sum(state == "done" for state in states.values())
    progress(n_labels + (total - n_labels - n_failed) * done // n_jobs, n_failed, total)


def _jobs(work: Work, n_parts: int, left: set[int], workers: int, limits: Limits) -> Sequence[Job]:
    """Return a job for each part that has something left. Parts are made once: tasks of an earlier start may run."""
    parts = work.folder / "parts"
    if not parts.is_dir():
        _divide(work, n_parts)
    jobs = []
    for path in sorted(parts.glob("*.npy")):
        part = int(path.stem)
        if not left.isdisjoint(np.load(path).tolist()):
            command = [sys.executable, "-m", "mffm.label.task", str(work.folder), str(part), str(workers)]
            for name in ("seconds", "gigabytes"):
                if getattr(limits, name) is not None:
                    command += [f"--{name}", str(getattr(limits, name))]
            log = work.folder / "tasks" / task.prefix(part) / "rank-0.log"
            jobs.append(Job(task.prefix(part), command, log))
    return jobs


def _divide(work: Work, n_parts: int) -> None:
    """Deal the structures out, the largest first, so that no part has all of these."""
    chosen = work.chosen()
    order = chosen[np.argsort(-work.structures().n_atoms[chosen], kind="stable")]
    aside = work.folder / ".parts.partial"
    aside.mkdir(exist_ok=True)
    for part in range(min(n_parts, len(order))):
        np.save(aside / f"{part:05d}.npy", np.sort(order[part::n_parts]))
    aside.rename(work.folder / "parts")
