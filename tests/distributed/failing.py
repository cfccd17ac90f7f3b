"""mffm's command line with a fault in one step. Started by test_faults.py: failing.py KIND STEP mffm's arguments...

KIND: raise (rank 1), kill (rank 1, SIGKILL), input (all ranks, the same message), hang (rank 1).
"""

import os
import signal
import sys
import time

from mffm import cli
from mffm.errors import InputError
from mffm.training import loop

kind, fault_step = sys.argv[1], int(sys.argv[2])
train_step = loop.train_step


def failing_step(*arguments, **kwargs):
    plan = next(a for a in (*arguments, *kwargs.values()) if type(a).__name__ == "StepPlan")
    if plan.step == fault_step:
        if kind == "input":
            raise InputError("this step is bad input")
        if os.environ["RANK"] == "1":
            if kind == "raise":
                raise KeyError("the cause")
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(600)
    return train_step(*arguments, **kwargs)


loop.train_step = failing_step
sys.argv[1:3] = []
if __name__ == "__main__":
    cli.main()
