"""A converted network calls the kernels where they serve, and gives the same numbers as the plain one."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from random_weights import randomise
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import maxattn
from maxattn.inference import gpu
from maxattn.nn import MaxViT
from maxattn.testing.budget import UNITS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # of NumPy, interpreting
SMALL = {
    "num_classes": 50,  # enough for errors not to be luck
    "head_dim": 8,
    "window": 3,
    "stem": {"width": 8},
    "stages": [{"width": 16, "depth": 1}, {"width": 24, "depth": 2}],
}


@pytest.fixture(autouse=True)
def kernels_serve_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DEVICES", frozenset({DEVICE}))


def small(dtype: torch.dtype = torch.float16, **overrides: Any) -> MaxViT:
    model = maxattn.build(SMALL, **overrides)
    randomise(model)
    return model.to(DEVICE, dtype).eval()


def images(dtype: torch.dtype = torch.float16, batch: int = 2, height: int = 28, width: int = 19) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator).to(DEVICE, dtype)


class Calls(TorchDispatchMode):
    """How often each operator ran."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    def of(self, name: str) -> int:
        return self.counts[f"maxattn_inference::{name}"]


def run(model: MaxViT, x: Tensor) -> tuple[Tensor, Calls]:
    with Calls() as calls, torch.no_grad():
        return model(x), calls


def assert_within_budget(model: MaxViT, optimized: Tensor, x: Tensor) -> None:
    """At most twice as far from exact as the plain network in the same dtype, and some roundings of the result."""
    with torch.no_grad():
        plain, exact = model(x).double(), copy.deepcopy(model).double()(x.double())
    for order, units in ((float("inf"), UNITS["max"]), (2.0, UNITS["2-norm"])):
        allowed = 2 * torch.linalg.vector_norm(plain - exact, order)
        allowed += units * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(exact, order)
        assert torch.linalg.vector_norm(optimized.double() - exact, order) <= allowed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ["gelu_tanh", "gelu", "silu", "relu"])
def test_each_activation_and_dtype_is_within_the_error_budget(act: str, dtype: torch.dtype) -> None:
    model, x = small(dtype, act=act), images(dtype)
    out, calls = run(maxattn.optimize_for_inference(model), x)
    assert_within_budget(model, out, x)
    assert (calls.of("convolution"), calls.of("depthwise")) == (2, 3)


@pytest.mark.parametrize(
    ("overrides", "depthwise", "convolution"),
    [
        ({"padding": "symmetric", "shortcut_pool": "max3", "shortcut_conv": "stride"}, 3, 2),
        ({"conv_norm": "group_norm"}, 3, 2),
        ({"attn_norm": "rms_norm", "layer_scale": 0.3, "qkv_bias": False}, 3, 2),
        ({"se_ratio": 0, "rel_pos": "none"}, 3, 2),
        ({"mlp_ratio": 0}, 3, 2),
        ({"kernel_size": 5}, 0, 2),
        ({"stem": {"width": 8, "kernel_size": 5, "first_bias": False}}, 3, 2),
        ({"stem": {"width": 136}}, 3, 0),
        ({"stages.*.layers": ["block", ["mbconv", "grid"]]}, 3, 2),
    ],
    ids=str,
)
def test_other_specs_take_what_serves_them(overrides: dict[str, Any], depthwise: int, convolution: int) -> None:
    model, x = small(**overrides), images(batch=1, height=15, width=18)
    out, calls = run(maxattn.optimize_for_inference(model), x)
    assert_within_budget(model, out, x)
    assert (calls.of("depthwise"), calls.of("convolution")) == (depthwise, convolution)
    assert calls.of("pointwise") > 0


def test_no_pass_but_the_kernels_own_is_left_in_the_blocks() -> None:
    _, calls = run(maxattn.optimize_for_inference(small()), images())
    # In 3 blocks, 2 of an MBConv and 2 of each attention layer; a shortcut's 1x1, 2 times; the head's two.
    assert calls.of("pointwise") == 3 * (2 + 2 * 2) + 2 + 2
    assert calls.of("mlp") == 3 * 2
    gone = ("aten::gelu", "aten::convolution", "aten::constant_pad_nd", "aten::native_batch_norm")
    assert not any(calls.counts[name] for name in gone)
    assert calls.counts["aten::addmm"] == 2 * 3  # squeeze-and-excitation's
    assert calls.counts["aten::native_layer_norm"] == 1  # the head's
    assert calls.counts["aten::silu"] == calls.counts["aten::sigmoid"] == 3


def test_wide_channels_are_normed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), images()
    monkeypatch.setattr(gpu.launches, "NORM_CHANNELS", 16)
    monkeypatch.setattr(gpu.launches, "MLP_CHANNELS", 0)
    out, calls = run(maxattn.optimize_for_inference(model), x)
    assert_within_budget(model, out, x)
    assert calls.counts["aten::native_layer_norm"] == 1 + 2 * 2 * 2  # of the second stage's layers


def test_the_usual_functions_serve_fp32_gradients_autocast_and_empty_batches() -> None:
    optimized, x = maxattn.optimize_for_inference(small()), images()
    weight = optimized.stem.blocks[0].conv1.weight
    assert gpu.serves(x, weight)
    assert not gpu.serves(x.float(), weight.float())
    assert not gpu.serves(x, weight.bfloat16())
    assert not gpu.serves(x.clone().requires_grad_(), weight)
    assert not gpu.serves(x[:0], weight)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert not gpu.serves(x, weight)
    assert optimized(x[:0]).shape == (0, 50)


def test_who_watches_attention_sees_what_it_is_given() -> None:
    optimized, x = maxattn.optimize_for_inference(small()), images()
    expected, seen = optimized(x), []
    hooks = [
        each.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for each in optimized.attentions()
    ]
    out = optimized(x)
    assert len(seen) == len(hooks) == 6
    assert all(abs(each.float().mean(-1)).max() < 1e-2 for each in seen)
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_in_a_compilers_graph_as_operators() -> None:
    optimized, x = maxattn.optimize_for_inference(small()), images()
    torch._dynamo.reset()
    with torch.no_grad():
        expected = optimized(x)
        assert torch.compile(optimized, backend="eager", fullgraph=True)(x).equal(expected)


def test_an_exported_graph_holds_none_of_them() -> None:
    program = torch.export.export(maxattn.optimize_for_inference(small()), (images(),))
    assert "maxattn_inference" not in str(program)


def test_moved_or_loaded_after_its_first_call() -> None:
    optimized, x = maxattn.optimize_for_inference(small()), images()
    expected = optimized(x)
    state = copy.deepcopy(optimized.state_dict())
    optimized.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    assert optimized(x).eq(0).all()
    optimized.load_state_dict(state)
    assert optimized(x).equal(expected)
    assert optimized.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
