"""Which backends compute the attention of a network that is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from maxattn.network_problems import network_problems
from maxattn.ops.contract import Problem
from maxattn.ops.dispatch import compute_capability
from maxattn.ops.max_sa import explain
from maxattn.spec import MaxViTSpec, pair

Asked = tuple[Problem, str | None]
"""What an attention layer asks for, and of which backend if it names one."""


def attention_problems(
    spec: MaxViTSpec, batch: int, dtype: torch.dtype, device: str, *, training: bool = False
) -> list[Asked]:
    """What each attention layer of a network will ask for.

    Weights in training are in fp32, and `dtype` is autocast's.
    """
    capability, bias = compute_capability(torch.device(device)), torch.float32 if training else dtype
    here: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "compute_capability": capability,
        "requires_grad": training,
    }
    found: list[Asked] = []
    for _, dropout, problem in network_problems(spec, batch, pair(spec.img_size)):
        biased: dict[str, Any] = {} if problem.bias is None else {"bias": bias, "bias_requires_grad": training}
        found.append((replace(problem, dropout_p=dropout if training else 0.0, **here, **biased), spec.backend))
    return found


def attention_backends(problems: Sequence[Asked], *, compiling: bool = False) -> str:
    """The backends that are chosen for them, in their order.

    Example:
        >>> import maxattn
        >>> attention_backends(attention_problems(maxattn.load_spec("nano"), 1, torch.float32, "cpu"))
        'sdpa'
    """
    asked = [explain(replace(problem, compiling=compiling), backend=backend) for problem, backend in problems]
    return ", ".join(dict.fromkeys(explanation.backend or "none" for explanation in asked))
