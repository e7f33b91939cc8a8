"""A backend whose kernels are custom operators, for mutants in what a compiler is told about them."""

from __future__ import annotations

from typing import Any

import torch
from testing.mutants.steps import Explicit, Steps
from torch import Tensor

from maxattn import Backend, Capabilities, Problem

GROUPS = "str axis, SymInt P_h, SymInt P_w, float scale"


def problem_of(qkv: Tensor, axis: str, P_h: int, P_w: int, scale: float) -> Problem:
    B, H, W, _, h, d = qkv.shape
    return Problem(
        axis=axis, window=(P_h, P_w), batch=B, height=H, width=W, heads=h, head_dim=d, dtype=qkv.dtype, scale=scale
    )


class Operators(Backend):
    """Right: a forward and a backward operator, their fakes, and the formula that joins them. No dropout."""

    name = "operators"
    capabilities = Capabilities(dropout=False)

    def __init__(self) -> None:
        operator = f"maxattn_tests::{self.name}"
        self.operator = torch.library.custom_op(
            operator,
            self.forward,
            mutates_args=(),
            schema=f"(Tensor qkv, Tensor? bias, {GROUPS}) -> Tensor",
        )
        self.backward_operator = torch.library.custom_op(
            f"{operator}_backward",
            self.backward,
            mutates_args=(),
            schema=f"(Tensor grad_out, Tensor qkv, Tensor? bias, {GROUPS}) -> (Tensor, Tensor)",
        )
        self.register()

    def register(self) -> None:
        self.operator.register_fake(self.fake)
        self.backward_operator.register_fake(self.backward_fake)
        self.operator.register_autograd(self.formula, setup_context=self.keep)

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return self.operator(qkv, bias, problem.axis, *problem.window, problem.softmax_scale)

    def forward(self, qkv: Tensor, bias: Tensor | None, *groups: Any) -> Tensor:
        return Steps().attend(qkv, bias, problem_of(qkv, *groups))

    def fake(self, qkv: Tensor, bias: Tensor | None, *groups: Any) -> Tensor:
        B, H, W, _, h, d = qkv.shape
        return qkv.new_empty(B, H, W, h, d)

    def backward(self, grad_out: Tensor, qkv: Tensor, bias: Tensor | None, *groups: Any) -> tuple[Tensor, Tensor]:
        grad_qkv, grad_bias = Explicit().gradients(qkv, bias, None, grad_out, problem_of(qkv, *groups))
        return grad_qkv.contiguous(), qkv.new_empty(0) if grad_bias is None else grad_bias

    def backward_fake(self, grad_out: Tensor, qkv: Tensor, bias: Tensor | None, *groups: Any) -> tuple[Tensor, Tensor]:
        grad_bias = qkv.new_empty(0) if bias is None else bias.new_empty(bias.shape)
        return qkv.new_empty(qkv.shape), grad_bias

    def keep(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        qkv, bias, *ctx.groups = inputs
        ctx.save_for_backward(qkv, bias)

    def formula(self, ctx: Any, grad_out: Tensor) -> tuple[Any, ...]:
        qkv, bias = ctx.saved_tensors
        with torch.autocast(grad_out.device.type, enabled=False):
            grad_qkv, grad_bias = self.backward_operator(grad_out, qkv, bias, *ctx.groups)
        return grad_qkv, None if bias is None else grad_bias, None, None, None, None
