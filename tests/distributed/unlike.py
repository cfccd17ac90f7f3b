"""mffm's command line with a rank 1 of another version whose sums are wrong. Started by test_preflight.py."""

import os

import torch.distributed as dist

from mffm import cli
from mffm.training import preflight

if os.environ["RANK"] == "1":
    all_reduce = dist.all_reduce

    def wrong(tensor, *arguments, **kwargs):
        all_reduce(tensor, *arguments, **kwargs)
        tensor[-1] += 1

    dist.all_reduce = wrong
    preflight.__version__ = "0.0.9"

cli.main()
