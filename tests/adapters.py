"""What the tests of backends have in common: a problem of a GPU, and the kit's checks by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import maxattn.testing.checks  # noqa: F401 - registers them
from maxattn.ops.contract import Backend, Problem
from maxattn.testing.registry import CHECKS
from maxattn.testing.runner import subject_of

HOPPER = Problem(
    axis="block",
    window=(7, 7),
    batch=1,
    height=14,
    width=14,
    heads=2,
    head_dim=32,
    dtype=torch.bfloat16,
    device="cuda",
    compute_capability=(9, 0),
    bias=torch.float32,
    requires_grad=True,
    bias_requires_grad=True,
)


ON_A_GPU = pytest.mark.timeout(3600)
"""There compilers make kernels for every head dim and dtype."""


def names_of_checks(backend: Backend, device: str, left_out: frozenset[str] = frozenset()) -> list[Any]:
    """The checks that apply to `backend`, but for those in `left_out`, as values of a parameter."""
    subject = subject_of(backend, device, examples=1, seed=0)
    names = [name for name, check in CHECKS.items() if not check.not_applicable(subject) and name not in left_out]
    return [pytest.param(name, marks=ON_A_GPU) for name in names] if device == "cuda" else names
