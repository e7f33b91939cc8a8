"""What a compiled training step keeps for its backward pass, and what that calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition


def kept_and_recomputed(module: nn.Module, x: Tensor) -> tuple[list[int], list[str]]:
    """The sizes of the tensors that the forward graph makes and keeps, and what the backward graph calls."""
    kept, called = list[int](), list[str]()

    def forward(graph: torch.fx.GraphModule, given: list[Tensor]) -> Any:
        (outputs,) = (node.args[0] for node in graph.graph.nodes if node.op == "output")
        computed = [one for one in outputs[1:] if one is not None and one.op != "placeholder"]
        kept.extend(one.meta["val"].numel() for one in computed if isinstance(one.meta["val"], Tensor))
        return make_boxed_func(graph.forward)

    def backward(graph: torch.fx.GraphModule, given: list[Tensor]) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward, bw_compiler=backward, partition_fn=min_cut_rematerialization_partition
    )  # fmt: skip
    torch._dynamo.reset()
    torch.compile(module, backend=backend, fullgraph=True)(x).square().sum().backward()
    return kept, called
