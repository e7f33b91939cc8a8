"""The attention problems that a network poses."""

from __future__ import annotations

import torch
from torch import Tensor

from maxattn.build import build
from maxattn.nn import MaxAttention
from maxattn.ops.contract import Backend, Problem
from maxattn.ops.dispatch import use_backend
from maxattn.ops.registry import registered
from maxattn.spec import MaxViTSpec


class _Recorder(Backend):
    """Notes the problems it is given, and computes nothing."""

    name = "recorder"

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        self.problems.append(problem)
        return torch.empty_like(qkv[:, :, :, 0])


def network_problems(spec: MaxViTSpec, batch: int, img_size: tuple[int, int]) -> list[tuple[str, float, Problem]]:
    """Each attention layer's name, its dropout in training and its problem in fp32 without gradients.

    The problems are those of a forward pass on the meta device: where they run is for the caller to put in.

    Example:
        >>> import maxattn
        >>> layers = network_problems(maxattn.load_spec("nano"), 1, (32, 40))
        >>> name, dropout, problem = layers[0]
        >>> name, problem.height, problem.width
        ('stages.0.blocks.0.layers.1', 16, 20)
    """
    with torch.device("meta"):
        model = build(spec, backend=None).eval()
        images = torch.empty(batch, spec.in_chans, *img_size)
    recorder = _Recorder()
    with registered(recorder), use_backend(recorder.name), torch.no_grad():
        model(images)
    modules = [(name, module) for name, module in model.named_modules() if isinstance(module, MaxAttention)]
    return [
        (name.removesuffix(".attn"), module.attn_drop, problem)
        for (name, module), problem in zip(modules, recorder.problems, strict=True)
    ]
