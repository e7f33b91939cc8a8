"""Errors of Max-SA against fp64 on this GPU: `triton` beside `naive` and `sdpa`; write JSON and a table.

    python backends/triton/bench/errors.py --out DIRECTORY

An error is the largest deviation from `naive` in fp64 over the largest number there: of the output, and of the
gradients of qkv and of the bias. Inputs are normal; the bias has a standard deviation of 1 and is in fp32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

import maxattn
from maxattn.ops.contract import Axis, dtype_name

SHAPES = ((8, 56, 7), (4, 30, 7), (4, 48, 12), (2, 64, 16), (1, 112, 28))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BACKENDS = ("naive", "sdpa", "triton")
HEADS, HEAD_DIM = 2, 32


def results(backend: str, axis: Axis, window: int, *inputs: Tensor) -> dict[str, Tensor]:
    """The output and the gradients, in fp64."""
    qkv, bias, gradient = (tensor.detach().clone() for tensor in inputs)
    qkv.requires_grad_()
    bias.requires_grad_()
    out = maxattn.max_sa(qkv, axis, window, bias, backend=backend)
    dqkv, dbias = torch.autograd.grad(out, (qkv, bias), gradient)
    return {"out": out.detach().double(), "dqkv": dqkv.double(), "dbias": dbias.double()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    generator = torch.Generator("cuda").manual_seed(0)
    rows: list[dict[str, Any]] = []
    for B, size, window in SHAPES:
        qkv = torch.randn(B, size, size, 3, HEADS, HEAD_DIM, device="cuda", generator=generator, dtype=torch.float64)
        bias = torch.randn(HEADS, window**2, window**2, device="cuda", generator=generator)
        gradient = torch.randn(B, size, size, HEADS, HEAD_DIM, device="cuda", generator=generator, dtype=torch.float64)
        for dtype in DTYPES:
            rounded = qkv.to(dtype), bias, gradient.to(dtype)
            for axis in get_args(Axis):
                exact = results("naive", axis, window, *(tensor.double() for tensor in rounded))
                for backend in BACKENDS:
                    found = results(backend, axis, window, *rounded)
                    errors = {
                        name: float((found[name] - exact[name]).abs().max() / exact[name].abs().max()) for name in exact
                    }
                    shape = [B, size, window]
                    rows.append(
                        {"shape": shape, "axis": axis, "dtype": dtype_name(dtype), "backend": backend, **errors}
                    )
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    lines = [
        f"{facts['device']}, torch {facts['torch']}",
        "",
        "| B, H = W, window | axis | dtype | backend | out | dqkv | dbias |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [", ".join(map(str, row["shape"])), row["axis"], row["dtype"], row["backend"]]
        lines.append(f"| {' | '.join([*cells, *(f'{row[name]:.1e}' for name in ('out', 'dqkv', 'dbias'))])} |")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "errors.json").write_text(json.dumps({**facts, "rows": rows}, indent=1))
    (arguments.out / "errors.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
