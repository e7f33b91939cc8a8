r"""The kernels whose counters the README tells, each twice (the first call compiles), for a tool that reads them.

OF=dram__throughput,lts__throughput,lts__t_tag_requests,l1tex__throughput,sm__inst_issued,sm__warps_active
ncu --clock-control none --csv --page raw -k 'regex:^(forward|backward)$' \
    --metrics "${OF//,/.avg.pct_of_peak_sustained_elapsed,}.avg.pct_of_peak_sustained_elapsed" \
    python backends/triton/bench/counted.py
"""

from __future__ import annotations

import torch

import maxattn

SHAPES = ((256, 56, 64, 7), (256, 28, 128, 7), (256, 14, 256, 7), (256, 7, 512, 7), (64, 96, 64, 12), (32, 112, 64, 28))
"""Images, pixels of a side, channels, tokens of a window's side."""
HEAD_DIM = 32


def main() -> None:
    for B, size, width, window in SHAPES:
        heads = width // HEAD_DIM
        qkv, out = (
            torch.randn(B, size, size, *parts, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
            for parts in ((3, heads), (heads,))
        )
        bias = torch.randn(heads, window**2, window**2, device="cuda").requires_grad_()
        for _ in range(2):
            maxattn.max_sa(qkv.requires_grad_(), "block", window, bias, backend="triton").backward(out)
        torch.cuda.synchronize()
        print(f"{B} x {size} x {size}, {width} channels, window {window}: done")


if __name__ == "__main__":
    main()
