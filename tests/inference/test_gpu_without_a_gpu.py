"""What of the GPU's road can be seen without one: nothing is imported, nothing changes, and its costs are counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fresh_python import python
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import maxattn
from maxattn.inference import gpu
from maxattn.inference.gpu import launches
from maxattn.inference.gpu.costs import Cost, costs


def test_the_kernels_are_not_imported() -> None:
    code = """
import sys, torch, maxattn
fast = maxattn.optimize_for_inference(maxattn.build("nano")).bfloat16()
fast(torch.ones(1, 3, 28, 28, dtype=torch.bfloat16))
assert "maxattn.inference.gpu" in sys.modules
assert not {"maxattn.inference.gpu.ops", "maxattn.inference.gpu.kernels"} & set(sys.modules)
"""
    python(arguments=("-c", code))


def test_the_kernels_do_not_serve_a_cpu() -> None:
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    assert not gpu.serves(x, x)


def test_the_operators_are_traced_for_a_gpu_that_is_not_there() -> None:
    from maxattn.inference.gpu import ops

    with FakeTensorMode():
        x, weight, bias = (
            torch.empty(size, device="cuda:0", dtype=torch.float16) for size in ((2, 5, 7, 64), (96, 64), (96,))
        )
        for out in (
            ops.pointwise(x, weight, bias, "gelu", None, None),
            ops.narrow(x, weight, bias, "gelu", "none", 0.0),
        ):
            assert (out.shape, out.device.type) == ((2, 5, 7, 96), "cuda")
        assert ops.norm(x, "rms_norm", 1e-5).shape == x.shape
        assert ops.pool(x, 2, 2, 0, False).shape == (2, 3, 4, 64)
        weight2 = torch.empty(64, 96, device="cuda:0", dtype=torch.float16)
        assert ops.mlp(x, weight, bias, weight2, None, "silu", "rms_norm", 1e-5).shape == x.shape
        taps = torch.empty(3, 3, 64, device="cuda:0", dtype=torch.float16)
        out, means = ops.depthwise(x, taps, None, "relu", 2, [0, 1, 0, 1], True)
        assert (out.shape, means.shape[::2]) == ((2, 2, 3, 64), (2, 64))
        taps = torch.empty(8, 3, 3, 64, device="cuda:0", dtype=torch.float16)
        out = ops.convolution(x.permute(0, 3, 1, 2), taps, None, "none", 1, [1, 1, 1, 1])
        assert out.shape == (2, 5, 7, 8)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"stages.*.layers": ["block", ["mbconv", "grid"]]},
        {"stages.*.layers": ["block", "grid"]},
        {"se_ratio": 0, "mlp_ratio": 0, "rel_pos": "none", "shortcut_conv": "stride"},
        {"head": {"kind": "linear"}, "num_classes": 0},
    ],
    ids=str,
)
def test_operations_are_those_that_pytorch_counts(overrides: dict[str, Any]) -> None:
    spec = {
        "window": 4,
        "head_dim": 8,
        "kernel_size": 5,
        "stem": {"width": 8},
        "stages": [{"width": 16, "depth": 2}, {"width": 24, "depth": 1}],
    }
    with torch.device("meta"):
        model, x = maxattn.build(spec, **overrides).eval(), torch.empty(3, 3, 64, 32)
    with maxattn.use_backend("sdpa"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert sum(cost.flops for cost in costs(model, 3, (64, 32))) == counter.get_total_flops()


def test_costs_of_a_plain_network_are_those_of_the_one_made_of_it() -> None:
    model = maxattn.build("nano")
    plain, optimized = (costs(one, 2, (28, 28)) for one in (model, maxattn.optimize_for_inference(model)))
    assert [cost[1:] for cost in plain] == [cost[1:] for cost in optimized]


def test_the_floor_is_that_of_what_takes_longer() -> None:
    cost = Cost("fc1", "mlp", bytes=100, flops=1000)
    assert cost.seconds(bytes_per_second=10, flops_per_second=1000) == 10
    assert cost.seconds(bytes_per_second=1000, flops_per_second=10) == 100


@pytest.mark.parametrize(("width", "passes"), [(128, 0), (136, 2), (512, 2)])
def test_a_norm_apart_is_a_pass_that_reads_and_writes(width: int, passes: int) -> None:
    with torch.device("meta"):
        model = maxattn.build({"head_dim": 8, "stages": [{"width": width, "depth": 1, "layers": ["block", "grid"]}]})
    norms = [cost for cost in costs(model, 3, (8, 8)) if cost.kind == "norm"]
    assert [cost.bytes for cost in norms] == [2 * 3 * 2 * 2 * width * 2] * (2 * passes)


def test_channels_whose_loads_would_be_narrow_are_not_fused() -> None:
    assert [C for C in (16, 24, 64, 72, 120, 128, 144) if gpu.is_narrow(C)] == [16, 64, 128]


@pytest.mark.parametrize("columns", [16, 24, 64, 96, 192, 384, 3072])
@pytest.mark.parametrize("depth", [16, 64, 96, 256])
def test_tiles_have_sides_that_a_kernel_takes(depth: int, columns: int) -> None:
    tiles = [launches.pointwise(rows, columns, depth, gated) for rows in (10**6, 49) for gated in (False, True)]
    for tile in tiles:
        assert all(side >= 16 and side & (side - 1) == 0 for side in tile[:3])
        assert depth % 32 or depth % tile.depth == 0
        assert tile.shared <= launches.SHARED


@pytest.mark.parametrize("columns", [64, 96, 192, 384, 512, 768])
def test_a_chip_with_less_shared_memory_has_smaller_tiles(columns: int) -> None:
    least = 99 * 1024
    assert launches.pointwise(10**6, columns, 768, True, least).shared <= least
