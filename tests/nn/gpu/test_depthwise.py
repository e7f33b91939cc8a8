"""A depthwise convolution by our own kernels: within twice the error that PyTorch's has in the same dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.autograd import forward_ad
from torch.library import opcheck

from maxattn.nn import gpu
from maxattn.nn.conv import Conv2d, same_padding
from maxattn.nn.gpu import depthwise
from maxattn.nn.gpu.launching import parts_of
from maxattn.testing.budget import UNITS

Pads = tuple[tuple[int, int], tuple[int, int]]
OPERATORS = ("maxattn_nn.depthwise.", "maxattn_nn.depthwise_backward.")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
KERNELS = pytest.mark.parametrize("kernel", [3, 5, 7])
STRIDES = pytest.mark.parametrize("stride", [1, 2])


def random(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*size, generator=generator).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last)


def same(x: Tensor, kernel: int, stride: int) -> Pads:
    rows, columns = (same_padding(size, kernel, stride) for size in x.shape[2:])
    return rows, columns


def symmetric(kernel: int) -> Pads:
    return (kernel // 2,) * 2, (kernel // 2,) * 2


def plain(x: Tensor, weight: Tensor, stride: int, pads: Pads) -> Tensor:
    padded = F.pad(x, (*pads[1], *pads[0]))
    return F.conv2d(padded, weight.to(x.dtype), None, stride, groups=x.shape[1])


def results(convolve: Any, x: Tensor, weight: Tensor, stride: int, pads: Pads) -> dict[str, Tensor]:
    """The output and the gradients, in fp64."""
    x, weight = x.detach().clone(memory_format=torch.channels_last).requires_grad_(), weight.detach().requires_grad_()
    y = convolve(x, weight, stride, pads)
    dx, dweight = torch.autograd.grad(y, (x, weight), random(*y.shape, dtype=torch.float16, seed=2).to(y.dtype))
    assert (y.dtype, dx.dtype, dweight.dtype) == (x.dtype, x.dtype, weight.dtype)
    return {name: value.detach().double() for name, value in (("y", y), ("dx", dx), ("dweight", dweight))}


def assert_within_budget(x: Tensor, weight: Tensor, stride: int, pads: Pads) -> None:
    """Sums in fp32 are granted roundings of what they add up, which may cancel."""
    exact = results(plain, x.double(), weight.double(), stride, pads)
    added = sizes(x, weight, stride, pads)
    coarse, ours = (results(convolve, x, weight, stride, pads) for convolve in (plain, depthwise.convolve))
    assert ours.keys() == exact.keys()
    for name, value in ours.items():
        assert value.shape == exact[name].shape
        eps = torch.finfo(weight.dtype if name == "dweight" else x.dtype).eps
        for order, units in ((float("inf"), UNITS["max"]), (2.0, UNITS["2-norm"])):
            allowed = 2 * torch.linalg.vector_norm(coarse[name] - exact[name], order)
            allowed += units * eps * torch.linalg.vector_norm(exact[name], order)
            allowed += units * torch.finfo(torch.float32).eps * torch.linalg.vector_norm(added[name], order)
            assert torch.linalg.vector_norm(value - exact[name], order) <= allowed, name


def sizes(x: Tensor, weight: Tensor, stride: int, pads: Pads) -> dict[str, Tensor]:
    """The size of what is added up in each result, in fp64."""
    x, weight = (value.detach().double().abs().requires_grad_() for value in (x, weight))
    y = plain(x, weight, stride, pads)
    dy = random(*y.shape, dtype=torch.float16, seed=2).double().abs()
    return dict(zip(("y", "dx", "dweight"), (y.detach(), *torch.autograd.grad(y, (x, weight), dy)), strict=True))


@DTYPES
@KERNELS
@pytest.mark.parametrize(("stride", "size"), [(1, (9, 5)), (2, (9, 6)), (2, (4, 5))], ids=str)
def test_either_padding(kernel: int, stride: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = random(1, 24, *size, dtype=dtype), random(24, 1, kernel, kernel, seed=1)
    for pads in {same(x, kernel, stride), symmetric(kernel)}:
        assert_within_budget(x, weight, stride, pads)


@DTYPES
@STRIDES
@pytest.mark.parametrize("size", [(1, 1, 6, 3), (1, 64, 9, 17), (3, 200, 2, 5)], ids=str)
def test_any_size_in_one_part_or_many(
    size: tuple[int, ...], stride: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for programs in (1, 8):
        monkeypatch.setattr(depthwise, "PROGRAMS", programs)
        x, weight = random(*size, dtype=dtype), random(size[1], 1, 3, 3, seed=1)
        assert_within_budget(x, weight, stride, same(x, 3, stride))


@STRIDES
@KERNELS
@pytest.mark.parametrize("size", [(1, 1), (2, 4)], ids=str)
def test_an_image_smaller_than_the_kernel(kernel: int, stride: int, size: tuple[int, int]) -> None:
    x, weight = random(1, 5, *size), random(5, 1, kernel, kernel, seed=1)
    for pads in {same(x, kernel, stride), symmetric(kernel)}:
        assert_within_budget(x, weight, stride, pads)


@STRIDES
@pytest.mark.parametrize("pads", [((0, 0), (0, 0)), ((2, 0), (1, 3)), ((5, 4), (0, 6))], ids=str)
def test_any_padding(pads: Pads, stride: int) -> None:
    assert_within_budget(random(1, 3, 8, 7), random(3, 1, 3, 3, seed=1), stride, pads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_weight_in_the_dtype_of_the_image(dtype: torch.dtype) -> None:
    x, weight = random(2, 8, 5, 4, dtype=dtype), random(8, 1, 3, 3, dtype=dtype, seed=1)
    assert_within_budget(x, weight, 2, same(x, 3, 2))


def test_tiles_and_parts() -> None:
    assert depthwise._block(3, 112) == (8, 64)
    assert depthwise._block(3, 4) == (4, 128)
    assert depthwise._tiles(112, 56, 8, 16) == 14 * 4
    assert parts_of(50176, 1, 264) == (191, 263)
    assert parts_of(3, 1, 0) == (3, 1)


@STRIDES
def test_what_is_not_a_number_stays_where_it_belongs(stride: int) -> None:
    x, weight = random(2, 8, 9, 7), random(8, 1, 3, 3, seed=1)
    x[1, 3, 8, 2] = torch.nan
    x.requires_grad_()
    weight.requires_grad_()
    found = []
    for convolve in (plain, depthwise.convolve):
        y = convolve(x, weight, stride, same(x, 3, stride))
        dy = torch.ones_like(y)
        dy[0, 5, 1, 1] = torch.nan
        dx, dweight = torch.autograd.grad(y, (x, weight), dy)
        found.append([y.isnan(), dx.isnan(), dweight.isnan().any((1, 2, 3))])
    torch.testing.assert_close(*found)


@STRIDES
@pytest.mark.parametrize("asked", ["x", "weight"])
def test_only_what_needs_a_gradient_gets_one(asked: str, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[str] = []
    launch = depthwise.launch

    def look(function: Any, programs: int) -> Any:
        launched.append(function.fn.__name__)
        return launch(function, programs)

    monkeypatch.setattr(depthwise, "launch", look)
    x, weight = random(1, 8, 4, 4), random(8, 1, 3, 3, seed=1)
    {"x": x, "weight": weight}[asked].requires_grad_()
    depthwise.convolve(x, weight, stride, same(x, 3, stride)).sum().backward()
    assert (x.grad is None, weight.grad is None) == (asked != "x", asked != "weight")
    of_x = "forward" if stride == 1 else "data_gradient"
    assert launched == ["forward", of_x if asked == "x" else "weight_gradient"]


@STRIDES
def test_a_compilers_graph_holds_both_operators(stride: int) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    conv = Conv2d(8, 8, 3, stride, groups=8, bias=False).to(DEVICE)

    def function(x: Tensor, weight: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return torch.func.functional_call(conv, {"weight": weight}, (x,))

    compiled = torch.compile(function, backend=aot_autograd(fw_compiler=look), fullgraph=True)
    x, weight = random(2, 8, 6, 5, dtype=torch.bfloat16), random(8, 1, 3, 3, seed=1)
    found = []
    for call in (function, compiled):
        leaves = [x.detach().clone(memory_format=torch.channels_last).requires_grad_(), weight.clone().requires_grad_()]
        torch._dynamo.reset()
        y = call(*leaves)
        y.sum().backward()
        found.append([y, *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    if depthwise.COMPILED:
        assert sum("triton_kernel_wrapper" in target for target in called) == 3
    else:
        assert [sum(target.startswith(name) for target in called) for name in OPERATORS] == [1, 1]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_what_it_does_not_serve_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    images = random(2, 8, 4, 4)

    def served(x: Tensor = images, dtype: torch.dtype = torch.float32, **changed: Any) -> bool:
        options = {"stride": 1, "groups": 8, "bias": False} | changed
        kernel = options.pop("kernel", 3)
        padding = options.pop("padding", kernel // 2 if isinstance(kernel, int) else 1)
        conv = nn.Conv2d(8, options.pop("out", 8), kernel, padding=padding, **options)
        return gpu.serves_depthwise(conv.to(DEVICE, dtype), x)

    assert not served()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert served()
    assert served(stride=2)
    assert not served(stride=3)
    assert not served(dilation=2)
    assert not served(bias=True)
    assert not served(padding=0)
    assert not served(padding_mode="reflect")
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False))
    assert not gpu.serves_depthwise(normed.to(DEVICE), images)
    assert not served(groups=1)
    assert not served(groups=4)
    assert not served(out=16)
    assert not served(kernel=(3, 5))
    assert not served(kernel=1)
    assert not served(images.bfloat16())
    assert not served(images.double(), torch.float64)
    assert not served(images.contiguous())
    assert not served(images[:0])
    with torch.no_grad():
        assert not served()
    with torch.autocast(DEVICE, torch.bfloat16):
        assert served(images.bfloat16())
        assert not served()
    with forward_ad.dual_level():
        assert not served(forward_ad.make_dual(images, images))
    convs = (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False).to(DEVICE) for _ in range(4))
    plain, hooked, replaced, elsewhere = convs
    transformed: list[bool] = []
    torch.func.grad(lambda x: [transformed.append(gpu.serves_depthwise(plain, x)), x.sum()][1])(images)
    torch.func.vmap(lambda x: [transformed.append(gpu.serves_depthwise(plain, x)), x][1])(images[None])
    assert gpu.serves_depthwise(plain, images)
    assert transformed == [False, False]
    hooked.register_forward_hook(lambda *given: None)
    replaced.forward = lambda x: x
    assert not any(gpu.serves_depthwise(conv, images) for conv in (hooked, replaced, elsewhere.to("meta")))
    hook = nn.modules.module.register_module_forward_pre_hook(lambda *given: None)
    assert not served()
    hook.remove()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert not served()


@STRIDES
def test_are_operators(stride: int) -> None:
    x, weight = random(2, 8, 3, 5), random(8, 1, 3, 3, seed=1)
    sizes = (3, 5) if stride == 1 else (2, 3)
    opcheck(depthwise.depthwise, (x.clone().requires_grad_(), weight.clone().requires_grad_(), stride, 1, 1, *sizes))
    dy = random(2, 8, *sizes, seed=2)
    for asked in ((True, True), (True, False), (False, True)):
        opcheck(depthwise.depthwise_backward, (dy, x, weight, stride, 1, 1, *asked))
