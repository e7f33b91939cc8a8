"""A network whose forward pass is recorded: as a CUDA graph; without a GPU, as a graph of operators and constants."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from random_weights import randomise
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import maxattn
from maxattn.inference import InferenceMaxViT, graphs
from maxattn.inference.graphs import Graphs, Memory, Replay
from maxattn.visualize import attended

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # of NumPy, interpreting
SMALL = {
    "num_classes": 5,
    "head_dim": 8,
    "window": 3,
    "stem": {"width": 8},
    "stages": [{"width": 16, "depth": 1, "layers": ["mbconv", "block"]}],
}


class Traces:
    """A replay runs no code of the layers, and reads their tensors where they were: as one of a CUDA graph."""

    def serves(self, x: Tensor) -> bool:
        return True

    def record(self, forward: Replay, x: Tensor, memory: Memory | None) -> tuple[Replay, Memory]:
        def traced(x: Tensor) -> Tensor:
            return forward(x)

        return make_fx(traced)(x), Memory(None, None)


@pytest.fixture(autouse=True)
def recorded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(graphs, "CUDAGraphs", Traces)


def fast(**overrides: Any) -> InferenceMaxViT:
    model = maxattn.build(SMALL, **overrides)
    randomise(model)
    moved = maxattn.optimize_for_inference(model).to(DEVICE, torch.float16)
    return maxattn.optimize_for_inference(moved, compile=True)


def images(batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 8, 6, generator=generator).to(DEVICE, torch.float16)


def recordings(network: InferenceMaxViT) -> int:
    assert isinstance(network._graph, Graphs)
    return len(network._graph._replays)


def test_a_replay_computes_what_the_layers_do() -> None:
    network, x = fast(), images(2)
    for image in (x, x.flip(0), x[:1], -x):
        assert network(image).equal(copy.deepcopy(network)(image))
    assert recordings(network) == 2


if DEVICE == "cuda":

    def test_a_replay_writes_to_nothing_that_a_compiler_frees_when_it_records() -> None:
        network, x = fast(), images(2)
        expected = network(x)
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        others = torch.full((free // 8,), torch.nan, device=DEVICE)
        assert network(x).equal(expected)
        assert others.isnan().all()


def test_who_watches_is_shown_each_call() -> None:
    network, x = fast(), images()
    network(x)
    assert [len(attended(network, x)) for _ in range(2)] == [1, 1]
    assert recordings(network) == 1


def test_the_choice_of_a_backend_is_another_recording() -> None:
    network, x = fast(), images()
    network(x)
    for _ in range(2):
        with maxattn.use_backend("naive"):
            network(x)
    assert recordings(network) == 2
    next(network.attentions()).backend = "naive"
    network(x)
    assert recordings(network) == 3


@pytest.mark.parametrize(
    "change",
    [
        lambda part: part.load_state_dict({name: torch.zeros_like(t) for name, t in part.state_dict().items()}),
        lambda part: [tensor.zero_() for tensor in part.float().half().parameters()],
    ],
    ids=["loaded", "moved"],
)
@pytest.mark.parametrize("name", ["head.norm", "stages.0.blocks.0.layers.0.conv2"])
def test_a_part_loaded_or_moved_is_recorded_anew(name: str, change: Callable[[Any], Any]) -> None:
    network, x = fast(), images()
    before = network(x)
    change(network.get_submodule(name))
    assert not network(x).equal(before)
    assert network(x).equal(copy.deepcopy(network)(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_derivatives_are_not_replayed() -> None:
    # Without a product after the head's norm, whose tangents PyTorch widens on a GPU.
    network, x = fast(head={"kind": "linear"}, num_classes=0), images()
    network(x)
    with torch.autograd.forward_ad.dual_level(), maxattn.use_backend("naive"):
        out = network(torch.autograd.forward_ad.make_dual(x, x))
        assert torch.autograd.forward_ad.unpack_dual(out).tangent is not None
    x.requires_grad_()
    assert network(x).requires_grad


@pytest.mark.parametrize(
    ("overrides", "records"),
    [
        ({}, True),
        ({"stages.*.layers": ["block", "grid"]}, True),
        ({"conv_norm": "group_norm"}, False),
        ({"kernel_size": 5}, False),
    ],
    ids=str,
)
def test_what_a_compiler_could_still_fuse_is_compiled(overrides: dict[str, Any], records: bool) -> None:
    assert isinstance(fast(**overrides)._graph, Graphs) == records
