"""The conformance kit: all of it on a GPU, and in the interpreter the checks that do not take minutes there."""

from __future__ import annotations

import pytest
import torch

import maxattn.testing.checks  # noqa: F401 - registers them
from maxattn.testing import check_backend
from maxattn.testing.registry import CHECKS
from maxattn.testing.runner import subject_of
from maxattn_triton import Triton

DEVICE, EXAMPLES = ("cuda", 50) if torch.cuda.is_available() else ("cpu", 3)
SLOW_TO_INTERPRET = frozenset(
    [
        "narrow",
        "heads",
        "layouts",
        "bias_sum",
        "values",
        "independent_calls",
        "own_memory",
        "threads",
        "repeatable",
        "bitwise",
        "many_windows",
        "windows",
        "compiled",
        "generated",
        "exported",
        "without_gradient",
        "dropout_seed",
        "dropout_gradient",
    ]
)
SUBJECT = subject_of(Triton(), DEVICE, EXAMPLES, seed=0)
NAMES = [
    name
    for name, check in CHECKS.items()
    if not check.not_applicable(SUBJECT) and (DEVICE == "cuda" or name not in SLOW_TO_INTERPRET)
]


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.timeout(3600)  # on a GPU: kernels of every head dim and dtype are compiled
@pytest.mark.parametrize("name", NAMES)
def test_conformance(name: str) -> None:
    report = check_backend(Triton(), device=DEVICE, examples=EXAMPLES, only=[name])
    assert report.passed, str(report)
