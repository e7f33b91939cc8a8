"""A Linear with what comes before it by our own kernels: within twice the error of PyTorch's in the same dtype."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.testing._internal.two_tensor import TwoTensor

from maxattn.nn import AttentionLayer, MaxAttention, gpu
from maxattn.nn.basic import ACTIVATIONS
from maxattn.nn.gpu import serving, tokens
from tests.nearness import assert_near
from tests.nn.graphs import kept_and_recomputed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),  # of NumPy, interpreting
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),  # first of all in a thread
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
SIZES = pytest.mark.parametrize("size", [(1, 1, 1, 8), (2, 3, 5, 24), (1, 9, 7, 100), (3, 8, 8, 256)], ids=str)


def random(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


class Layers(nn.Module):
    """A norm, a Linear, an activation, a Linear; all parameters are random."""

    def __init__(self, channels: int, act: str = "gelu_tanh", hidden: int = 72, offset: bool = True) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=1e-3)
        self.first, self.second = nn.Linear(channels, hidden, offset), nn.Linear(hidden, channels)
        self.act, self.drop = ACTIVATIONS[act](), nn.Dropout(0.0)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(random(*parameter.shape, seed=seed) / max(1, parameter[0].numel()) ** 0.5)
        self.to(DEVICE)


def projected(layers: Layers, x: Tensor, *, ours: bool) -> tuple[Tensor, Tensor]:
    return gpu.norm_linear(layers.norm, layers.first, x) if ours else (x, layers.first(layers.norm(x)))


def fed(layers: Layers, x: Tensor, *, ours: bool) -> tuple[Tensor, Tensor]:
    if ours:
        return gpu.mlp(layers.norm, layers.first, layers.act, layers.second, x)
    return x, layers.second(layers.act(layers.first(layers.norm(x))))


def results(call: Any, layers: Layers, x: Tensor, dtype: torch.dtype, *, ours: bool) -> dict[str, Tensor]:
    """The output and all gradients. `dtype` is autocast's, if it is of fewer bits."""
    layers, x = copy.deepcopy(layers), x.detach().clone().requires_grad_()
    few = dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(DEVICE, dtype) if few else nullcontext():
        again, y = call(layers, x, ours=ours)
    assert y.dtype == dtype
    used = {name: parameter for name, parameter in layers.named_parameters() if call is fed or "second" not in name}
    sent = [random(*one.shape, dtype=torch.float16, seed=9 + n).to(one.dtype) for n, one in enumerate((again, y))]
    gradients = torch.autograd.grad((again, y), (x, *used.values()), sent)
    assert gradients[0].dtype == x.dtype
    return dict(zip(("y", "x", *used), (y.detach(), *gradients), strict=True))


def assert_within_budget(call: Any, layers: Layers, x: Tensor, dtype: torch.dtype) -> None:
    exact = results(call, copy.deepcopy(layers).double(), x.double(), torch.float64, ours=False)
    plain, ours = (results(call, layers, x, dtype, ours=which) for which in (False, True))
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype, name
        assert_near(value, plain[name], exact[name], dtype)


