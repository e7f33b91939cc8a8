"""Batch norm, activation, squeeze-excitation and a convolution by our own kernels: within twice PyTorch's error."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from maxattn.nn import MBConv, gpu
from maxattn.nn.basic import ACTIVATIONS
from maxattn.nn.conv import SqueezeExcite
from maxattn.nn.gpu import batch_norm, squeeze
from tests.nearness import assert_near
from tests.nn.graphs import kept_and_recomputed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning"),  # of NumPy, interpreting
    pytest.mark.filterwarnings("ignore:Attempting to run cuBLAS:UserWarning"),  # first of all in a thread
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def images(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    x = torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last)


class Layers(nn.Module):
    def __init__(self, channels: int, act: str = "gelu_tanh", hidden: int = 6, width: int = 20) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3), ACTIVATIONS[act]()
        self.se, self.conv = SqueezeExcite(channels, hidden), nn.Conv2d(channels, width, 1)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                spread = max(1, parameter[0].numel()) ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) / spread)
        self.to(DEVICE)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(self.se(self.act(self.norm(x))))
        return out

    def by_our_kernels(self, x: Tensor) -> Tensor:
        return gpu.squeeze_excite_conv(self.norm, self.act, self.se.parts, self.conv, x)


def results(layers: Layers, x: Tensor, dtype: torch.dtype, *, ours: bool) -> dict[str, Tensor]:
    """The output, all gradients and the statistics. `dtype` is autocast's, if it is of fewer bits."""
    layers, x = copy.deepcopy(layers), x.detach().clone(memory_format=torch.channels_last).requires_grad_()
    few = dtype in (torch.float16, torch.bfloat16)
    with torch.autocast(DEVICE, dtype) if few else nullcontext():
        y = layers.by_our_kernels(x) if ours else layers(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last) or not ours
    parameters = dict(layers.named_parameters())
    dy = images(*y.shape, dtype=torch.float16, seed=9).to(dtype)
    gradients = torch.autograd.grad(y, (x, *parameters.values()), dy)
    found = dict(zip(("y", "x", *parameters), (y.detach(), *gradients), strict=True))
    return found | {name: value for name, value in layers.named_buffers() if "running" in name}


def assert_within_budget(layers: Layers, x: Tensor, dtype: torch.dtype) -> None:
    exact = results(copy.deepcopy(layers).double(), x.double(), torch.float64, ours=False)
    plain, ours = (results(layers, x, dtype, ours=which) for which in (False, True))
    added = summands(copy.deepcopy(layers).double(), x.double())
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert (value.dtype, value.shape) == (plain[name].dtype, plain[name].shape), name
        assert_near(value, plain[name], exact[name], dtype, added.get(name))


def summands(layers: Layers, x: Tensor) -> dict[str, Tensor]:
    """The size of what is added up in the gradients of the norm's weight and bias, in fp64."""
    z = layers.norm(x)
    y = layers.conv(layers.se(layers.act(z)))
    (g,) = torch.autograd.grad(y, z, images(*y.shape, dtype=torch.float16, seed=9).double())
    weight, bias = (one.view(-1, 1, 1) for one in (layers.norm.weight, layers.norm.bias))
    terms = {"norm.weight": g * (z - bias) / weight, "norm.bias": g}
    return {name: one.detach().abs().sum((0, 2, 3)) for name, one in terms.items()}


@DTYPES
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_every_activation(act: str, dtype: torch.dtype) -> None:
    assert_within_budget(Layers(24, act), images(3, 24, 9, 7, dtype=dtype), dtype)


