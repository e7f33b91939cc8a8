"""Which backends compute the attention of a network that is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from maxattn.build import build
from maxattn.nn import MaxAttention
from maxattn.ops.contract import Problem
from maxattn.ops.dispatch import compute_capability
from maxattn.ops.max_sa import explain
from maxattn.spec import MaxViTSpec, pair

Asked = tuple[Problem, str | None]
"""What an attention layer asks for, and of which backend if it names one."""


def attention_problems(
    spec: MaxViTSpec, batch: int, dtype: torch.dtype, device: str, *, training: bool = False
) -> list[Asked]:
    """What each attention layer of a network will ask for; the network itself runs on the meta device.

    Weights in training are in fp32, and `dtype` is autocast's.
    """
    with torch.device("meta"):
        network = build(spec).to(torch.float32 if training else dtype).train(training)
        images = torch.empty(batch, spec.in_chans, *pair(spec.img_size), dtype=next(network.parameters()).dtype)
    capability = compute_capability(torch.device(device))
    found: list[Asked] = []

    def note(layer: MaxAttention, inputs: tuple[Tensor, ...], backend: str | None) -> None:
        qkv, bias = layer.project(*inputs)
        dropout_p = layer.attn_drop if training else 0.0
        problem = explain(qkv, layer.axis, layer.window, bias, layer.scale, dropout_p).problem
        found.append((replace(problem, dtype=dtype, device=device, compute_capability=capability), backend))

    for module in network.modules():
        if isinstance(module, MaxAttention):
            module.register_forward_pre_hook(partial(note, backend=module.backend))
            module.backend = "naive"
    with torch.set_grad_enabled(training):
        network(images)
    return found


def attention_backends(problems: Sequence[Asked], *, compiling: bool = False) -> str:
    """The backends that are chosen for them, in their order.

    Example:
        >>> import maxattn
        >>> attention_backends(attention_problems(maxattn.load_spec("nano"), 1, torch.float32, "cpu"))
        'sdpa'
    """
    asked = [explain(replace(problem, compiling=compiling), backend=backend) for problem, backend in problems]
    return ", ".join(dict.fromkeys(explanation.backend or "none" for explanation in asked))
