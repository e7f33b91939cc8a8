"""Print which arguments each kernel writes, as PyTorch's compiler sees it: it reads the kernel's intermediate code.

A compiler that takes an input for written copies it, or refuses. Needs no GPU: the code is made for one, not run.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from maxattn_triton.kernels import columns, rows, tiles, whole

KERNELS = (
    rows.forward,
    rows.backward,
    columns.backward,
    whole.backward,
    tiles.forward,
    tiles.backward_queries,
    tiles.backward_keys,
    tiles.backward_bias,
)
CONSTANTS = {
    "GRID": True, "P_H": 5, "P_W": 3, "D": 16, "BLOCK_D": 16, "BLOCK_M": 16, "BLOCK_N": 16, "REST": 0, "NP": 128,
    "HAS_BIAS": True, "BIAS_GRADIENT": True, "RAGGED": False, "DROPOUT": False, "SAVE_LSE": True, "SHARING": 2,
    "PRECISION": "tf32",
}  # fmt: skip
TENSORS = {"qkv", "bias", "out", "lse", "seed", "dout", "dqkv", "delta", "dbias"}


class Hopper:
    """The one fact that making code needs of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0


def written(kernel: Any) -> list[str]:
    """The arguments that the compiler takes for written."""
    half, wide = (torch.empty(4, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    arguments = {
        name: (wide if name in {"lse", "delta", "dbias"} else half)
        if name in TENSORS
        else CONSTANTS.get(name, 0.25 if name in {"scale", "dropout_p"} else 16)
        for name in kernel.arg_names
    }
    if hasattr(triton_kernel_wrap, "identify_accessed_tensors"):
        accessed = triton_kernel_wrap.identify_accessed_tensors(kernel, arguments, {})
        return sorted(dependency.name for dependency in accessed.read_writes.writes)
    return sorted(triton_kernel_wrap.identify_mutated_tensors(kernel, arguments, {}))


if __name__ == "__main__":
    driver.set_active(Hopper())
    with FakeTensorMode():
        print(json.dumps({f"{one.__module__.split('.')[-1]}.{one.__name__}": written(one) for one in KERNELS}))
