"""`max_sa` checks its arguments, and means the same under autocast, without gradients and on any device."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import maxattn

QKV = torch.randn(1, 8, 9, 3, 2, 4, generator=torch.Generator().manual_seed(0))
BIAS = torch.randn(2, 12, 12, generator=torch.Generator().manual_seed(1))

# Arguments besides the valid ones of `call`, the error's type, and what its message says.
WRONG: dict[str, tuple[dict[str, Any], type[Exception] | tuple[type[Exception], ...], str]] = {
    "qkv: not a tensor": ({"qkv": QKV.numpy()}, TypeError, "qkv must be a torch.Tensor, not ndarray"),
    "qkv: no dimension": ({"qkv": torch.tensor(1.0)}, ValueError, "(B, H, W, 3, heads, head_dim), not ()"),
    "qkv: as the Linear leaves it": (
        {"qkv": QKV.flatten(3)},
        ValueError,
        "not (1, 8, 9, 24); for the output of a Linear on NHWC call qkv.unflatten(-1, (3, heads, head_dim))",
    ),
    "qkv: no heads": ({"qkv": QKV[:, :, :, :, 0]}, ValueError, "not (1, 8, 9, 3, 4)"),
    "qkv: one dimension more": ({"qkv": QKV[None]}, ValueError, "not (1, 1, 8, 9, 3, 2, 4)"),
    "qkv: heads before the 3": (
        {"qkv": QKV.transpose(3, 4)},
        ValueError,
        "not (1, 8, 9, 2, 3, 4); heads come after the 3: call qkv.transpose(3, 4)",
    ),
    "qkv: only q and k": ({"qkv": QKV[:, :, :, :2]}, ValueError, "not (1, 8, 9, 2, 2, 4)"),
    "qkv: no rows": ({"qkv": QKV[:, :0]}, ValueError, "has H 0: (1, 0, 9, 3, 2, 4); only B may be 0"),
    "qkv: no columns": ({"qkv": QKV[:, :, :0]}, ValueError, "has W 0: (1, 8, 0, 3, 2, 4); only B may be 0"),
    "qkv: zero heads": ({"qkv": QKV[:, :, :, :, :0], "bias": None}, ValueError, "has heads 0"),
    "qkv: zero head_dim": ({"qkv": QKV[..., :0]}, ValueError, "has head_dim 0"),
    "qkv: integers": ({"qkv": QKV.int()}, TypeError, "float16, bfloat16, float32 or float64, not torch.int32"),
    "qkv: complex": ({"qkv": QKV.cfloat()}, TypeError, "float16, bfloat16, float32 or float64, not torch.complex64"),
    "qkv: last stride": (
        {"qkv": QKV.repeat_interleave(2, -1)[..., ::2]},
        ValueError,
        "the last stride of qkv must be 1, not 2: call qkv.contiguous() first",
    ),
    "axis: a typo": ({"axis": "blocks"}, ValueError, "axis must be 'block' or 'grid', not 'blocks'"),
    "axis: a number": ({"axis": 0}, (TypeError, ValueError), "axis must be 'block' or 'grid', not "),
    "axis: a list": ({"axis": ["block"]}, TypeError, "axis must be 'block' or 'grid', not list"),
    "window: zero": ({"window": 0, "bias": None}, ValueError, "window must be at least 1 x 1 token, not 0 x 0"),
    "window: negative": ({"window": (4, -3)}, ValueError, "window must be at least 1 x 1 token, not 4 x -3"),
    "window: a float": ({"window": 4.0}, ValueError, "window must be an int or two ints (P_h, P_w), not 4.0"),
    "window: two floats": ({"window": (4.0, 3.0)}, ValueError, "an int or two ints (P_h, P_w), not (4.0, 3.0)"),
    "window: a bool": ({"window": True}, ValueError, "window must be an int or two ints (P_h, P_w), not True"),
    "window: bools": ({"window": (True, True)}, ValueError, "an int or two ints (P_h, P_w), not (True, True)"),
    "window: one int": ({"window": (4,)}, ValueError, "window must be an int or two ints (P_h, P_w), not (4,)"),
    "window: three ints": ({"window": (4, 3, 2)}, ValueError, "an int or two ints (P_h, P_w), not (4, 3, 2)"),
    "window: a string": ({"window": "4x3"}, ValueError, "window must be an int or two ints (P_h, P_w), not '4x3'"),
    "window: None": ({"window": None}, ValueError, "window must be an int or two ints (P_h, P_w), not None"),
    "bias: not a tensor": ({"bias": BIAS.tolist()}, TypeError, "bias must be a torch.Tensor or None, not list"),
    "bias: of another window": (
        {"bias": BIAS[:, :9, :9]},
        ValueError,
        "bias must be (heads, N, N) = (2, 12, 12) for 2 heads and a 4 x 3 window, not (2, 9, 9)",
    ),
    "bias: of other heads": ({"bias": BIAS[:1]}, ValueError, "= (2, 12, 12) for 2 heads and a 4 x 3 window, not (1"),
    "bias: with a batch": ({"bias": BIAS[None]}, ValueError, "(2, 12, 12) for 2 heads and a 4 x 3 window, not (1, 2"),
    "bias: integers": (
        {"bias": BIAS.int()},
        TypeError,
        "bias must be float16, bfloat16, float32 or float64, not torch",
    ),
    "bias: elsewhere": ({"bias": BIAS.to("meta")}, ValueError, "qkv is on cpu but bias on meta: move one of them"),
    "scale: nan": ({"scale": float("nan")}, ValueError, "scale must be a finite number or None, not nan"),
    "scale: infinite": ({"scale": float("inf")}, ValueError, "scale must be a finite number or None, not inf"),
    "scale: a tensor": ({"scale": torch.tensor(0.5)}, TypeError, "scale must be a number or None, not Tensor"),
    "scale: a string": ({"scale": "0.5"}, TypeError, "scale must be a number or None, not str"),
    "dropout_p: 1": ({"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below 1, not 1.0"),
    "dropout_p: negative": ({"dropout_p": -0.1}, ValueError, "dropout_p must be at least 0 and below 1, not -0.1"),
    "dropout_p: nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p must be at least 0 and below 1, not nan"),
    "dropout_p: None": ({"dropout_p": None}, TypeError, "dropout_p must be a number, not NoneType"),
    "backend: a list": (
        {"backend": ["naive"]},
        TypeError,
        "backend must be a name, a comma list of names, or None, not list",
    ),
    "backend: a number": ({"backend": 1}, TypeError, "backend must be a name, a comma list of names, or None, not int"),
    "backend: empty": ({"backend": ""}, ValueError, "no backend name in ''; known: "),
    "backend: only commas": ({"backend": " , "}, ValueError, "no backend name in ' , '; known: "),
}


def call(function: Callable[..., Any], **changed: Any) -> Any:
    """`function` with valid arguments, and those that are `changed`."""
    return function(**({"qkv": QKV, "axis": "block", "window": (4, 3), "bias": BIAS} | changed))


@pytest.mark.parametrize("function", [maxattn.max_sa, maxattn.explain])
@pytest.mark.parametrize(("changed", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_argument_is_named_with_what_was_seen_and_what_would_work(
    function: Callable[..., Any], changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    call(function)
    with pytest.raises(error, match=re.escape(message)):
        call(function, **changed)


@pytest.mark.parametrize("wrong", [4.0, (4.0, 4.0), True, np.float64(4)])
def test_an_argument_equal_to_a_valid_one_but_of_the_wrong_type_is_wrong_after_the_valid_one_too(wrong: Any) -> None:
    call(maxattn.max_sa, window=4, bias=None)
    call(maxattn.max_sa, window=1, bias=None)
    with pytest.raises(ValueError, match="window must be"):
        call(maxattn.max_sa, window=wrong, bias=None)


@pytest.mark.parametrize("window", [4, (4, 4), [4, 4], torch.Size((4, 4))])
def test_a_window_may_be_an_int_or_a_pair_in_any_sequence(window: Any) -> None:
    out = call(maxattn.max_sa, window=window, bias=None)
    assert torch.equal(out, call(maxattn.max_sa, window=(4, 4), bias=None))
    assert call(maxattn.explain, window=window, bias=None).problem.window == (4, 4)


@pytest.mark.parametrize("changed", [{"qkv": QKV[:0]}, {"qkv": QKV[..., :1].repeat(1, 1, 1, 1, 1, 2)[..., ::2]}])
def test_an_empty_batch_and_any_stride_of_a_single_channel_are_fine(changed: dict[str, Any]) -> None:
    assert call(maxattn.max_sa, **changed).shape == changed["qkv"][:, :, :, 0].shape


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_qkv_and_is_contiguous(backend: str, dtype: torch.dtype) -> None:
    out = call(maxattn.max_sa, qkv=QKV.to(dtype), backend=backend)
    assert out.dtype == dtype
    assert out.shape == (1, 8, 9, 2, 4)
    assert out.is_contiguous()


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(backend: str, dtype: torch.dtype, autocast_dtype: torch.dtype) -> None:
    def results(autocast: bool) -> list[Tensor]:
        qkv, bias = QKV.to(dtype, copy=True).requires_grad_(), BIAS.clone().requires_grad_()
        with torch.autocast("cpu", autocast_dtype, enabled=autocast):
            assert (torch.mm(BIAS[0], BIAS[0]).dtype == autocast_dtype) == autocast
            out = call(maxattn.max_sa, qkv=qkv, bias=bias, backend=backend)
            assert torch.is_autocast_enabled("cpu") == autocast
        out.double().square().sum().backward()
        return [out.detach(), qkv.grad, bias.grad]

    for with_autocast, without in zip(results(True), results(False), strict=True):
        assert with_autocast.dtype == without.dtype
        assert torch.equal(with_autocast, without)


@pytest.mark.parametrize("backend", ["naive", "sdpa"])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_no_gradient_is_wanted(backend: str, without: Callable[[], Any]) -> None:
    qkv, bias = QKV.clone().requires_grad_(), BIAS.clone().requires_grad_()
    recorded = call(maxattn.max_sa, qkv=qkv, bias=bias, backend=backend)
    with without():
        out = call(maxattn.max_sa, qkv=qkv, bias=bias, backend=backend)
    assert recorded.requires_grad
    assert not out.requires_grad
    torch.testing.assert_close(out, recorded.detach())


@pytest.mark.parametrize("backend", ["naive", "sdpa", None])
def test_shapes_can_be_had_on_the_meta_device(backend: str | None) -> None:
    out = call(maxattn.max_sa, qkv=QKV.to("meta"), bias=BIAS.to("meta"), backend=backend)
    assert out.is_meta
    assert out.shape == (1, 8, 9, 2, 4)


@pytest.mark.parametrize("axis", ["block", "grid"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(axis: str, use_reentrant: bool) -> None:
    def gradients(checkpointed: bool) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        qkv, bias = QKV.clone().requires_grad_(), BIAS.clone().requires_grad_()

        def attend(qkv: Tensor, bias: Tensor) -> Tensor:
            return maxattn.max_sa(qkv, axis, (4, 3), bias, dropout_p=0.2)

        out = checkpoint(attend, qkv, bias, use_reentrant=use_reentrant) if checkpointed else attend(qkv, bias)
        out.square().sum().backward()
        return out.detach(), qkv.grad, bias.grad

    for checkpointed, expected in zip(gradients(True), gradients(False), strict=True):
        assert torch.equal(checkpointed, expected)
