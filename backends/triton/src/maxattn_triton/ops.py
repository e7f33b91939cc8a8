"""The operators `maxattn_triton::forward` and `::backward`: allocation, launches, and registration with PyTorch.

They are `triton_op`s, so a compiler sees the kernels and launches them itself. In Triton's interpreter, where there is
nothing to launch, the same functions are opaque operators.

Shapes: B batch, H x W pixels, h heads, d head_dim, N tokens of a window, G windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton
from torch.utils.flop_counter import register_flop_formula
from triton.runtime.jit import JITFunction

from maxattn.ops.contract import Axis, Problem
from maxattn.ops.devices import on_device_of
from maxattn.ops.windows import spans
from maxattn_triton import configs
from maxattn_triton.kernels import columns, rows, tiles, whole

COMPILED = isinstance(rows.forward, JITFunction)
_operator: Callable[..., Any] = triton_op if COMPILED else custom_op


def max_sa(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """Max-SA of `qkv (B, H, W, 3, h, d)`, differentiable; what `Triton.attend` does."""
    seed = None
    if problem.dropout_p > 0:
        seed = torch.randint(2**62, (1,), device=qkv.device)  # from PyTorch's generator, which manual_seed governs
    grid, (P_h, P_w) = problem.axis == "grid", problem.window
    out: Tensor
    out, _ = forward(
        qkv, bias, seed, grid, P_h, P_w, problem.softmax_scale, problem.dropout_p, problem.differentiated
    )  # fmt: skip
    return out


@_operator("maxattn_triton::forward", mutates_args=())  # type: ignore[untyped-decorator]
def forward(
    qkv: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    grid: bool,
    P_h: int,
    P_w: int,
    scale: float,
    dropout_p: float,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The output `(B, H, W, h, d)`, and the base-2 log-sum-exp of each query `(G, h, N)`, empty if not to be saved."""
    out, lse = forward_outputs(qkv, bias, seed, grid, P_h, P_w, scale, dropout_p, save_lse)
    heads = qkv.shape[4]
    if qkv.shape[0] == 0:
        return out, lse
    with on_device_of(qkv):
        numbers, constants = geometry(qkv, bias, seed, grid, P_h, P_w, scale, dropout_p)
        size = P_h * P_w, qkv.shape[5], qkv.element_size()
        lse_or_none, seed_or_none = lse if save_lse else out, qkv if seed is None else seed
        if configs.forward_kernel(*size) == "rows":
            launch = configs.launch(configs.Key("rows.forward", *size))
            owned, cut = cut_by(launch, P_h * P_w)
            programs = count_walkers(qkv, P_h, P_w, owned, launch) * owned * heads
            kernel(rows.forward)[(programs,)](
                qkv, plain(bias, qkv), out, lse_or_none, seed_or_none, *numbers, **constants, **cut,
                SAVE_LSE=save_lse, **how(launch),
            )  # fmt: skip
        else:
            launch = configs.launch(configs.Key("tiles.forward", *size))
            owned, _, cut = tile_by(launch, P_h * P_w)
            share = sharing(qkv, P_h, P_w, owned, launch)
            programs = count_walkers(qkv, P_h, P_w, owned, launch, share) * owned * heads
            kernel(tiles.forward)[(programs,)](
                qkv, prepared(bias, qkv), out, lse_or_none, seed_or_none, *numbers, **constants, **cut,
                SAVE_LSE=save_lse, SHARING=share, **how(launch),
            )  # fmt: skip
    return out, lse


