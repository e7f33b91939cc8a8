"""`flex`, as maxattn sees it: windows through FlexAttention, with the bias as a tensor that its score_mod captures."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from math import inf

import torch
from torch import Tensor

from maxattn.ops.contract import Backend, Capabilities, MeasuredSpeed, Problem, Reason
from maxattn.ops.windows import for_each_size, fused

MEASURED = MeasuredSpeed(
    inference=((49, 1.6), (64, 1.4), (144, 1.15), (inf, 0.8)),
    training=((49, 0.55), (64, 1.05), (inf, 1.2)),
    inference_without_bias=((49, 1.35), (64, 1.2), (144, 0.97), (inf, 0.65)),
    training_without_bias=((64, 1.4), (144, 1.1), (256, 0.94), (inf, 0.8)),
)
"""On an NVIDIA H200 in bfloat16, once compiled, replayed from CUDA graphs."""

LARGEST_HEAD_DIM_IN_FP32 = 128
"""On a GPU: PyTorch's tiles for wider ones are larger than the shared memory of an H200."""


class Flex(Backend):
    """Copies the windows out of the image, and calls one compiled kernel on all that are of one size."""

    name = "flex"
    capabilities = Capabilities(
        devices=frozenset({"cpu", "cuda"}),
        compute_capability=((8, 0), None),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        head_dims=(16, 256),
        dropout=False,
        export=False,
    )
    trains_on = frozenset({"cuda"})

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        found = self.missing(problem.device)
        if problem.differentiated and problem.device not in self.trains_on:
            told = f"FlexAttention has no backward pass on {problem.device}"
            found.append(Reason("backward", told, f"no gradient, or {', '.join(sorted(self.trains_on))}"))
        if (problem.device, problem.dtype) == ("cuda", torch.float32) and problem.head_dim > LARGEST_HEAD_DIM_IN_FP32:
            told = f"FlexAttention has no tiles for head dim {problem.head_dim} in fp32"
            found.append(Reason("head_dim", told, f"up to {LARGEST_HEAD_DIM_IN_FP32} in fp32, or 16 bits"))
        if problem.deterministic and problem.bias_requires_grad:
            told = "the gradient of the bias is added up in no fixed order"
            found.append(Reason("deterministic", told, "a bias without a gradient"))
        if problem.compiling and problem.bias_requires_grad:
            told = "in a graph that torch.compile does not generate code for, the gradient of the bias is lost"
            found.append(Reason("compile", told, "call it outside of torch.compile, which it does by itself"))
        return found

    def relative_speed(self, problem: Problem) -> float:
        if problem.device != "cuda" or problem.dtype == torch.float32:
            return 0.9  # not measured: never chosen before `sdpa`
        return MEASURED.of(problem)

    def missing(self, device: str) -> list[Reason]:
        """Why PyTorch cannot compile for such a device here at all; empty if it can."""
        if device == "cuda":
            hint = "pip install triton"
            return [] if find_spec("triton") else [Reason("not_installed", "triton is not installed", hint)]
        if not compiles_for_cpu():
            told = "PyTorch compiles FlexAttention for no CPU but those with AVX2, on Linux"
            return [Reason("device", told, "another backend, or cuda")]
        compiler = os.environ.get("CXX", "g++")
        if shutil.which(compiler) is None:
            told = f"PyTorch compiles for a CPU by {compiler}, which is not installed"
            return [Reason("not_installed", told, "install it, or name another in CXX")]
        return []

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        bias = None if bias is None else bias.float()
        return for_each_size(qkv, bias, problem.window, problem.axis, partial(self._attend_windows, problem))

    def _attend_windows(self, problem: Problem, qkv: Tensor, bias: Tensor | None) -> Tensor:
        return fused(qkv, bias, partial(self._attend_some, problem), compiling=problem.compiling)

    def _attend_some(self, problem: Problem, qkv: Tensor, bias: Tensor | None) -> Tensor:
        from maxattn_flex import compiled

        if torch.compiler.is_dynamo_compiling():
            q, k, v = qkv.transpose(1, 3).unbind(2)
            if problem.device == "cpu":  # PyTorch before 2.13 compiles no views of one tensor there (pytorch#157612)
                q, k, v = q.clone(), k.clone(), v.clone()
            return compiled.flex_attention(q, k, v, bias, problem.softmax_scale).transpose(1, 2)
        tokens = qkv.shape[1] if qkv.shape[1] == problem.tokens else None
        family = compiled.Family(
            tokens=tokens,
            heads=problem.heads,
            head_dim=problem.head_dim,
            dtype=problem.dtype,
            device=qkv.device,
            bias=bias is not None,
            requires_grad=problem.requires_grad,
            bias_requires_grad=problem.bias_requires_grad,
            scale=problem.softmax_scale,
            inference=torch.is_inference_mode_enabled(),
        )
        return compiled.attend(family, qkv, bias)


def compiles_for_cpu() -> bool:
    """Whether PyTorch's compiler has FlexAttention for this CPU."""
    return sys.platform == "linux" and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
