"""How long each kind of layer of a network made for inference takes on a GPU."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from maxattn.inference.gpu.costs import costs
from maxattn.inference.network import InferenceMaxViT

AHEAD = 200_000_000
"""Cycles that a GPU waits while the host calls the operators."""
FOLLOWED_BY = {"qkv": "attention"}
"""What an operator without weights belongs to, if not to the kind before it."""
ALONE = {"maxattn_inference::norm": "norm", "maxattn_inference::pool": "shortcut"}
FREE = ("aten::empty", "aten::new_empty", "aten::detach")
"""Operators that start nothing on the device; so do views."""


def seconds_by_kind(network: InferenceMaxViT, images: Tensor, runs: int) -> dict[str, float]:
    """Median seconds of `runs` forward passes, split by the kinds of `maxattn.inference.gpu.costs`.

    An operator belongs to the layer whose weights it reads; one that reads none, to the one before it.
    """
    kinds = kinds_of_weights(network, images)
    seconds: dict[str, list[float]] = defaultdict(list)
    with torch.no_grad():
        network(images)
        for _ in range(runs):
            with _Marks(kinds, images.device) as marks:
                network(images)
            for kind, taken in marks.seconds().items():
                seconds[kind].append(taken)
    return {kind: statistics.median(taken) for kind, taken in seconds.items()}


def kinds_of_weights(network: InferenceMaxViT, images: Tensor) -> dict[int, str]:
    """The kind of layer that each weight, by its address, belongs to."""
    height, width = images.shape[2:]
    kinds = {"stem": "stem", "head": "head"}
    kinds |= {cost.name: cost.kind for cost in costs(network, len(images), (height, width), images.itemsize)}
    found = {}
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        layers = [layer for layer in kinds if name.startswith(f"{layer}.")]
        found[_address(tensor)] = kinds[max(layers, key=len)]
    return found


class _Marks(TorchDispatchMode):
    """Marks the time on the device after each operator."""

    def __init__(self, kinds: Mapping[int, str], device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kinds, self._kind = kinds, "stem"
        self._clock = _GPUClock() if device.type == "cuda" else _HostClock()
        self._marks: list[tuple[str, Any]] = [("", self._clock.mark())]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), func.name()
        if func.is_view or name.startswith(FREE):
            return out
        read = [self._kinds.get(_address(x)) for x in args if isinstance(x, Tensor)]
        kind = next((one for one in read if one is not None), None)
        self._kind = kind or ALONE.get(name) or FOLLOWED_BY.get(self._kind, self._kind)
        self._marks.append((self._kind, self._clock.mark()))
        return out

    def seconds(self) -> dict[str, float]:
        """By kind."""
        found: dict[str, float] = defaultdict(float)
        for (_, before), (kind, after) in zip(self._marks, self._marks[1:], strict=False):
            found[kind] += self._clock.between(before, after)
        return found


class _GPUClock:
    """The GPU's own. It waits at first, until the host is ahead of it."""

    def __init__(self) -> None:
        torch.cuda._sleep(AHEAD)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1e3


class _HostClock:
    """For kernels that are interpreted."""

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        return end - start


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
