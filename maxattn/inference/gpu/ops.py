"""The operators `maxattn_inference::pointwise`, `::narrow`, `::norm`, `::mlp`, `::depthwise`, `::convolution` and
`::pool`: allocation and launches.

They are `triton_op`s, so a compiler sees the kernels and launches them itself. In Triton's interpreter, where there is
nothing to launch, the same functions are opaque operators. None has a gradient. What they compute is in `reference`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from maxattn.inference.gpu import launches
from maxattn.inference.gpu.kernels import convolution as convolution_kernel
from maxattn.inference.gpu.kernels import depthwise as depthwise_kernel
from maxattn.inference.gpu.kernels import mlp as mlp_kernel
from maxattn.inference.gpu.kernels import narrow as narrow_kernel
from maxattn.inference.gpu.kernels import norm as norm_kernel
from maxattn.inference.gpu.kernels import pointwise as pointwise_kernel
from maxattn.inference.gpu.kernels import pool as pool_kernel
from maxattn.nn.gpu.launching import COMPILED, blocks_of, launch, operator
from maxattn.ops.devices import on_device_of


@operator("maxattn_inference::pointwise", mutates_args=())  # type: ignore[untyped-decorator]
def pointwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, gate: Tensor | None, residual: Tensor | None
) -> Tensor:
    """As `reference.pointwise`."""
    out = pointwise_output(x, weight)
    x, weight = x.contiguous(), weight.contiguous()
    (N, K), pixels = weight.shape, 1 if gate is None else x[0, ..., 0].numel()
    M = x.numel() // K
    tile = launches.pointwise(M, N, K, gate is not None, _shared_memory(x))
    with on_device_of(x):
        launch(pointwise_kernel.pointwise, blocks_of(M, tile.rows) * blocks_of(N, tile.columns))(
            x, weight, _or(bias, x), _or(gate, x), _or(residual, x), out, M, N, K, pixels,
            ACT=act, GATED=gate is not None, SPANNED=pixels >= tile.rows, BIASED=bias is not None,
            ADDED=residual is not None,
            EVEN_K=K % tile.depth == 0, **_blocks(tile),
        )  # fmt: skip
    return out


@operator("maxattn_inference::narrow", mutates_args=())  # type: ignore[untyped-decorator]
def narrow(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, norm: str, eps: float) -> Tensor:
    """As `reference.narrow`, of at most `launches.NARROW` channels."""
    out, x, (N, C) = pointwise_output(x, weight), x.contiguous(), weight.shape
    M, tile = x.numel() // C, launches.narrow(C, N)
    with on_device_of(x):
        launch(narrow_kernel.narrow, blocks_of(M, tile.rows))(
            x, weight.contiguous(), _or(bias, x), out, M, C, N, eps,
            ACT=act, NORM=norm, BIASED=bias is not None, EVEN_C=tile.depth == C, EVEN_N=N % tile.columns == 0,
            BLOCK_M=tile.rows, BLOCK_C=tile.depth, BLOCK_N=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


@operator("maxattn_inference::norm", mutates_args=())  # type: ignore[untyped-decorator]
def norm(x: Tensor, kind: str, eps: float) -> Tensor:
    """As `reference.norm`."""
    x, C = x.contiguous(), x.shape[-1]
    out, M, (rows, block, warps) = torch.empty_like(x), x.numel() // C, launches.norm(C)
    with on_device_of(x):
        launch(norm_kernel.norm, blocks_of(M, rows))(
            x, out, M, C, eps, NORM=kind, EVEN_C=block == C, BLOCK_M=rows, BLOCK_C=block, num_warps=warps
        )
    return out


@operator("maxattn_inference::mlp", mutates_args=())  # type: ignore[untyped-decorator]
def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    act: str,
    norm: str,
    eps: float,
) -> Tensor:
    """As `reference.mlp`, of at most `launches.NARROW` channels."""
    x, (hidden, C) = x.contiguous(), weight1.shape
    out, M, tile = torch.empty_like(x), x.numel() // C, launches.mlp(C)
    with on_device_of(x):
        launch(mlp_kernel.mlp, blocks_of(M, tile.rows))(
            x, weight1.contiguous(), _or(bias1, x), weight2.contiguous(), _or(bias2, x), out, M, C, hidden, eps,
            ACT=act, NORM=norm, BIASED_1=bias1 is not None, BIASED_2=bias2 is not None,
            EVEN_C=tile.columns == C, EVEN_H=hidden % tile.depth == 0,
            BLOCK_M=tile.rows, BLOCK_C=tile.columns, BLOCK_H=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


@operator("maxattn_inference::depthwise", mutates_args=())  # type: ignore[untyped-decorator]
def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, stride: int, padding: list[int], pooled: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.depthwise`; instead of the mean, parts `(B, parts, C)` of it in fp32: none if not `pooled`."""
    out, means = depthwise_outputs(x, weight, bias, act, stride, padding, pooled)
    B, out_H, out_W, C = out.shape
    strip, runs, strips = _cut(out)
    with on_device_of(x):
        launch(depthwise_kernel.depthwise, B * runs * strips * blocks_of(C, strip.channels))(
            x.contiguous(), weight.contiguous(), _or(bias, x), out, means,
            *x.shape[1:], out_H, out_W, padding[0], padding[2], runs, strips,
            ACT=act, STRIDE=stride, BIASED=bias is not None, POOLED=pooled,
            ROWS=strip.rows, BLOCK_W=strip.columns, BLOCK_C=strip.channels, STAGES=strip.stages, num_warps=strip.warps,
        )  # fmt: skip
    return out, means


