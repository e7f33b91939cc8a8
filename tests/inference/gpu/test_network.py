"""A converted network calls the kernels where they serve, and gives the same numbers as the plain one."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from random_weights import randomise
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import maxattn
from maxattn.inference import gpu
from maxattn.inference.gpu import launches
from maxattn.nn import MaxViT
from maxattn.testing.budget import UNITS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # of NumPy, interpreting
SMALL = {
    "num_classes": 50,  # enough for errors not to be luck
    "head_dim": 8,
    "window": 3,
    "stem": {"width": 8},
    "stages": [{"width": 16, "depth": 1}, {"width": 32, "depth": 1}],
}


def small(dtype: torch.dtype = torch.float16, **overrides: Any) -> MaxViT:
    model = maxattn.build(SMALL, **overrides)
    randomise(model)
    return model.to(DEVICE, dtype).eval()


def images(dtype: torch.dtype = torch.float16, batch: int = 2, height: int = 15, width: int = 11) -> Tensor:
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
    assert (calls.of("convolution"), calls.of("depthwise")) == (2, 2)


@pytest.mark.parametrize(
    ("overrides", "depthwise", "convolution"),
    [
        ({"padding": "symmetric", "shortcut_pool": "avg3"}, 2, 2),
        ({"padding": "symmetric", "shortcut_pool": "max3", "shortcut_conv": "stride"}, 2, 2),
        ({"conv_norm": "group_norm"}, 2, 2),
        ({"attn_norm": "rms_norm", "layer_scale": 0.3, "qkv_bias": False}, 2, 2),
        ({"se_ratio": 0, "rel_pos": "none"}, 2, 2),
        ({"mlp_ratio": 0}, 2, 2),
        ({"kernel_size": 5}, 0, 2),
        ({"stem": {"width": 8, "kernel_size": 5, "first_bias": False}}, 2, 2),
        ({"stem": {"width": 136}}, 2, 0),
        ({"stages.*.layers": ["block", ["mbconv", "grid"]]}, 2, 2),
        ({"stages.1.width": 24}, 2, 2),
    ],
    ids=str,
)
def test_other_specs_take_what_serves_them(overrides: dict[str, Any], depthwise: int, convolution: int) -> None:
    model, x = small(**overrides), images(batch=1)
    out, calls = run(maxattn.optimize_for_inference(model), x)
    assert_within_budget(model, out, x)
    assert (calls.of("depthwise"), calls.of("convolution")) == (depthwise, convolution)
    assert calls.of("pointwise") > 0


@pytest.mark.parametrize("act", ["gelu_tanh", "gelu", "silu", "relu"])
def test_no_pass_but_the_kernels_own_is_left_in_the_blocks(act: str) -> None:
    _, calls = run(maxattn.optimize_for_inference(small(act=act)), images())
    expansions = 2  # the library's if it has the activation, else ours
    library = expansions if act in launches.LIBRARY else 0
    assert calls.counts["aten::_addmm_activation"] == library
    assert calls.counts["aten::addmm"] == 2 * 2 + 2 + 2  # squeeze-and-excitation's, the shortcuts', the head's
    # In each of 2 blocks the last 1x1 of an MBConv, and of each attention layer what is after attention.
    assert calls.of("pointwise") == 2 * (1 + 2) + expansions - library
    assert calls.of("narrow") == calls.of("mlp") == 2 * 2
    assert calls.of("pool") == 2
    gone = (f"aten::{act.partition('_')[0]}", "aten::convolution", "aten::constant_pad_nd", "aten::avg_pool2d")
    assert not any(calls.counts[name] for name in gone if name != "aten::silu")
    assert calls.counts["aten::native_layer_norm"] == 1  # the head's
    assert calls.counts["aten::silu"] == calls.counts["aten::sigmoid"] == 2  # squeeze-and-excitation's


def test_wide_channels_are_normed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = small(), images()
    monkeypatch.setattr(launches, "NARROW", 16)
    out, calls = run(maxattn.optimize_for_inference(model), x)
    assert_within_budget(model, out, x)
    assert calls.of("norm") == 2 * 2  # of the second stage's layers
    assert calls.of("narrow") == calls.of("mlp") == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_the_usual_functions_serve_fp32_derivatives_autocast_and_empty_batches() -> None:
    optimized, x = maxattn.optimize_for_inference(small()), images()
    weight = optimized.stem.blocks[0].conv1.weight
    assert gpu.serves(x, weight)
    assert not gpu.serves(x.float(), weight.float())
    assert not gpu.serves(x, weight.bfloat16())
    assert not gpu.serves(x.clone().requires_grad_(), weight)
    assert not gpu.serves(x[:0], weight)
    with forward_ad.dual_level():
        assert not gpu.serves(forward_ad.make_dual(x, x), weight)
    answers: list[bool] = []
    torch.func.vmap(lambda x: [answers.append(gpu.serves(x, weight)), x][1])(x)
    assert answers == [False]
    with torch.autocast(DEVICE, torch.bfloat16):
        assert not gpu.serves(x, weight)
    assert optimized(x[:0]).shape == (0, 50)


def test_who_watches_attention_sees_what_it_is_given() -> None:
    model, x = small(), images()
    optimized, seen = maxattn.optimize_for_inference(model), []
    hooks = [
        each.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for each in optimized.attentions()
    ]
    out = optimized(x)
    assert len(seen) == len(hooks) == 4
    assert all(abs(each.float().mean(-1)).max() < 1e-2 for each in seen)
    assert_within_budget(model, out, x)


def test_in_a_compilers_graph_as_operators_that_take_weights_as_they_are() -> None:
    model, x = small(), images(batch=1)
    optimized = maxattn.optimize_for_inference(model)
    taken_by: set[str] = set()

    def look(module: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        for node in module.graph.nodes:
            if node.op == "placeholder" and "_parameters_weight" in node.target:
                taken_by.update(getattr(user.target, "__name__", str(user.target)) for user in node.users)
        return module

    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(optimized, backend=look, fullgraph=True)(x)
        assert_within_budget(model, out, x)
        assert out.equal(optimized(x)) or DEVICE == "cuda"  # where a library may choose another kernel
    assert {"pointwise.default", "narrow.default", "mlp.default"} <= taken_by
    assert taken_by - {"pointwise.default", "narrow.default", "mlp.default"} <= {"flatten", "t", "linear", "layer_norm"}


def test_an_exported_graph_holds_none_of_them() -> None:
    program = torch.export.export(maxattn.optimize_for_inference(small()), (images(),))
    assert "maxattn_inference" not in str(program)


def test_moved_or_loaded_after_its_first_call() -> None:
    optimized, x = maxattn.optimize_for_inference(small()), images(batch=1)
    expected = optimized(x)
    state = copy.deepcopy(optimized.state_dict())
    optimized.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in state.items()})
    assert optimized(x).eq(0).all()
    optimized.load_state_dict(state)
    assert optimized(x).equal(expected)
    assert optimized.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
