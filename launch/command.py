"""``python -m MODULE ARGUMENTS`` on every rank of a job, for work that is not a training run."""

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.task import ending, prepare_child, rank_environment

LAST_LINES = 20


class Command:
    """The callable that submitit pickles; ranks find each other as in a training."""

    def __init__(
        self, module: str, arguments: Sequence[str], folder: str, threads: int, environment: Mapping[str, str]
    ):
        self.module = module
        self.arguments = list(arguments)
        self.folder = folder
        self.threads = threads
        self.environment = dict(environment)

    def __call__(self) -> str:
        """Run the module as one rank. Its output goes to ``rank-<r>.log``; ``.done`` or ``.failed`` says how it ended.

        Raises:
            RuntimeError: the module did not end with exit code 0; the message has its last lines.
            SystemExit: asked to stop; submitit would ignore SIGTERM.
        """
        import submitit

        task = submitit.JobEnvironment()
        path = Path(self.folder) / f"rank-{task.global_rank}.log"
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        with path.open("wb") as log:
            done = subprocess.run(
                [sys.executable, "-m", self.module, *self.arguments],
                env={**rank_environment(task, self.threads), **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=prepare_child,
            )
        path.with_suffix(".failed" if done.returncode else ".done").touch()
        if done.returncode != 0:
            last = path.read_text(errors="replace").splitlines()[-LAST_LINES:]
            raise RuntimeError(
                f"rank {task.global_rank}: python -m {self.module}: {ending(done.returncode)}\n" + "\n".join(last)
            )
        return self.folder
