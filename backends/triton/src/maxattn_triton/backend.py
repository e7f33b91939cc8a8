"""`triton`, as maxattn sees it: what it can do, and the call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from maxattn.ops.contract import Axis, Backend, Capabilities, MeasuredSpeed, Problem, Reason

LARGEST_WINDOW = 4096
MEASURED: dict[Axis, MeasuredSpeed] = {
    "block": MeasuredSpeed(
        inference=((64, 10.0), (144, 6.8), (256, 3.4), (LARGEST_WINDOW, 2.0)),
        training=((64, 8.0), (144, 7.9), (256, 3.9), (LARGEST_WINDOW, 3.1)),
        inference_without_bias=((64, 7.5), (144, 4.8), (256, 3.1), (LARGEST_WINDOW, 1.4)),
        training_without_bias=((64, 11.0), (144, 5.1), (256, 3.4), (LARGEST_WINDOW, 1.5)),
    ),
    "grid": MeasuredSpeed(
        inference=((64, 10.0), (144, 7.2), (256, 4.0), (LARGEST_WINDOW, 2.1)),
        training=((64, 8.0), (144, 7.8), (256, 4.0), (LARGEST_WINDOW, 3.2)),
        inference_without_bias=((64, 7.5), (144, 5.3), (256, 3.6), (LARGEST_WINDOW, 1.25)),
        training_without_bias=((64, 11.0), (144, 5.3), (256, 3.5), (LARGEST_WINDOW, 1.3)),
    ),
}
"""On an NVIDIA H200 in bfloat16, replayed from CUDA graphs; images of one window are less."""


class Triton(Backend):
    """Windows are read and written in place through strides: no partition, no padding, no N x N tensor in memory.

    On the CPU it runs in Triton's interpreter only, which is there to test the kernels and is never chosen by itself.
    """

    name = "triton"
    capabilities = Capabilities(
        devices=frozenset({"cuda", "cpu"}),
        compute_capability=((8, 0), None),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32}),
        head_dims=(1, 128),
        window_tokens=(1, LARGEST_WINDOW),
    )

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        if find_spec("triton") is None:
            return [Reason("not_installed", "triton is not installed", "pip install triton")]
        if problem.device == "cpu" and not interpreting():
            hint = "set TRITON_INTERPRET=1 before Python starts to test the kernels on a CPU"
            return [Reason("interpreter", "Triton runs on a CPU only in its interpreter, which is off", hint)]
        return ()

    def relative_speed(self, problem: Problem) -> float:
        if problem.device == "cpu" or interpreting():
            return 1e-4
        if problem.dtype == torch.float32:
            return 0.9  # not measured: exact products of fp32 do without tensor cores
        return MEASURED[problem.axis].of(problem)

    def kernel(self, problem: Problem) -> str:
        from maxattn_triton import configs

        size = problem.tokens, problem.head_dim, problem.dtype.itemsize
        forward, backward = configs.forward_kernel(*size), configs.backward_kernel(*size)
        return f"{forward}, {backward} backward" if problem.differentiated else forward

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        from maxattn_triton import ops

        return ops.max_sa(qkv, bias, problem)


def interpreting() -> bool:
    """Whether Triton was told to interpret kernels; it reads this when it is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
