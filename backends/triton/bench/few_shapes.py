"""Every kernel once, forward and backward, on small problems: for a tool that watches memory accesses.

compute-sanitizer --tool memcheck python backends/triton/bench/few_shapes.py
compute-sanitizer --tool racecheck python backends/triton/bench/few_shapes.py
"""

from __future__ import annotations

import torch

import maxattn

PROBLEMS = (
    (14, 7, 32, torch.bfloat16),
    (16, 7, 24, torch.float16),
    (24, 12, 32, torch.bfloat16),
    (20, 18, 32, torch.float16),
    (40, 17, 32, torch.bfloat16),
    (112, 28, 32, torch.bfloat16),
    (10, 9, 64, torch.bfloat16),
    (9, 7, 80, torch.float16),
    (15, 7, 32, torch.float32),
)
"""Side of the image, window, head dim, dtype. Windows of 28 are enough for two side by side."""


def main() -> None:
    for size, window, head_dim, dtype in PROBLEMS:
        for axis in ("block", "grid"):
            for dropout_p in (0.0, 0.2):
                qkv = torch.randn(2, size, size, 3, 2, head_dim, device="cuda", dtype=dtype, requires_grad=True)
                bias = torch.randn(2, window**2, window**2, device="cuda", requires_grad=True)
                out = maxattn.max_sa(qkv, axis, window, bias, dropout_p=dropout_p, backend="triton")
                out.backward(torch.ones_like(out))
                torch.cuda.synchronize()
        print(f"{size} x {size}, window {window}, head dim {head_dim}, {dtype}: done")


if __name__ == "__main__":
    main()
