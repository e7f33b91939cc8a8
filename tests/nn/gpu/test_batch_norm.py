"""Batch norm with its activation by our own kernels: within twice the error that PyTorch's have in the same dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.autograd import forward_ad
from torch.library import opcheck
from torch.nn.parallel import DistributedDataParallel

import maxattn
from maxattn.nn import MBConv, gpu
from maxattn.nn.basic import ACTIVATIONS
from maxattn.nn.checkpointing import Checkpointing
from maxattn.nn.gpu import batch_norm, serving
from maxattn.nn.gpu.launching import parts_of
from maxattn.testing.budget import UNITS
from tests.nearness import assert_near
from tests.nn.graphs import kept_and_recomputed

OPERATORS = ("maxattn_nn.moments", "maxattn_nn.batch_norm_act_backward")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # of NumPy, interpreting
SPEC = {"stem": {"width": 8}, "stages": [{"width": 16, "depth": 2}], "head_dim": 8, "window": 7, "num_classes": 5}
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def images(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*size, generator=generator).to(DEVICE, dtype)
    return x.contiguous(memory_format=torch.channels_last)


def layer(channels: int, act: str) -> tuple[nn.BatchNorm2d, nn.Module]:
    norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3)
    generator = torch.Generator().manual_seed(channels)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(channels, generator=generator))
    return norm.to(DEVICE), nn.Identity() if act == "none" else ACTIVATIONS[act]()


def results(norm: nn.BatchNorm2d, act: nn.Module, x: Tensor, dy: Tensor, *, ours: bool) -> dict[str, Tensor]:
    """The output, all gradients and the statistics, in fp64."""
    norm, x = copy.deepcopy(norm), x.detach().clone(memory_format=torch.channels_last).requires_grad_()
    y = gpu.batch_norm_act(norm, act, x) if ours else act(norm(x))
    gradients = torch.autograd.grad(y, (x, norm.weight, norm.bias), dy.to(y.dtype))
    assert y.is_contiguous(memory_format=torch.channels_last)
    names = ("y", "dx", "dweight", "dbias", "running_mean", "running_var", "num_batches_tracked")
    found = (y, *gradients, norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return {name: value.detach().double() for name, value in zip(names, found, strict=True)}


def terms(norm: nn.BatchNorm2d, act: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """The size of what is added up, in fp64: where it cancels, a result is small beside its roundings."""
    rows, momentum, axes = x.double(), norm.momentum or 0.0, (0, 2, 3)
    var, mean = torch.var_mean(rows, axes, correction=0, keepdim=True)
    normal, weight = (rows - mean) * torch.rsqrt(var + norm.eps), norm.weight.double().view(1, -1, 1, 1)
    z = (normal * weight + norm.bias.double().view(1, -1, 1, 1)).detach().requires_grad_()
    (g,) = torch.autograd.grad(act(z), z, dy.double())
    return {
        "dx": (weight * torch.rsqrt(var + norm.eps) * g).abs(),
        "dweight": (g * normal).abs().sum(axes),
        "dbias": g.abs().sum(axes),
        "running_mean": momentum * rows.abs().mean(axes),
        "running_var": momentum * 2 * (rows * (rows - mean)).abs().mean(axes),
    }


def assert_within_budget(norm: nn.BatchNorm2d, act: nn.Module, x: Tensor, dy: Tensor) -> None:
    exact = results(copy.deepcopy(norm).double(), act, x.double(), dy.double(), ours=False)
    plain, ours = (results(norm, act, x, dy, ours=which) for which in (False, True))
    added = terms(norm, act, x, dy)
    for name, value in ours.items():
        eps = torch.finfo(x.dtype if name in ("y", "dx") else torch.float32).eps
        for order, units in ((float("inf"), UNITS["max"]), (2.0, UNITS["2-norm"])):
            allowed = 2 * torch.linalg.vector_norm(plain[name] - exact[name], order)
            allowed += units * eps * torch.linalg.vector_norm(exact[name], order)
            if name in added:
                allowed += units * torch.finfo(torch.float32).eps * torch.linalg.vector_norm(added[name], order)
            assert torch.linalg.vector_norm(value - exact[name], order) <= allowed, name


@DTYPES
@pytest.mark.parametrize("act", ["none", *ACTIVATIONS])
def test_every_activation(act: str, dtype: torch.dtype) -> None:
    size = (3, 24, 9, 7)
    assert_within_budget(*layer(24, act), images(*size, dtype=dtype), images(*size, dtype=dtype, seed=1))


@DTYPES
@pytest.mark.parametrize("size", [(1, 1, 1, 2), (2, 7, 1, 1), (1, 200, 5, 3), (2, 64, 31, 33), (4, 3, 40, 40)], ids=str)
def test_any_size_in_one_part_or_many(
    size: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_norm, "MERGED", {"BLOCK_P": 16, "BLOCK_C": 16})
    for programs in (1, 24, 1056):
        monkeypatch.setattr(batch_norm, "PROGRAMS", programs)
        norm, act = layer(size[1], "gelu_tanh")
        assert_within_budget(norm, act, images(*size, dtype=dtype), images(*size, dtype=dtype, seed=1))


@DTYPES
@pytest.mark.parametrize("deviations", [10.0, 300.0])
def test_a_mean_that_is_large_beside_the_deviation(deviations: float, dtype: torch.dtype) -> None:
    x = images(3, 16, 20, 11, dtype=dtype) + deviations
    norm, act = layer(16, "silu")
    assert_within_budget(norm, act, x, images(3, 16, 20, 11, dtype=dtype, seed=1))


def test_parts_fill_a_gpu_and_are_of_whole_tiles() -> None:
    assert parts_of(10**6, 32, 1056) == (960, 1042)
    assert parts_of(6272, 64, 33) == (192, 33)
    assert parts_of(5, 32, 1056) == (32, 1)
    assert batch_norm.parts_of_image(3136, 32) == (800, 4)
    assert batch_norm.parts_of_image(49, 32) == (64, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_statistics_of_few_bits_are_brought_forward_in_fp32(dtype: torch.dtype) -> None:
    """A variance of 160,000 is no number of fp16; a tenth of it is."""
    x = images(4, 8, 12, 12, dtype=dtype) * 400
    running = []
    for ours in (False, True):
        norm = nn.BatchNorm2d(8).to(DEVICE, dtype)
        (gpu.batch_norm_act(norm, nn.Identity(), x) if ours else norm(x)).sum().backward()
        running.append((norm.running_mean, norm.running_var))
    assert all(statistic.isfinite().all() for statistic in running[1])
    torch.testing.assert_close(*running)


@pytest.mark.parametrize("act", ["none", *ACTIVATIONS])
def test_what_is_not_a_number_stays_so(act: str) -> None:
    norm, activation = layer(8, act)
    x = images(2, 8, 3, 3)
    x[0, 3, 1, 1] = torch.nan
    y = gpu.batch_norm_act(norm, activation, x)
    assert y.isnan().any(dim=(0, 2, 3)).tolist() == [channel == 3 for channel in range(8)]
    assert y[:, 3].isnan().all()


def test_where_relu_is_off_a_gradient_that_is_not_finite_is_none() -> None:
    norm, act = layer(8, "relu")
    x, dy = images(2, 8, 3, 3), images(2, 8, 3, 3, seed=1)
    dy[norm(x) <= 0] = torch.inf
    assert all(value.isfinite().all() for value in results(norm, act, x, dy, ours=True).values())


def test_only_what_needs_a_gradient_gets_one() -> None:
    norm, act = layer(8, "gelu_tanh")
    norm.bias.requires_grad_(False)
    gpu.batch_norm_act(norm, act, images(2, 8, 3, 3)).sum().backward()
    assert norm.weight.grad is not None
    assert norm.bias.grad is None


def test_nothing_but_the_input_is_kept() -> None:
    norm, act = layer(8, "gelu_tanh")
    x, kept = images(2, 8, 9, 9), list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        gpu.batch_norm_act(norm, act, x)
    assert sum(each.numel() >= x.numel() for each in kept) == 1


def test_a_compiled_step_keeps_nothing_but_the_input() -> None:
    """What stands after the activation needs it for its gradient, and has it computed again."""
    norm, act = layer(8, "gelu_tanh")
    kept: list[int] = []

    def look(graph: torch.fx.GraphModule, given: list[Tensor]) -> Any:
        (outputs,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        computed = [one for one in outputs if one is not None and one.op != "placeholder"]
        kept.extend(one.meta["val"].numel() for one in computed)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=look, bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    torch._dynamo.reset()
    x = images(2, 8, 9, 9).requires_grad_()
    torch.compile(lambda x: gpu.batch_norm_act(norm, act, x).sin().sum(), backend=backend, fullgraph=True)(x).backward()
    assert kept
    assert max(kept) == 8


def test_a_network_trains_as_with_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    network = maxattn.build(SPEC).to(DEVICE).train()
    called: list[str] = []

    def look(graph: torch.fx.GraphModule, given: list[Tensor]) -> Any:
        parts = (part for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
        called.extend(str(node.target) for part in parts for node in part.graph.nodes)
        return aot_eager(graph, given)

    losses, statistics = [], []
    for devices in (serving.DEVICES, frozenset[str]()):
        monkeypatch.setattr(serving, "DEVICES", devices)
        torch._dynamo.reset()
        model = copy.deepcopy(network)
        compiled = torch.compile(model, backend=look, fullgraph=True)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for seed in range(3):
            loss = compiled(images(4, 3, 28, 28, seed=seed)).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        statistics.append([tensor for name, tensor in model.named_buffers() if "running" in name])
        assert all(int(m.num_batches_tracked) == 3 for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    torch.testing.assert_close(*statistics, rtol=1e-3, atol=1e-3)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert sum("maxattn_nn.moments" in target for target in called) == norms


@pytest.mark.parametrize("enable", [False, "selective", True])
def test_gradients_are_those_of_eager_code(enable: Checkpointing) -> None:
    """Whatever is computed again, of a network whose layers all have kernels here."""
    torch.manual_seed(0)
    network, x = maxattn.build(SPEC).to(DEVICE).train(), images(2, 3, 28, 28)
    found = []
    for how, dtype in ((None, torch.float64), (None, torch.bfloat16), (enable, torch.bfloat16)):
        one, given = copy.deepcopy(network), x
        if dtype == torch.float64:
            one, given = one.double(), x.double()
        if how is not None:
            one.set_grad_checkpointing(how)
            torch._dynamo.reset()
            called = torch.compile(one, backend="aot_eager", fullgraph=True)
        else:
            called = one
        with torch.autocast(DEVICE, dtype, enabled=dtype == torch.bfloat16):
            loss = called(given).square().sum()
        loss.backward()
        gradients = torch.cat(
            [parameter.grad.flatten() for parameter in one.parameters() if parameter.grad is not None]
        )
        statistics = torch.cat([buffer.flatten().double() for buffer in one.buffers()])
        found.append((gradients, statistics))
    (exact, moved), (plain, same), (ours, statistics) = found
    assert_near(ours, plain, exact, torch.bfloat16)
    assert_near(statistics, same, moved, torch.bfloat16)


@pytest.mark.parametrize("selective", [False, True])
def test_a_compilers_graph_holds_both_operators(selective: bool) -> None:
    """In training, with the running statistics. In fp32 squeeze-excitation is PyTorch's own."""
    graphs: list[torch.fx.GraphModule] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    mbconv = MBConv(16, 16, se_hidden=4).to(DEVICE).train()
    mbconv.selective = selective
    found = []
    for compiling in (False, True):
        one, x = copy.deepcopy(mbconv), images(2, 16, 6, 5).permute(0, 2, 3, 1).detach().requires_grad_()
        torch._dynamo.reset()
        call = torch.compile(one, backend=aot_autograd(fw_compiler=look), fullgraph=True) if compiling else one
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            call(x).square().sum().backward()
        found.append([x.grad, *(p.grad for p in one.parameters()), *one.buffers()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    called = [str(node.target) for node in graphs[-1].graph.nodes]
    if batch_norm.COMPILED:
        of_depthwise, of_sums = 2, 3 * 2
        assert sum("triton_kernel_wrapper" in target for target in called) == of_depthwise + of_sums
    else:
        forward, backward = (sum(f"{name}.default" in target for target in called) for name in OPERATORS)
        assert (forward, backward) == (0, 3)


@torch._dynamo.config.patch(optimize_ddp=False)
@pytest.mark.parametrize("ddp", [False, True])
def test_no_checkpoint_stops_ddp_from_splitting_a_graph(ddp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", object() if ddp else None)
    called: list[str] = []

    def look(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    norm, act = layer(8, "gelu_tanh")
    torch._dynamo.reset()
    torch.compile(lambda x: gpu.batch_norm_act(norm, act, x), backend=look, fullgraph=True)(images(2, 8, 3, 3))
    assert any("checkpoint" in target for target in called) != ddp


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_what_it_does_not_serve_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(2, 8, 4, 4)
    norm, act = layer(8, "gelu_tanh")
    assert not gpu.serves_batch_norm(norm, act, x)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert gpu.serves_batch_norm(norm, act, x)
    assert not gpu.serves_batch_norm(copy.deepcopy(norm).eval(), act, x)
    assert not gpu.serves_batch_norm(nn.GroupNorm(2, 8), act, x)
    assert not gpu.serves_batch_norm(nn.SyncBatchNorm(8), act, x)
    assert not gpu.serves_batch_norm(nn.BatchNorm2d(8, affine=False), act, x)
    assert not gpu.serves_batch_norm(nn.BatchNorm2d(8, track_running_stats=False), act, x)
    assert not gpu.serves_batch_norm(nn.BatchNorm2d(8, momentum=None), act, x)
    for parameter in ("weight", "bias"):
        without = copy.deepcopy(norm)
        setattr(without, parameter, None)
        assert not gpu.serves_batch_norm(without, act, x)
    assert not gpu.serves_batch_norm(norm, nn.Tanh(), x)
    assert not gpu.serves_batch_norm(norm, act, x.double())
    assert not gpu.serves_batch_norm(copy.deepcopy(norm).bfloat16(), act, x)
    assert not gpu.serves_batch_norm(norm, act, x.contiguous())
    assert not gpu.serves_batch_norm(norm, act, x[:1, :, :1, :1])
    with forward_ad.dual_level():
        assert not gpu.serves_batch_norm(norm, act, forward_ad.make_dual(x, x))
    hooked, replaced, other = copy.deepcopy(norm), copy.deepcopy(norm), type("Other", (nn.GELU,), {})()
    hooked.register_forward_hook(lambda *given: None)
    replaced.forward = lambda x: x
    assert not any(gpu.serves_batch_norm(changed, act, x) for changed in (hooked, replaced))
    assert not gpu.serves_batch_norm(norm, other, x)
    hook = nn.modules.module.register_module_forward_hook(lambda *given: None)
    assert not gpu.serves_batch_norm(norm, act, x)
    hook.remove()
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert not gpu.serves_batch_norm(norm, act, x)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("selective", [False, True])
def test_an_mbconv_with_a_stride_keeps_no_expanded_image(selective: bool, dtype: torch.dtype, autocast: bool) -> None:
    """Of weights in fp32 under autocast, too."""
    mbconv = MBConv(16, 16, stride=2, se_hidden=4).to(DEVICE, torch.float32 if autocast else dtype).train()
    mbconv.selective = selective
    x = images(2, 16, 6, 8, dtype=dtype).permute(0, 2, 3, 1).detach().requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
        kept, called = kept_and_recomputed(mbconv, x)
    assert max(kept) == x.numel()  # a quarter of what the convolution makes
    assert sum("convolution.default" in target for target in called) == 1


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_which_expanded_images_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    mbconv, x = MBConv(8, 8, stride=2).to(DEVICE).train(), images(2, 8, 4, 4)

    def serves(mbconv: MBConv = mbconv, **changed: nn.Module) -> bool:
        layers = (changed.get(name, getattr(mbconv, name)) for name in ("pre_norm", "conv1", "norm1", "act"))
        return gpu.serves_expanded(*layers, x)

    assert not serves()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert serves()
    assert not serves(copy.deepcopy(mbconv).eval())
    assert not serves(copy.deepcopy(mbconv).bfloat16())
    assert not serves(pre_norm=nn.GroupNorm(2, 8))
    assert not serves(norm1=nn.GroupNorm(2, 32))
    assert not serves(norm1=copy.deepcopy(mbconv.norm1).eval())
    assert not serves(norm1=copy.deepcopy(mbconv.norm1).bfloat16())
    assert not serves(norm1=nn.BatchNorm2d(32, affine=False))
    assert not serves(norm1=nn.BatchNorm2d(32, momentum=None))
    assert not serves(conv1=copy.deepcopy(mbconv.conv1).bfloat16())
    assert not serves(act=nn.Tanh())
    assert not serves(conv1=nn.Conv2d(8, 32, 3, padding=1))
    assert not serves(conv1=nn.utils.parametrizations.spectral_norm(copy.deepcopy(mbconv.conv1)))
    for module in (mbconv.pre_norm, mbconv.conv1, mbconv.norm1, mbconv.act):
        hook = module.register_forward_hook(lambda *given: None)
        assert not serves()
        hook.remove()
    with torch.no_grad():
        assert not serves()
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", object())
    assert not serves()


def test_an_export_holds_pytorchs_own_operators() -> None:
    mbconv = MBConv(16, 16, se_hidden=4).to(DEVICE).train()
    exported = torch.export.export(mbconv, (images(2, 16, 6, 5).permute(0, 2, 3, 1),))
    called = [str(node.target) for node in exported.graph.nodes]
    assert any("batch_norm" in target for target in called)
    assert not any("maxattn_nn" in target or "triton" in target for target in called)


@pytest.mark.parametrize("act", ["none", "gelu"])
def test_are_operators(act: str) -> None:
    x = images(2, 8, 3, 5)
    weight, bias = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    opcheck(batch_norm.moments, (x, weight, 1e-3))
    given = (x.clone().requires_grad_(), bias, weight, weight, weight.clone().requires_grad_(), bias, act)
    opcheck(batch_norm.batch_norm_act, given)
    opcheck(batch_norm.batch_norm_act_backward, (x, x, bias, weight, weight, bias, act))
