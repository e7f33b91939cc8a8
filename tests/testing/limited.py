"""Backends that are right for what they declare, which is not everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from testing.mutants.base import EAGER
from testing.mutants.steps import Explicit
from torch import Tensor

from maxattn import Backend, Capabilities, Problem, Reason
from maxattn.ops.naive import Naive
from maxattn.ops.sdpa import Sdpa


class AnyOrder(Explicit):
    """Sums over keys and over windows run in an order that differs from call to call, and it says so."""

    name = "any_order"
    capabilities = Capabilities(deterministic=False, **EAGER)

    def values(self, weights: Tensor, v: Tensor, problem: Problem) -> Tensor:
        order = self.order(v.shape[-2], problem)
        return weights[..., order] @ v[..., order, :]

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        flat = grad_logits.flatten(0, 1)
        return flat[self.order(len(flat), problem)].sum(0)

    def order(self, n: int, problem: Problem) -> Tensor:
        generator = torch.Generator()
        generator.seed()
        return torch.randperm(n, generator=generator)


class AnyOrderUnlessAsked(AnyOrder):
    """As above, but in a fixed order where torch.use_deterministic_algorithms(True) asks for one."""

    name = "any_order_unless_asked"
    capabilities = Capabilities(**EAGER)

    def order(self, n: int, problem: Problem) -> Tensor:
        return torch.arange(n) if problem.deterministic else super().order(n, problem)


class Declining(Naive):
    """`naive` that declines, by `unsupported` alone, what a condition of its own excludes."""

    capabilities = Capabilities(**EAGER)

    def __init__(self, name: str, declines: Callable[[Problem], bool]) -> None:
        self.name, self._declines = name, declines

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        return [Reason(self.name, f"it serves {self.name} alone", "another problem")] if self._declines(problem) else ()


class GradientsElsewhere(Naive):
    """`naive` with gradients on GPUs alone."""

    name = "gradients_elsewhere"
    capabilities = Capabilities(**{**EAGER, "devices": frozenset({"cpu", "cuda"})})

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        if problem.device == "cuda" or not problem.differentiated:
            return ()
        return [Reason("backward", f"no gradients on {problem.device}", "cuda")]


class OneDtype(Naive):
    """`naive` for a bias of the same dtype as qkv."""

    name = "one_dtype"
    capabilities = Capabilities(**EAGER)

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        if problem.bias in (None, problem.dtype):
            return ()
        return [Reason("bias_dtype", f"a {problem.bias} bias beside {problem.dtype}", "cast the bias")]


class SmallProblems(Sdpa):
    """`sdpa` with a condition of its own, on the sum of two facts."""

    name = "small_problems"
    capabilities = Capabilities(**EAGER)

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        if problem.tokens + problem.head_dim <= 256:
            return super().unsupported(problem)
        return [Reason("shared_memory", "tokens and head_dim exceed 256 together", "a smaller window")]


class Limited(Sdpa):
    """`sdpa` without a compiler, that raises for what it does not declare."""

    def __init__(self, name: str, **facts: Any) -> None:
        self.name = name
        self.capabilities = Capabilities(**facts, **EAGER)

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        reasons = self.capabilities.unsupported(problem)
        assert not reasons, f"called for what it does not declare: {reasons}"
        return super().attend(qkv, bias, problem)


LIMITED: list[Backend] = [
    AnyOrder(),
    AnyOrderUnlessAsked(),
    Declining("square_blocks", lambda problem: problem.axis == "grid" or problem.window[0] != problem.window[1]),
    Declining("grids_of_four_heads", lambda problem: problem.axis == "block" or problem.heads % 4 > 0),
    Declining("sides_by_eight", lambda problem: (problem.width or 8) % 8 > 0 or (problem.height or 8) % 8 > 0),
    Declining("windows_of_up_to_15_tokens", lambda problem: problem.tokens > 15),
    GradientsElsewhere(),
    OneDtype(),
    SmallProblems(),
    Limited("without_bias", bias=False, bias_gradient=False),
    Limited("frozen_bias", bias_gradient=False, dtypes=frozenset({torch.float16, torch.bfloat16})),
    Limited("tensor_cores", head_dims=(16, 128), head_dim_multiple=8, bias_dtypes=frozenset({torch.float32})),
    Limited("full_windows", ragged=False, dtypes=frozenset({torch.float32})),
    Limited("inference", backward=False, bias_gradient=False),
    Limited("seven_by_seven", window_tokens=(49, 49)),
    Limited(
        "one_network",
        window_tokens=(49, 49),
        head_dims=(32, 32),
        dtypes=frozenset({torch.bfloat16}),
        bias_dtypes=frozenset({torch.float32}),
        dropout=False,
        deterministic=False,
        ragged=False,
    ),
]
