"""Measure Max-SA on this GPU beside the bandwidth floor and the other backends; write JSON and a table.

    python backends/triton/bench/speed.py --out DIRECTORY

Floors count each element once: forward 4 B H W C, forward and backward 12 B H W C, at the bandwidth of a large copy
measured in the same run. Calls are replayed from a CUDA graph, so the time of Python is not in the numbers; the last
column is the same training call without one. The cache is cleared before each call.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

import maxattn

SHAPES = (
    (256, 56, 64, 7),
    (256, 28, 128, 7),
    (256, 14, 256, 7),
    (256, 7, 512, 7),
    (128, 64, 64, 8),
    (64, 96, 64, 12),
    (64, 64, 64, 16),
    (32, 112, 64, 28),
)
HEAD_DIM = 32


def microseconds(call: Callable[[], object], repeats: int = 30) -> float:
    """The median time of a call on the GPU, with a cold cache."""
    cache = torch.empty(2**26, dtype=torch.int32, device="cuda")
    for _ in range(3):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        cache.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) * 1e3


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as the replay of a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(shape: tuple[int, int, int, int], axis: str, backend: str) -> dict[str, float]:
    """Microseconds of the forward pass, and of both passes from a graph and without one; and MiB of one training."""
    B, size, C, window = shape
    heads = C // HEAD_DIM
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(B, size, size, 3, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=generator)
    bias = torch.randn(heads, window**2, window**2, device="cuda", generator=generator)
    gradient = torch.randn(B, size, size, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=generator)

    def infer() -> None:
        with torch.no_grad():
            maxattn.max_sa(qkv, axis, window, bias, backend=backend)

    def train() -> None:
        leaves = qkv.detach().requires_grad_(), bias.detach().requires_grad_()
        out = maxattn.max_sa(leaves[0], axis, window, leaves[1], backend=backend)
        torch.autograd.grad(out, leaves, gradient)

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    train()
    mebibytes = (torch.cuda.max_memory_allocated() - before) / 2**20
    return {
        "forward": microseconds(captured(infer)),
        "training": microseconds(captured(train)),
        "training without a graph": microseconds(train),
        "MiB": mebibytes,
    }


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of a copy of 1 GiB."""
    source = torch.ones(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda: target.copy_(source))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backends", default="triton,sdpa")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    rows = []
    for shape in SHAPES:
        floor = shape[0] * shape[1] ** 2 * shape[2] * 2 * 4 / bandwidth
        for axis in ("block", "grid"):
            for backend in arguments.backends.split(","):
                row = {"shape": shape, "axis": axis, "backend": backend, "floor": floor}
                try:
                    row |= measure(shape, axis, backend)
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    row["error"] = str(error).splitlines()[0]
                rows.append(row)
                print(row, flush=True)
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "bytes a microsecond": bandwidth}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "speed.json").write_text(json.dumps({**facts, "rows": rows}, indent=1))
    lines = [
        f"{facts['device']}, torch {facts['torch']}, bfloat16; microseconds, and multiples of the floor",
        "",
        "| B, H = W, C, window | axis | backend | forward | x floor | training | x floor | without a graph | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [", ".join(map(str, row["shape"])), row["axis"], row["backend"]]
        if "error" in row:
            cells += [row["error"]] + [""] * 5
        else:
            forward, training, floor = row["forward"], row["training"], row["floor"]
            cells += [f"{forward:.0f}", f"{forward / floor:.2f}", f"{training:.0f}", f"{training / floor / 3:.2f}"]
            cells += [f"{row['training without a graph']:.0f}", f"{row['MiB']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    (arguments.out / "speed.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
