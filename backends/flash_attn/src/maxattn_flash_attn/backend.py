"""`flash_attn`, as maxattn sees it: which generation serves, and windows with the bias lifted into q and k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from maxattn.ops.contract import Backend, Capabilities, MeasuredSpeed, Problem, Reason
from maxattn.ops.windows import for_each_size, fused, positive_scale
from maxattn_flash_attn import generations, kernels
from maxattn_flash_attn.generations import ALL, FOUR, LARGEST_HEAD_DIM, MULTIPLE, PREFERRED, Generation
from maxattn_flash_attn.lift import SMALLEST_SCALE, lift

CAPABILITIES = Capabilities(
    devices=frozenset({"cuda"}),
    compute_capability=((8, 0), (12, 1)),
    dtypes=frozenset({torch.float16, torch.bfloat16}),
    head_dims=(MULTIPLE, LARGEST_HEAD_DIM),
    head_dim_multiple=MULTIPLE,
    export=False,
)
"""Of all generations together."""

NOT_MEASURED = 0.3
"""Below all that were, so that what was not is never chosen before."""
MEASURED = MeasuredSpeed(
    inference=((49, 0.63), (64, 0.39), (inf, 0.32)),
    training=((49, 0.41), (64, 0.42), (inf, 0.58)),
    inference_without_bias=((64, 0.78), (144, 1.15), (256, 0.84), (inf, 1.17)),
    training_without_bias=((49, 1.02), (64, 1.06), (144, 1.27), (256, 1.24), (inf, 1.41)),
)
"""On an NVIDIA H200 in bfloat16, flash-attn 4.0.0b36 (nvidia-cutlass-dsl 4.8.1), replayed from CUDA graphs."""


class Choice(NamedTuple):
    """The generation that serves a problem, and how many terms hold the bias: 0 where there is none."""

    generation: Generation
    terms: int


class FlashAttn(Backend):
    """Copies the windows out of the image, and calls flash-attn on them.

    A bias becomes further channels of q and k. It is held in two terms of the dtype where the head dim has room for
    them, else in one.
    """

    name = "flash_attn"

    @property
    def capabilities(self) -> Capabilities:  # type: ignore[override]
        """What only some generations have, only where one of them may be: always declined it would mislead."""
        numbers = [number for number, _ in generations.installed()]
        there = [one for one in ALL if one.number in numbers or not numbers]
        return replace(
            CAPABILITIES, dropout=any(one.dropout for one in there), compile=any(one.compile for one in there)
        )

    def generations(self, problem: Problem) -> list[Generation]:
        """The installed generations for the GPU of `problem`, as they are tried."""
        there = dict(generations.installed())
        major = generations.major_of(problem.compute_capability)
        return [one for one in PREFERRED.get(major, ()) if one.number in there]

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        answer = self._choose(problem)
        return () if isinstance(answer, Choice) else answer

    def relative_speed(self, problem: Problem) -> float:
        choice, on_hopper = self._choose(problem), generations.major_of(problem.compute_capability) == 9
        measured = isinstance(choice, Choice) and choice.generation is FOUR and on_hopper
        return MEASURED.of(problem) if measured else NOT_MEASURED

    def kernel(self, problem: Problem) -> str:
        choice = self._choose(problem)
        if not isinstance(choice, Choice):
            return ""
        generation, terms = choice
        dim = generation.head_dim(problem.head_dim + terms * problem.tokens, problem.compute_capability)
        of_bias = {0: "", 1: ", the bias in one term", 2: ", the bias in two terms"}[terms]
        return f"{generation.name}, head dim {dim}{of_bias}"

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        if bias is not None:  # the gradients of its corners are summed in this dtype
            bias = bias.to(torch.promote_types(problem.dtype, torch.float32))
        choice = self._choose(problem)
        assert isinstance(choice, Choice), choice  # else this backend would not have been called
        attend = partial(self._attend_windows, problem, choice)
        return for_each_size(qkv, bias, problem.window, problem.axis, attend)

    def flash(self, qkv: Tensor, scale: float, generation: Generation, problem: Problem) -> Tensor:
        """The kernel: attention within `qkv (windows, tokens, 3, heads, head_dim)`, without a bias; `scale` above 0."""
        return kernels.call(generation.number, qkv, scale, problem.dropout_p, problem.deterministic)

    def _attend_windows(self, problem: Problem, choice: Choice, qkv: Tensor, bias: Tensor | None) -> Tensor:
        return fused(qkv, bias, partial(self._lift_and_attend, problem, choice), compiling=problem.compiling)

    def _lift_and_attend(self, problem: Problem, choice: Choice, qkv: Tensor, bias: Tensor | None) -> Tensor:
        generation, terms = choice
        tokens, d = qkv.shape[1], problem.head_dim
        head_dim = generation.head_dim(d + terms * tokens, problem.compute_capability)
        assert head_dim is not None
        qkv, scale = positive_scale(qkv, problem.softmax_scale)
        if bias is not None:
            qkv = lift(qkv, bias, scale, head_dim, terms)
        elif head_dim > d:
            qkv = torch.nn.functional.pad(qkv, (0, head_dim - d))
        return self.flash(qkv, scale, generation, problem)[..., :d]

    def _choose(self, problem: Problem) -> Choice | list[Reason]:
        """The first generation that serves, with as many terms as fit; or why there is none."""
        candidates = self.generations(problem)
        if not candidates:
            return [self._not_installed()]
        if problem.bias is not None and 0 < abs(problem.softmax_scale) < SMALLEST_SCALE:
            told = f"a bias cannot be lifted into q and k that are scaled by {problem.softmax_scale:g}"
            return [Reason("scale", told, f"a scale from {SMALLEST_SCALE:.2g}, or no bias")]
        found: list[Reason] = []
        for generation in candidates:
            version = dict(generations.installed()).get(generation.number, "")
            if generations.older(version, generation.oldest):
                hint = f"from {generation.oldest[0]}.{generation.oldest[1]}"
                found.append(Reason("version", f"{generation.name} is installed in version {version}, too old", hint))
                continue
            for terms in (0,) if problem.bias is None else (2, 1):
                reasons = generation.reasons(problem, problem.head_dim + terms * problem.tokens)
                if not reasons:
                    return Choice(generation, terms)
            found += reasons
        return found

    def _not_installed(self) -> Reason:
        others = ", ".join(f"flash-attn {number}" for number, _ in generations.installed())
        told = f"installed for other GPUs only: {others}" if others else "flash-attn is not installed"
        return Reason("not_installed", told, "pip install flash-attn")
