"""How PyTorch takes a GPU's memory, in a command that trains."""

from __future__ import annotations

import os
import sys

import torch

SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def let_segments_grow() -> None:
    """For this process, which has not used its NVIDIA GPU yet; unless the environment has such settings.

    Segments of fixed sizes leave much idle between tensors. PyTorch can have others on Linux.
    """
    able = sys.platform == "linux" and torch.version.cuda is not None
    if able and not any(name in os.environ for name in SETTINGS):
        os.environ[SETTINGS[0]] = "expandable_segments:True"
