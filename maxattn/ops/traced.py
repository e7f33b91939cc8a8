"""`max_sa` while a compiler traces it; imported only then, for importing torch's compiler takes a second."""

from __future__ import annotations

from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from maxattn.ops import dispatch, registry
from maxattn.ops.call import Call, check, check_types, describe, problem_of
from maxattn.ops.contract import Axis


def max_sa(
    qkv: Tensor,
    axis: Axis,
    window: int | tuple[int, int],
    bias: Tensor | None,
    scale: float | None,
    dropout_p: float,
    backend: str | None,
) -> Tensor:
    """As `maxattn.max_sa`: the choice becomes a constant of the graph, the chosen backend's code is traced."""
    check_types(qkv, axis, bias, scale, dropout_p, backend)
    call = describe(qkv, axis, window, bias, scale, dropout_p)
    sizes = tuple(size if has_static_value(size) else None for size in qkv.shape[:3])
    shape = (*sizes, *(index(size) for size in qkv.shape[3:]))
    bias_shape = None if bias is None else tuple(index(size) for size in bias.shape)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError("dropout_p must be at least 0 and below 1")
    # The compiler may hold floats as symbols, so the choice is told only that there is dropout, not how much.
    floats = None, 0.5 if dropout_p > 0 else 0.0
    facts = (shape, 1, *call[2:5], bias_shape, *call[6:11], *floats, call.deterministic)
    name, capability, exporting = _choose_constant(facts, backend, dispatch.traced_override())
    problem = problem_of(call._replace(shape=shape), capability, compiling=True, exporting=exporting)
    return dispatch.execute(registry.BACKENDS[name], qkv, bias, problem)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _choose_constant(
    facts: tuple[Any, ...], argument: str | None, context: str | None
) -> tuple[str, tuple[int, int] | None, bool]:
    call, exporting = Call(*facts), torch.compiler.is_exporting()
    check(call)
    capability = dispatch.compute_capability(call.device)
    problem = problem_of(call, capability, compiling=True, exporting=exporting)
    return dispatch.choose(problem, *dispatch.asked(argument, context)).name, capability, exporting