@DTYPES
@pytest.mark.parametrize("size", [(2, 3, 3, 3), (5, 7, 1, 1), (2, 200, 5, 3), (2, 64, 14, 13)], ids=str)
def test_any_size_in_one_part_or_many(
    size: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows in (1, 50, 1024):
        monkeypatch.setattr(batch_norm, "MOST_ROWS", rows)
        assert_within_budget(Layers(size[1]), images(*size, dtype=dtype), dtype)


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
def test_pixels_beyond_the_last_add_nothing() -> None:
    """With a mean far from 0 their activation, that of 0, is infinite in fp16."""
    layers, x = Layers(8), images(2, 8, 7, 7, dtype=torch.float16)
    with torch.no_grad():
        layers.norm.weight.fill_(20.0)
    x[:, 3] = x[:, 3] * 0.5 - 3000
    assert all(value.isfinite().all() for value in results(layers, x, torch.float16, ours=True).values())


def test_only_what_needs_a_gradient_gets_one() -> None:
    layers = Layers(8)
    layers.norm.bias.requires_grad_(False)
    layers.conv.weight.requires_grad_(False)
    layers.by_our_kernels(images(2, 8, 3, 3)).sum().backward()
    assert layers.norm.weight.grad is not None
    assert layers.norm.bias.grad is None
    assert layers.conv.weight.grad is None


@pytest.mark.parametrize("selective", [False, True])
def test_a_compiled_mbconv_keeps_what_its_convolutions_make(selective: bool) -> None:
    mbconv = MBConv(16, 16, se_hidden=4).to(DEVICE, torch.bfloat16).train()
    mbconv.selective = selective
    x = images(2, 16, 6, 5, dtype=torch.bfloat16).permute(0, 2, 3, 1).detach().requires_grad_()
    kept, called = kept_and_recomputed(mbconv, x)
    assert sum(size == 4 * x.numel() for size in kept) == 2
    assert max(kept) == 4 * x.numel()
    assert not any("moments" in target for target in called)
    assert not any("aten.convolution.default" in target for target in called)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_what_it_does_not_serve_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = Layers(8).bfloat16(), images(2, 8, 4, 4, dtype=torch.bfloat16)

    def serves(layers: Layers = layers, x: Tensor = x) -> bool:
        return gpu.serves_squeeze_excite(layers.norm, layers.act, layers.se, layers.se.parts, layers.conv, x)

    def changed(name: str, module: nn.Module) -> Layers:
        other = copy.deepcopy(layers)
        owner, _, last = name.rpartition(".")
        setattr(other.get_submodule(owner), last, module.bfloat16())
        return other

    assert not serves()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert serves()
    assert not serves(x=x.contiguous())
    assert not serves(x=x.half())
    assert not serves(copy.deepcopy(layers).float(), x.float())
    assert not serves(copy.deepcopy(layers).eval())
    assert not serves(changed("norm", nn.GroupNorm(2, 8)))
    assert not serves(changed("act", nn.Tanh()))
    assert not serves(changed("se.act", nn.ReLU()))
    assert not serves(changed("se.fc1", nn.Conv2d(8, 6, 3, padding=1)))
    assert not serves(changed("se.fc2", nn.Conv2d(6, 8, 1, bias=False)))
    assert not serves(changed("conv", nn.Conv2d(8, 20, 1, groups=2)))
    assert not serves(changed("conv", nn.Conv2d(8, 20, 1, stride=2)))
    assert not serves(changed("conv", nn.Conv2d(8, 20, 1, padding=1)))
    assert not serves(changed("conv", nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 20, 1))))
    for module in (layers.norm, layers.act, layers.se, *layers.se.parts, layers.conv):
        hook = module.register_forward_hook(lambda *given: None)
        assert not serves()
        hook.remove()
    with torch.no_grad():
        assert not serves()


def test_are_operators() -> None:
    x = images(2, 8, 3, 5)
    weight, bias = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    down, up, matrix = (images(*size, 1, 1).flatten(1) for size in ((3, 8), (8, 3), (5, 8)))
    norm = (bias, weight, weight, weight.clone().requires_grad_(), bias.clone().requires_grad_())
    offsets = down[:, 0].contiguous(), bias, matrix[:, 0].contiguous()
    matrices = [
        one.detach().clone().requires_grad_() for pair in zip((down, up, matrix), offsets, strict=True) for one in pair
    ]
    opcheck(squeeze.squeeze_excite_conv, (x.clone().requires_grad_(), *norm, "gelu", *matrices))
    dout, pooled, hidden = images(2, 5, 3, 5), x.mean((2, 3)), images(2, 3, 1, 1).flatten(1)
    given = (dout, x, bias, weight, weight, bias, "gelu", down, up, matrix, pooled, hidden, pooled)
    opcheck(squeeze.squeeze_excite_conv_backward, given)