@_operator("maxattn_triton::backward", mutates_args=())  # type: ignore[untyped-decorator]
def backward(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grid: bool,
    P_h: int,
    P_w: int,
    scale: float,
    dropout_p: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of `qkv`, packed, and of `bias`, empty if none is wanted.

    The bias gradient is summed in fp32 in a fixed order: by each program over its windows, then over the programs.
    """
    dqkv, dbias = backward_outputs(
        grad_out, qkv, bias, seed, out, lse, grid, P_h, P_w, scale, dropout_p, bias_gradient
    )  # fmt: skip
    if qkv.shape[0] == 0:
        return dqkv, dbias.zero_()
    with on_device_of(qkv):
        tokens, heads = P_h * P_w, qkv.shape[4]
        grad_out = grad_out.contiguous()
        seed_or_none = qkv if seed is None else seed
        numbers, constants = geometry(qkv, bias, seed, grid, P_h, P_w, scale, dropout_p)
        size = tokens, qkv.shape[5], qkv.element_size()
        shares = dqkv  # of the bias gradient: one a walker
        family = configs.backward_kernel(*size)
        b = prepared(bias, qkv) if family == "tiles" else plain(bias, qkv)

        if family == "whole":
            launch = configs.launch(configs.Key("whole.backward", *size))
            walkers = count_walkers(qkv, P_h, P_w, 1, launch)
            if bias_gradient:
                shares = qkv.new_empty(walkers, heads, tokens, tokens, dtype=torch.float32)
            kernel(whole.backward)[(walkers * heads,)](
                qkv, b, lse, seed_or_none, grad_out, dqkv, shares, *numbers, **constants,
                BIAS_GRADIENT=bias_gradient, BLOCK_N=configs.block_of(tokens), **how(launch),
            )  # fmt: skip
        elif family == "rows":
            delta = torch.empty_like(lse)
            launch = configs.launch(configs.Key("rows.backward", *size))
            owned, cut = cut_by(launch, tokens)
            walkers = count_walkers(qkv, P_h, P_w, owned, launch)
            if bias_gradient:
                shares = qkv.new_empty(walkers, heads, tokens, tokens, dtype=torch.float32)
            kernel(rows.backward)[(walkers * owned * heads,)](
                qkv, b, out, lse, seed_or_none, grad_out, dqkv, delta, shares, *numbers, **constants, **cut,
                BIAS_GRADIENT=bias_gradient, **how(launch),
            )  # fmt: skip
            launch = configs.launch(configs.Key("columns.backward", *size))
            owned, cut = cut_by(launch, tokens)
            kernel(columns.backward)[(count_walkers(qkv, P_h, P_w, owned, launch) * owned * heads,)](
                qkv, b, lse, seed_or_none, grad_out, dqkv, delta, *numbers, **constants, **cut, **how(launch)
            )
        else:
            delta = torch.empty_like(lse)
            launch = configs.launch(configs.Key("tiles.backward_queries", *size))
            owned, _, cut = tile_by(launch, tokens)
            share = sharing(qkv, P_h, P_w, owned, launch)
            kernel(tiles.backward_queries)[(count_walkers(qkv, P_h, P_w, owned, launch, share) * owned * heads,)](
                qkv,
                b,
                out,
                lse,
                seed_or_none,
                grad_out,
                dqkv,
                delta,
                *numbers,
                **constants,
                **cut,
                SHARING=share,
                **how(launch),
            )
            launch = configs.launch(configs.Key("tiles.backward_keys", *size))
            _, owned, cut = tile_by(launch, tokens)
            kernel(tiles.backward_keys)[(count_walkers(qkv, P_h, P_w, owned, launch) * owned * heads,)](
                qkv, b, lse, seed_or_none, grad_out, dqkv, delta, *numbers, **constants, **cut, **how(launch)
            )
            if bias_gradient:
                launch = configs.launch(configs.Key("tiles.backward_bias", *size))
                down, across, cut = tile_by(launch, tokens)
                owned = down * across
                walkers = count_walkers(qkv, P_h, P_w, owned, launch)
                shares = qkv.new_empty(walkers, heads, tokens, tokens, dtype=torch.float32)
                kernel(tiles.backward_bias)[(walkers * owned * heads,)](
                    qkv, b, lse, seed_or_none, grad_out, delta, shares, *numbers, **constants, **cut, **how(launch)
                )
    return dqkv, shares.sum(0).to(dbias.dtype) if bias_gradient else dbias


def plain(bias: Tensor | None, placeholder: Tensor) -> Tensor:
    """The bias as `rows`, `columns` and `whole` take it."""
    return placeholder if bias is None else bias.contiguous()


def prepared(bias: Tensor | None, placeholder: Tensor) -> Tensor:
    """The bias as `tiles` take it, `(h, NP, NP)`: to base 2, padded with -inf for keys and 0 for queries."""
    if bias is None:
        return placeholder
    missing = padded(bias.shape[1]) - bias.shape[1]
    to_base_2 = bias.contiguous().float() * math.log2(math.e)
    return F.pad(F.pad(to_base_2, (0, missing), value=-math.inf), (0, 0, 0, missing))


def padded(tokens: int) -> int:
    """NP, the least multiple of every tile that holds the tokens."""
    return (tokens + 127) // 128 * 128


def tile_by(launch: configs.Launch, tokens: int) -> tuple[int, int, dict[str, int]]:
    """The tiles of a window down its queries and across its keys, and their sizes."""
    block_m, block_n = (min(block, configs.block_of(tokens)) for block in launch[:2])
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "NP": padded(tokens)}
    return triton.cdiv(tokens, block_m), triton.cdiv(tokens, block_n), sizes


def forward_outputs(
    qkv: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    grid: bool,
    P_h: int,
    P_w: int,
    scale: float,
    dropout_p: float,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    """What `forward` returns, not yet computed."""
    B, H, W, _, heads, head_dim = qkv.shape
    lse = (count_windows(qkv, P_h, P_w), heads, P_h * P_w) if save_lse else (0,)
    return qkv.new_empty(B, H, W, heads, head_dim), qkv.new_empty(lse, dtype=torch.float32)


def backward_outputs(
    grad_out: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grid: bool,
    P_h: int,
    P_w: int,
    scale: float,
    dropout_p: float,
    bias_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """What `backward` returns, not yet computed."""
    dbias = qkv.new_empty(0)
    if bias is not None and bias_gradient:
        dbias = torch.empty_like(bias, memory_format=torch.contiguous_format)
    return torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device), dbias


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, seed, *ctx.arguments = inputs
    ctx.arguments.pop()
    ctx.save_for_backward(qkv, bias, seed, *output)
    ctx.set_materialize_grads(False)


def differentiate(ctx: Any, grad_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 9
    dqkv, dbias = backward(grad_out, *ctx.saved_tensors, *ctx.arguments, ctx.needs_input_grad[1])
    return dqkv, dbias if ctx.needs_input_grad[1] else None, *(None,) * 7


forward.register_autograd(differentiate, setup_context=save_for_backward)
if not COMPILED:
    forward.register_fake(forward_outputs)
    backward.register_fake(backward_outputs)


def geometry(
    qkv: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    grid: bool,
    P_h: int,
    P_w: int,
    scale: float,
    dropout_p: float,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What every kernel is told: numbers, then the constants it is compiled for."""
    B, H, W, _, heads, head_dim = qkv.shape
    constants = {
        "GRID": grid,
        "P_H": P_h,
        "P_W": P_w,
        "D": head_dim,
        "HAS_BIAS": bias is not None,
        "RAGGED": H % P_h != 0 or W % P_w != 0,
        "DROPOUT": seed is not None,
        "BLOCK_D": configs.block_of(head_dim),
        "PRECISION": "ieee" if qkv.dtype == torch.float32 else "tf32",
    }
    return (scale, dropout_p, B, H, W, heads, *qkv.stride()[:5]), constants


def count_windows(qkv: Tensor, P_h: int, P_w: int) -> int:
    """G, the windows of all images."""
    return qkv.shape[0] * windows_of_an_image(qkv, P_h, P_w)


def windows_of_an_image(qkv: Tensor, P_h: int, P_w: int) -> int:
    """The windows of one image."""
    H, W = qkv.shape[1:3]
    return ((H + P_h - 1) // P_h) * ((W + P_w - 1) // P_w)


def sharing(qkv: Tensor, P_h: int, P_w: int, tiles: int, launch: configs.Launch) -> int:
    """How many windows run side by side in a program of `tiles`: one, if an image has too few to fill the device."""
    programs = windows_of_an_image(qkv, P_h, P_w) * tiles * qkv.shape[4]
    return launch.sharing if programs >= processors(qkv.device) * launch.sharing else 1


def count_walkers(qkv: Tensor, P_h: int, P_w: int, tiles: int, launch: configs.Launch, sharing: int = 1) -> int:
    """How many programs share the windows, for each head and tile: all walk equally many windows, or one less."""
    windows = (count_windows(qkv, P_h, P_w) + sharing - 1) // sharing
    most = max(1, processors(qkv.device) * launch.programs // (tiles * qkv.shape[4]))
    rounds = (windows + most - 1) // most
    return (windows + rounds - 1) // rounds


def cut_by(launch: configs.Launch, tokens: int) -> tuple[int, dict[str, Any]]:
    """The tiles that a program may own, and their sizes: parts of BLOCK_N as many as fit, then one of REST."""
    largest = configs.block_of(tokens)
    block_m, block_n = min(launch.block_m, largest), min(launch.block_n, largest)
    rest = configs.block_of(tokens % block_n) % block_n if tokens % block_n else 0
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "REST": rest}
    return triton.cdiv(tokens, block_m), sizes


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of the device."""
    if device.type == "cpu":
        return 1
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def how(launch: configs.Launch) -> dict[str, int]:
    return {"num_warps": launch.warps, "num_stages": launch.stages}


def kernel(function: Any) -> Any:
    return wrap_triton(function) if COMPILED else function


def pairs(qkv_shape: tuple[int, ...], grid: bool, P_h: int, P_w: int) -> int:
    """Query-key pairs of one head in all windows: only of tokens that exist."""
    axis: Axis = "grid" if grid else "block"
    sides = zip(qkv_shape[1:3], (P_h, P_w), strict=True)
    rows, columns = (sum(run.groups * run.tokens**2 for run in spans(size, window, axis)) for size, window in sides)
    return qkv_shape[0] * rows * columns


@register_flop_formula(torch.ops.maxattn_triton.forward)
def forward_flops(*shapes_and_numbers: Any, **_: Any) -> Any:
    """Two matrix products: the logits and the weighted values."""
    qkv, _, _, *geometry = shapes_and_numbers
    return 2 * 2 * pairs(qkv, *geometry[:3]) * qkv[4] * qkv[5]


@register_flop_formula(torch.ops.maxattn_triton.backward)
def backward_flops(*shapes_and_numbers: Any, **_: Any) -> Any:
    """Five matrix products: the logits again, and the gradients of weights, values, queries and keys."""
    _, qkv, _, _, _, _, *geometry = shapes_and_numbers
    return 2 * 5 * pairs(qkv, *geometry[:3]) * qkv[4] * qkv[5]