@operator("maxattn_inference::convolution", mutates_args=())  # type: ignore[untyped-decorator]
def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, act: str, stride: int, padding: list[int]) -> Tensor:
    """As `reference.convolution`, of one group."""
    out = convolution_output(x, weight, bias, act, stride, padding)
    B, out_H, out_W, N = out.shape
    _, kernel_h, kernel_w, channels = weight.shape
    tile, M = launches.convolution(channels, N), B * out_H * out_W
    with on_device_of(x):
        launch(convolution_kernel.convolution, blocks_of(M, tile.rows) * blocks_of(N, tile.columns))(
            x, weight.contiguous(), _or(bias, x), out,
            M, N, *x.shape[2:], out_H, out_W, x.stride(0), *x.stride()[2:], x.stride(1), padding[0], padding[2],
            ACT=act, STRIDE=stride, BIASED=bias is not None, CHANNELS=channels, KERNEL_H=kernel_h, KERNEL_W=kernel_w,
            **_blocks(tile),
        )  # fmt: skip
    return out


@operator("maxattn_inference::pool", mutates_args=())  # type: ignore[untyped-decorator]
def pool(x: Tensor, kernel: int, stride: int, padding: int, padded: bool) -> Tensor:
    """As `reference.pool`."""
    out = pool_output(x, kernel, stride)
    _, out_H, out_W, C = out.shape
    M, (rows, block, warps) = out.numel() // C, launches.pool(C)
    with on_device_of(x):
        launch(pool_kernel.pool, blocks_of(M, rows) * blocks_of(C, block))(
            x.contiguous(), out, M, *x.shape[1:], out_H, out_W,
            KERNEL=kernel, STRIDE=stride, PADDING=padding, PADDED=padded,
            BLOCK_M=rows, BLOCK_C=block, num_warps=warps,
        )  # fmt: skip
    return out


def pointwise_output(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    """What `pointwise` and `narrow` return, not yet computed."""
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def same_output(x: Tensor, *_: Any) -> Tensor:
    """What `norm` and `mlp` return, not yet computed."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def depthwise_outputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, stride: int, padding: list[int], pooled: bool
) -> tuple[Tensor, Tensor]:
    """What `depthwise` returns, not yet computed."""
    B, H, W, C = x.shape
    out = x.new_empty(B, *_sizes(H, W, 3, 3, stride, padding), C)
    _, runs, strips = _cut(out)
    return out, x.new_empty((B, runs * strips, C) if pooled else (0,), dtype=torch.float32)


def convolution_output(
    x: Tensor, weight: Tensor, bias: Tensor | None, act: str, stride: int, padding: list[int]
) -> Tensor:
    """What `convolution` returns, not yet computed."""
    N, kernel_h, kernel_w, _ = weight.shape
    return x.new_empty(x.shape[0], *_sizes(x.shape[2], x.shape[3], kernel_h, kernel_w, stride, padding), N)


def pool_output(x: Tensor, kernel: int, stride: int, *_: Any) -> Tensor:
    """What `pool` returns, not yet computed."""
    B, H, W, C = x.shape
    return x.new_empty(B, blocks_of(H, stride), blocks_of(W, stride), C)


if not COMPILED:
    pointwise.register_fake(pointwise_output)
    narrow.register_fake(pointwise_output)
    norm.register_fake(same_output)
    mlp.register_fake(same_output)
    pool.register_fake(pool_output)
    depthwise.register_fake(depthwise_outputs)
    convolution.register_fake(convolution_output)


def _sizes(H: int, W: int, kernel_h: int, kernel_w: int, stride: int, padding: list[int]) -> tuple[int, int]:
    top, bottom, left, right = padding
    return (H + top + bottom - kernel_h) // stride + 1, (W + left + right - kernel_w) // stride + 1


def _cut(out: Tensor) -> tuple[launches.Strip, int, int]:
    """How the output of a depthwise convolution is cut: the launch, and how many runs and strips an image has."""
    _, out_H, out_W, C = out.shape
    strip = launches.depthwise(out_H, out_W, C)
    return strip, blocks_of(out_H, strip.rows), blocks_of(out_W, strip.columns)


def _shared_memory(x: Tensor) -> int:
    """Bytes that a program can have where x is; for tensors without a GPU, as on an H200."""
    if not (x.is_cuda and torch.cuda.is_initialized()):
        return launches.SHARED
    bytes_: int = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin  # type: ignore[attr-defined]
    return bytes_


def _blocks(tile: launches.Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    return placeholder if tensor is None else tensor.contiguous()
