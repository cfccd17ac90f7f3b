"""Training on DeepSpeed."""

import os

import torch

# Told beforehand, DeepSpeed does not look for an accelerator and warn that it found none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
