"""Tests of the GPU's kernels need a GPU, or a process of their own in Triton's interpreter: it must be on before triton
is imported, and other tests import triton as users do."""

from __future__ import annotations

import os

import torch

collect_ignore = [] if torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") else ["gpu"]
