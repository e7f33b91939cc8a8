"""FlexAttention on windows, compiled once for each family of problems.

PyTorch's compiler keeps what it has compiled with the code object of a function, and beyond 8 versions of one (its
recompile limit) runs it uncompiled, which for FlexAttention means many times slower. So every family has a code object
of its own, the sizes that differ within it are symbols, and a limit that is reached all the same is an error, upon
which the family starts anew: no limit makes it run uncompiled.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from operator import getitem
from threading import RLock
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

MOST = 256
"""Families that are kept, the latest used; one that comes back after as many others is compiled again."""

COMPILER = "inductor"

LOCK = RLock()
"""Held in every call: while one thread compiles, PyTorch refuses to run compiled code in the others."""


class Family(NamedTuple):
    """What the compiled code takes for granted. `tokens` is None where windows are cut off, of any size."""

    tokens: int | None
    heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    bias: bool
    requires_grad: bool
    bias_requires_grad: bool
    scale: float
    inference: bool

    @property
    def differentiated(self) -> bool:
        return self.requires_grad or self.bias_requires_grad


def attend(family: Family, qkv: Tensor, bias: Tensor | None) -> Tensor:
    """Attention of `family` within each of `qkv (windows, tokens, 3, heads, head_dim)`, compiled at the first call."""
    symbols = (0,) if family.tokens is not None else (0, 2)
    q, k, v = (_marked(x.transpose(1, 2), symbols) for x in qkv.contiguous().unbind(2))
    if bias is not None:
        bias = _marked(bias.contiguous(), (1, 2) if family.tokens is None else ())
    with LOCK, torch.set_grad_enabled(family.differentiated):
        return compiled(family)(q, k, v, bias).transpose(1, 2)


def flex_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """PyTorch's FlexAttention of `(windows, heads, tokens, head_dim)` with `bias (heads, tokens, tokens)` in fp32.

    For a compiler to trace. On a GPU always by the one kernel for sequences of any length, and fp32 without tf32.
    """
    from torch.nn.attention.flex_attention import flex_attention

    def add_bias(score: Tensor, window: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score if bias is None else score + bias[head, query, key]

    options: Any = {} if q.device.type == "cpu" else {"BACKEND": "TRITON", "FLOAT32_PRECISION": "'ieee'"}
    out: Tensor = flex_attention(q, k, v, score_mod=add_bias, scale=scale, kernel_options=options)
    return out


class Compiled:
    """FlexAttention for one family."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._function = self._new()

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        from torch._dynamo.exc import FailOnRecompileLimitHit

        try:
            return self._function(q, k, v, bias)
        except FailOnRecompileLimitHit:
            self._function = self._new()
            return self._function(q, k, v, bias)

    def _new(self) -> Callable[..., Tensor]:
        scale = self._family.scale

        def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            return flex_attention(q, k, v, bias, scale)

        code = attend.__code__.replace()  # equal, but another object
        function = FunctionType(code, attend.__globals__, attend.__name__, None, attend.__closure__)
        generate = generate_trainable if self._family.differentiated else generate_code
        return torch.compile(function, fullgraph=True, dynamic=False, backend=generate)


compiled = lru_cache(maxsize=MOST)(Compiled)


def generate_code(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """What PyTorch's compiler makes of a graph that it has traced."""
    from torch._dynamo import lookup_backend

    return lookup_backend(COMPILER)(graph, inputs)


def generate_trainable(graph: GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """As `generate_code`, for a graph whose backward pass may run more than once.

    Its first run would else take over the memory of what the forward pass keeps for it, unless that is an output.
    """
    nodes, target = graph.graph, torch.ops.higher_order.flex_attention
    output = nodes.output_node()
    results: Any = output.args[0]
    with nodes.inserting_before(output):
        (call,) = nodes.find_nodes(op="call_function", target=target)
        kept = [nodes.call_function(getitem, (call, 1))]  # the log-sum-exp
        kept += [node for node in call.all_input_nodes if node.op in ("call_function", "call_method")]
        output.args = ((*results, *(nodes.call_method("detach", (node,)) for node in kept)),)
    graph.recompile()
    function = generate_code(graph, inputs)
    return lambda *args: function(*args)[: len(results)]


def _marked(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """`x`, the compiler told to leave these sizes open; those of 1 it never does."""
    for dim in dims:
        if x.shape[dim] > 1:
            torch._dynamo.mark_dynamic(x, dim)
    return x
