"""Gradient checkpointing: less is kept for the backward pass, and nothing that is computed changes."""

from __future__ import annotations

import copy
from collections import Counter
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

import maxattn
from maxattn.nn import AttentionLayer, MaxAttention, MaxViT, MBConv
from maxattn.nn.checkpointing import Checkpointing, Selective
from maxattn.ops.naive import Naive
from maxattn.ops.registry import registered
from tests.nn.graphs import kept_and_recomputed


class Counting(TorchDispatchMode):
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ran[str(func)] += 1
        return func(*args, **(kwargs or {}))


def small(**overrides: object) -> MaxViT:
    torch.manual_seed(0)
    spec = {
        "in_chans": 2,
        "num_classes": 5,
        "head_dim": 4,
        "window": 3,
        "stem": {"width": 4},
        "stages": [{"width": 8, "depth": 1}, {"width": 16, "depth": 2}],
    }
    return maxattn.build(spec, **overrides)


@pytest.mark.parametrize("enable", ["selective", True])
@pytest.mark.parametrize("fields", [{}, {"conv_norm": "group_norm", "proj_drop": 0.3, "drop_path_rate": 0.3}])
def test_gradients_and_running_statistics_are_the_same(fields: dict[str, Any], enable: Checkpointing) -> None:
    model, x = small(**fields), torch.randn(2, 2, 10, 11)
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing(enable)
    for network in (model, plain):
        torch.manual_seed(0)
        network(x).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad.equal(theirs.grad), name
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert ours.equal(theirs), name


def test_selective_computes_no_product_again() -> None:
    model, x = small(se_ratio=0), torch.randn(2, 2, 10, 11)

    def again(enable: Checkpointing) -> list[int]:
        model.set_grad_checkpointing(enable)
        loss = model(x).square().sum()
        with Counting() as counting:
            loss.backward()
        names = ("convolution", "addmm", "native_batch_norm", "gelu", "native_layer_norm")
        return [counting.ran[f"aten.{name}.default"] for name in names]

    layers = 3  # of each kind: MBConv, block and grid
    assert again(False) == [0, 0, 0, 0, 0]
    assert again("selective") == [0, 0, 1 + 3 * layers, 1 + 2 * layers + 2 * layers, 4 * layers]
    assert all(again(True))


@pytest.mark.parametrize(("enable", "most"), [("selective", 0.6), (True, 0.2)])
def test_less_is_kept(enable: Checkpointing, most: float) -> None:
    x = torch.randn(4, 3, 56, 56)

    def kept(enable: Checkpointing) -> int:
        model = maxattn.build("nano", grad_checkpointing=enable)
        with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profile:
            logits = model(x)
        del logits
        return sum(event.self_cpu_memory_usage for event in profile.key_averages())

    assert kept(enable) < most * kept(False)


def test_the_spec_says_which_stages_checkpoint() -> None:
    model = small(grad_checkpointing="selective", **{"stages.0.grad_checkpointing": False})
    assert [stage.checkpointing for stage in model.stages] == [False, "selective"]
    assert [stage.checkpointing for stage in maxattn.build(model.spec).stages] == [False, "selective"]
    for enable in (True, "selective", False):
        model.set_grad_checkpointing(enable)
        assert [stage.checkpointing for stage in model.stages] == [enable] * 2
        assert [stage.checkpointing for stage in maxattn.build(model.spec).stages] == [enable] * 2
        parts = [module for module in model.modules() if isinstance(module, Selective)]
        assert {part.selective for part in parts} == {enable == "selective"}


def test_it_recomputes_with_the_backend_that_was_forced() -> None:
    class Counting(Naive):
        name = "counting"
        calls = 0

        def attend(self, qkv: Tensor, bias: Tensor | None, problem: maxattn.Problem) -> Tensor:
            Counting.calls += 1
            return super().attend(qkv, bias, problem)

    model = small()
    model.set_grad_checkpointing()
    with registered(Counting()):
        with maxattn.use_backend("counting"):
            loss = model(torch.randn(2, 2, 10, 11)).square().sum()
        backward = Thread(target=loss.backward)
        backward.start()
        backward.join()
    assert Counting.calls == 2 * len(list(model.attentions()))
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("enable", ["selective", True])
def test_compiled_it_is_the_same(enable: Checkpointing) -> None:
    model, x = small(), torch.randn(2, 2, 8, 8)
    plain = copy.deepcopy(model)
    model.set_grad_checkpointing(enable)
    torch.compile(model, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    for (name, ours), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


@pytest.mark.parametrize("layer", ["mbconv", "attention"])
def test_compiled_selective_computes_no_product_again(layer: str) -> None:
    """And keeps less than what is kept without it; a compiler is free to keep what costs more to compute again."""
    x = torch.randn(2, 8, 8, 16, requires_grad=True)

    def kept(selective: bool) -> int:
        torch.manual_seed(0)
        one = MBConv(16, 16, norm="group_norm") if layer == "mbconv" else AttentionLayer(MaxAttention(16, head_dim=8))
        one.train().selective = selective
        sizes, called = kept_and_recomputed(one, x)
        products = [target for target in called if "addmm" in target or "aten.convolution.default" in target]
        assert len(products) == (2 if selective and layer == "mbconv" else 0)  # the two of squeeze-excitation
        return sum(sizes)

    assert kept(True) < 0.8 * kept(False)
