"""The model YAML of Matbench Discovery from what was run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mffm.config.base import read_yaml
from mffm.evaluate.benchmark.run import Finished, Outcome
from mffm.evaluate.benchmark.task import MATBENCH_DISCOVERY, Options
from mffm.evaluate.matbench_discovery import artefacts, wbm
from mffm.release import write_text

KAPPA_PROTOCOL = "phonondb-v1"
FILES = {"discovery": "discovery.csv.gz", "geo_opt": "geo-opt.jsonl.gz", "kappa_103": "phonons-kappa-103.json.gz"}


def write(folder: Path, outcomes: Sequence[Outcome], options: Options, submission: Path | None) -> Path | None:
    """Write ``model.yml`` where a task of the suite was run; return its path.

    Args:
        submission: YAML with the authors' part; what is missing is named in the file's first line.
    """
    done = [o for o in outcomes if isinstance(o, Finished) and o.task.suite == MATBENCH_DISCOVERY]
    metrics: dict[str, Any] = {}
    for outcome in done:
        for name, part in outcome.score.submission.items():
            if name == "phonons":  # one level deeper in the schema
                metrics[name] = {k: {**_with_files(k, outcome, folder), **v} for k, v in part.items()}
            else:
                metrics[name] = {**_with_files(name, outcome, folder), **part}
    if not metrics:
        return None
    evaluation = {
        **wbm.EVALUATION,
        "kappa": {"protocol": KAPPA_PROTOCOL, "displacement_distance": options.kappa_displacement},
    }
    text, _ = artefacts.model_yaml(read_yaml(submission) if submission else {}, metrics, evaluation)
    path = folder / "model.yml"
    write_text(path, text)
    return path


def _with_files(name: str, finished: Finished, folder: Path) -> Mapping[str, Any]:
    file = FILES.get(name)
    if file is None or not (finished.folder / file).is_file():
        return {}
    return {"pred_file": artefacts.file_entry(finished.folder / file, folder)}
