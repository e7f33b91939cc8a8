"""The conformance kit: all of it on a GPU, and in the interpreter the checks that do not take minutes there."""

from __future__ import annotations

import pytest
import torch
from adapters import names_of_checks

from maxattn.testing import check_backend
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
NAMES = names_of_checks(Triton(), DEVICE, frozenset() if DEVICE == "cuda" else SLOW_TO_INTERPRET)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("name", NAMES)
def test_conformance(name: str) -> None:
    report = check_backend(Triton(), device=DEVICE, examples=EXAMPLES, only=[name])
    assert report.passed, str(report)
