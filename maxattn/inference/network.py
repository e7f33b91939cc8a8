"""The network that `optimize_for_inference` returns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from maxattn.inference import gpu
from maxattn.inference.blocks import FusedMBConv
from maxattn.inference.convert import convert
from maxattn.inference.fixed import Changes, Fixed
from maxattn.inference.graphs import CUDAGraphs, Graphs
from maxattn.inference.layers import Fused
from maxattn.nn import MaxViT, MBConv
from maxattn.ops.dispatch import asked, eager_override
from maxattn.ops.tracing import values_alone

PLAIN = "do so with the plain model, then maxattn.optimize_for_inference(model)"
BYTES_AT_ONCE = 32 << 20
"""The largest tensor made of several images at once on the CPU. A larger one leaves the caches, and the system clears
fresh memory for each."""

SHAPES = 64
"""For how many sizes of images and batches compiled parts may be compiled; the tracer counts all parts as one."""


class Blocks(nn.Sequential):
    """Blocks in sequence, as one graph: the tracer skips the `forward` of PyTorch's own `Sequential`."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            x = block(x)
        return x


class DepthFirst(nn.Module):
    """Blocks in sequence; on the CPU, so few images at a time that what lies between the blocks stays small."""

    def __init__(self, blocks: Blocks, in_width: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.expansion = max(len(m.weight) for m in blocks.modules() if isinstance(m, Fused)) / in_width

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.blocks(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not values_alone(x)), self._frozen():
            parts = [self.blocks(part) for part in x.tensor_split(self._passes(x))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _passes(self, x: Tensor) -> int:
        if x.device.type != "cpu" or len(x) == 0:
            return 1
        at_once = max(1, int(BYTES_AT_ONCE / (x[0].nbytes * self.expansion)))
        return math.ceil(len(x) / at_once)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        """While compiled blocks run, and so whenever they are compiled: their weights are constants.

        As an option of `torch.compile` freezing goes unseen by the tracer, and does nothing.
        """
        if self.blocks._compiled_call_impl is None:
            yield
            return
        from torch._dynamo import config as tracer
        from torch._inductor import config as inductor

        with inductor.patch(freezing=True), tracer.patch(recompile_limit=SHAPES):
            yield


class InferenceMaxViT(MaxViT):
    """A MaxViT for inference alone, made by `maxattn.optimize_for_inference`; in eval mode, its weights fixed.

    `forward`, `forward_features`, `forward_head` and `features` are those of `MaxViT`.
    """

    def __init__(self, model: MaxViT) -> None:
        parts = copy.deepcopy(model).eval()
        convert(parts)
        widths = [model.spec.in_chans, model.spec.stem.width, *(stage.width for stage in model.spec.stages)]
        groups = [[parts.stem], *(list(stage.get_submodule("blocks").children()) for stage in parts.stages)]
        stem, *stages = (DepthFirst(Blocks(*g), width) for g, width in zip(groups, widths, strict=False))
        # This initialises nothing, for none of these modules is of a kind whose weights are drawn.
        super().__init__(stem, stages, parts.head, parts.spec)  # type: ignore[arg-type]
        self.requires_grad_(False)
        self.eval()
        changes = Changes()
        for module in self.modules():
            if isinstance(module, Fixed):
                module.changes = changes
        self._changes = changes
        self._graph: Callable[[Tensor], Tensor] | None = None
        self._hooks: Sequence[Any] = ()

    def compile_for_device(self, autotune: bool) -> None:
        """Compile for the device that the weights are on, at the first call for each size of image."""
        inside = (module for module in self.modules() if module is not self)
        self._hooks = [hooks for module in inside for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        weight, plain = next(self.parameters()), super().forward
        if not autotune and gpu.made_for(weight) and self._fuses():
            self._graph = Graphs(plain, self._changes, self._choices())
        elif weight.device.type == "cpu":
            for part in (part for part in self.modules() if isinstance(part, DepthFirst)):
                part.blocks.compile(dynamic=False, mode="max-autotune-no-cudagraphs" if autotune else "default")
        else:
            compiled = torch.compile(plain, mode="max-autotune" if autotune else "reduce-overhead")
            serves = CUDAGraphs().serves
            # The next call overwrites what a CUDA graph has written.
            self._graph = lambda x: compiled(x).clone() if serves(x) else plain(x)

    def _fuses(self) -> bool:
        """Whether the kernels of a GPU leave a compiler nothing to fuse in the widest layers."""
        return all(isinstance(m, FusedMBConv) and m.fuses for m in self.modules() if isinstance(m, MBConv))

    def _choices(self) -> Callable[[], Hashable]:
        """A function for what decides about backends, now."""
        attentions = list(self.attentions())
        return lambda: (asked(None, eager_override()), tuple(attention.backend for attention in attentions))

    def forward(self, x: Tensor) -> Tensor:
        """As of `MaxViT`; what is recorded or compiled shows nothing to hooks, so that they have the layers run."""
        if self._graph is None or torch.compiler.is_compiling() or any(self._hooks) or not values_alone(x):
            return super().forward(x)
        with torch.no_grad():
            return self._graph(x)

    def train(self, mode: bool = True) -> InferenceMaxViT:
        if mode:
            raise RuntimeError(f"a network made for inference cannot be trained: {PLAIN}")
        return super().train(False)

    def reset_classifier(self, num_classes: int) -> NoReturn:
        raise RuntimeError(f"a network made for inference keeps its classifier: {PLAIN}")

    def set_input_size(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"a network made for inference keeps its windows, whose biases are gathered: {PLAIN}")

    def set_grad_checkpointing(self, enable: bool | str = True) -> None:
        if enable:
            raise RuntimeError(f"a network made for inference has no gradients to checkpoint for: {PLAIN}")

    def param_groups(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(f"a network made for inference has nothing to optimise: {PLAIN}")

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which are not compiled."""
        return {**super().__getstate__(), "_graph": None, "_hooks": ()}  # type: ignore[no-untyped-call]
