"""Measure Max-SA on this GPU beside the bandwidth floor and the other backends; write JSON and a table.

    python backends/triton/bench/speed.py --out DIRECTORY

Floors count each element once: forward 4 B H W C, forward and backward 12 B H W C, at the bandwidth of a large copy
measured in the same run. The backend `copy` copies as many bytes as the forward pass of a kernel must move: what a
launch and a problem of this size cost at least. Calls are replayed from a CUDA graph, so the time of Python is not in
the numbers; the last column but one is the same training call without one. The cache is cleared before each call.
`naive+compile` is the specification under `torch.compile`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import maxattn
from maxattn.ops.contract import Axis

SHAPES = (
    (256, 56, 64, 7),
    (256, 28, 128, 7),
    (256, 14, 256, 7),
    (256, 7, 512, 7),
    (128, 64, 64, 8),
    (64, 96, 64, 12),
    (64, 56, 64, 14),
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


def measure(shape: tuple[int, int, int, int], axis: Axis, backend: str) -> dict[str, float]:
    """Microseconds of the forward pass, and of both passes from a graph and without one; and MiB of one training."""
    B, size, C, window = shape
    heads = C // HEAD_DIM
    if backend == "copy":
        source = torch.ones(2 * B * size**2 * C, dtype=torch.bfloat16, device="cuda")
        target = torch.empty_like(source)
        return {"forward": microseconds(captured(lambda: target.copy_(source)))}
    name, _, compiled = backend.partition("+")
    max_sa: Callable[..., Tensor] = partial(maxattn.max_sa, backend=name)
    if compiled:
        torch.compiler.reset()
        max_sa = torch.compile(max_sa, dynamic=False, fullgraph=True)
    generator = torch.Generator("cuda").manual_seed(0)
    qkv = torch.randn(B, size, size, 3, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=generator)
    bias = torch.randn(heads, window**2, window**2, device="cuda", generator=generator)
    gradient = torch.randn(B, size, size, heads, HEAD_DIM, device="cuda", dtype=torch.bfloat16, generator=generator)

    def infer() -> None:
        with torch.no_grad():
            max_sa(qkv, axis, window, bias)

    def train() -> None:
        leaves = qkv.detach().requires_grad_(), bias.detach().requires_grad_()
        out = max_sa(leaves[0], axis, window, leaves[1])
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


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = [", ".join(map(str, row["shape"])), row["axis"], row["backend"]]
    if "error" in row:
        return f"| {' | '.join([*cells, row['error'], *[''] * 5])} |"
    cells += [f"{row['forward']:.0f}", f"{row['forward'] / row['floor']:.2f}"]
    if "training" in row:
        cells += [f"{row['training']:.0f}", f"{row['training'] / row['floor'] / 3:.2f}"]
        cells += [f"{row['training without a graph']:.0f}", f"{row['MiB']:.0f}"]
    else:
        cells += [""] * 4
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--backends", default="copy,triton,sdpa,naive+compile,flex")
    parser.add_argument("--only", type=int, nargs="*", default=range(len(SHAPES)), help="which of the shapes, from 0")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    rows = []
    for shape in (SHAPES[i] for i in arguments.only):
        floor = shape[0] * shape[1] ** 2 * shape[2] * 2 * 4 / bandwidth
        for axis in get_args(Axis):
            for backend in arguments.backends.split(","):
                row: dict[str, Any] = {"shape": shape, "axis": axis, "backend": backend, "floor": floor}
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
        f"{facts['device']}, torch {facts['torch']}, bfloat16, bias in float32; microseconds, multiples of the floor",
        "",
        "| B, H = W, C, window | axis | backend | forward | x floor | training | x floor | without a graph | MiB |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(line, rows),
    ]
    (arguments.out / "speed.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