@DTYPES
@SIZES
def test_a_norm_and_a_linear(size: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for programs in (1, 5, 1056):
        monkeypatch.setattr(tokens, "PROGRAMS", programs)
        assert_within_budget(projected, Layers(size[-1]), random(*size, dtype=dtype), dtype)


@DTYPES
@SIZES
def test_a_norm_and_an_mlp(size: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for programs in (1, 5, 1056):
        monkeypatch.setattr(tokens, "PROGRAMS", programs)
        assert_within_budget(fed, Layers(size[-1]), random(*size, dtype=dtype), dtype)


@DTYPES
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(act: str, dtype: torch.dtype) -> None:
    assert_within_budget(fed, Layers(24, act, hidden=100), random(2, 5, 7, 24, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_x_may_be_in_fp32(dtype: torch.dtype) -> None:
    for call in (projected, fed):
        assert_within_budget(call, Layers(24), random(2, 5, 7, 24), dtype)


@DTYPES
def test_a_mean_that_is_large_beside_the_deviation(dtype: torch.dtype) -> None:
    assert_within_budget(projected, Layers(32), random(2, 4, 4, 32, dtype=dtype) + 100.0, dtype)


@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
def test_rows_beyond_the_last_add_nothing() -> None:
    """An eps of 0 makes their norm no number."""
    layers = Layers(16)
    layers.norm.eps = 0.0
    assert_within_budget(projected, layers, random(1, 5, 5, 16), torch.float32)


def test_without_an_offset() -> None:
    assert_within_budget(projected, Layers(16, offset=False), random(2, 3, 3, 16), torch.float32)


def test_only_what_needs_a_gradient_gets_one() -> None:
    layers, x = Layers(16), random(2, 3, 3, 16)
    layers.norm.weight.requires_grad_(False)
    layers.second.bias.requires_grad_(False)
    _, y = fed(layers, x, ours=True)
    y.sum().backward()
    assert layers.norm.bias.grad is not None
    assert layers.norm.weight.grad is None
    assert layers.second.bias.grad is None


@pytest.mark.parametrize(
    "name", ["norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.drop", "mlp.fc2", "norm1", "attn.qkv", "attn"]
)
def test_a_hook_is_called_in_a_compiled_layer_too(name: str) -> None:
    layer = AttentionLayer(MaxAttention(32)).to(DEVICE).train()
    layer.get_submodule(name).register_forward_hook(lambda module, given, out: 2 * out)
    x = random(2, 7, 7, 32)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selective", [False, True])
def test_a_compiled_layer_keeps_what_products_and_attention_need(selective: bool) -> None:
    """Of x's size: it, what attention makes, its update; qkv, thrice as large; the hidden layer. No norm of x."""
    width = 32
    layer = AttentionLayer(MaxAttention(width, rel_pos="none", backend="naive")).to(DEVICE).train()
    layer.selective = selective
    x = random(1, 7, 14, width).requires_grad_()
    kept, called = kept_and_recomputed(layer, x)
    assert sum(size == 4 * x.numel() for size in kept) == 1
    assert not any("addmm" in target for target in called)
    if tokens.COMPILED:
        assert sum("triton_kernel_wrapper" in target for target in called) == 3
    else:
        names = ("layer_norm_linear_backward", "activation_linear_backward")
        assert [sum(f"{name}.default" in target for target in called) for name in names] == [2, 1]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_what_it_does_not_serve_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = Layers(24), random(2, 5, 7, 24)

    def serves(layers: Layers, x: Tensor = x) -> bool:
        return gpu.serves_mlp(layers.norm, layers.first, layers.act, layers.drop, layers.second, x)

    def changed(name: str, value: nn.Module | nn.Parameter) -> Layers:
        other = copy.deepcopy(layers)
        owner, _, last = name.rpartition(".")
        setattr(other.get_submodule(owner), last, value)
        return other

    assert not serves(layers)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert serves(layers)
    assert not serves(layers, x.double())
    assert not serves(layers, x.transpose(1, 2))
    assert not serves(layers, x.bfloat16())
    assert not serves(changed("norm", nn.RMSNorm(24)))
    assert not serves(changed("norm", nn.LayerNorm((7, 24))))
    assert not serves(changed("norm", nn.LayerNorm(24, bias=False)))
    assert not serves(changed("norm", nn.LayerNorm(24, elementwise_affine=False)))
    assert not serves(changed("first", nn.Linear(24, 72, bias=False)))
    assert not serves(changed("second", type("Other", (nn.Linear,), {})(72, 24)))
    assert not serves(changed("act", nn.Tanh()))
    assert not serves(changed("drop", nn.Dropout(0.1)))
    assert not serves(changed("drop", nn.Identity()))
    assert not serves(changed("second.bias", nn.Parameter(layers.second.bias.bfloat16())))
    assert not serves(copy.deepcopy(layers).bfloat16())
    with torch.autocast(DEVICE, torch.bfloat16):
        assert serves(layers)
        assert serves(layers, x.bfloat16())
        assert serves(copy.deepcopy(layers).bfloat16())
    assert not serves(changed("first", nn.utils.parametrizations.weight_norm(nn.Linear(24, 72))))
    weight = layers.second.weight.detach()
    assert not serves(changed("second.weight", nn.Parameter(TwoTensor(weight, weight))))
    for module in (layers.norm, layers.first, layers.act, layers.drop, layers.second):
        hook = module.register_forward_hook(lambda *given: None)
        assert not serves(layers)
        hook.remove()
    with torch.no_grad():
        assert not serves(layers)
    with forward_ad.dual_level():
        assert not serves(layers, forward_ad.make_dual(x, x))
    monkeypatch.setattr(serving, "MOST_CHANNELS", 23)
    assert not serves(layers)


def test_an_export_holds_pytorchs_own_operators() -> None:
    layer = AttentionLayer(MaxAttention(32)).to(DEVICE).train()
    exported = torch.export.export(layer, (random(2, 7, 7, 32),))
    called = [str(node.target) for node in exported.graph.nodes]
    assert any("layer_norm" in target for target in called)
    assert not any("maxattn_nn" in target or "triton" in target for target in called)


def test_are_operators() -> None:
    x, hidden = random(2, 3, 5, 8), random(2, 3, 5, 16)
    weight, bias = random(8, seed=1), random(8, seed=2)
    first, second, offset = random(16, 8, seed=3), random(8, 16, seed=4), random(16, seed=5)
    leaves = [one.clone().requires_grad_() for one in (x, weight, bias, first, offset)]
    opcheck(tokens.layer_norm_linear, (*leaves[:3], 1e-3, *leaves[3:]))
    opcheck(tokens.layer_norm_linear_backward, (x, hidden, x, weight, bias, 1e-3, first))
    leaves = [one.clone().requires_grad_() for one in (hidden, offset, second, bias)]
    opcheck(tokens.activation_linear, (*leaves[:2], "gelu", *leaves[2:]))
    opcheck(tokens.activation_linear_backward, (x, hidden, offset, "gelu", second))
