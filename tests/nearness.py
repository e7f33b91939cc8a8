"""How near to exact a result must be, given how near the specification comes in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_near(actual: Tensor, same: Tensor, exact: Tensor, dtype: torch.dtype, added: Tensor | None = None) -> None:
    """At most twice the error of `same`, and a rounding of `dtype`, in the 2-norm.

    `added` is the size of what is added up in fp32: where it cancels, a result is small beside its roundings.
    """
    allowed = 2 * (same.double() - exact).norm() + torch.finfo(dtype).eps * exact.norm()
    if added is not None:
        allowed += torch.finfo(torch.float32).eps * added.norm()
    assert (actual.double() - exact).norm() <= allowed
