"""A forward pass recorded as a CUDA graph, once for each size of images: replayed, it costs the host one launch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from maxattn.ops.dispatch import asked, eager_override

RECORDINGS = 64
"""How many sizes of images and batches are kept; the one not used for longest goes first."""
WARM_UP = 2
"""Calls before recording: they compile kernels, lay out weights, and make workspaces, which a recording cannot."""

Replay = Callable[[Tensor], Tensor]


class Graphs:
    """`forward`, recorded at the first call for each shape, dtype and choice of backend, and replayed from then on.

    All recordings share their memory, so no two may run at the same time: in one stream they do not.
    """

    def __init__(
        self, forward: Replay, record: Callable[[Replay, Tensor, Any], tuple[Replay, Any]] | None = None
    ) -> None:
        self._forward = forward
        self._record = record_cuda_graph if record is None else record
        self._replays: dict[Hashable, Replay] = {}
        self._pool: Any = None
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == 0 or torch.is_autocast_enabled(x.device.type):
            return self._forward(x)
        key = (x.shape, x.dtype, x.device, asked(None, eager_override()))
        with self._lock:
            replay = self._replays.pop(key, None)
            if replay is None:
                # Tensors made in inference mode could not be written to outside of it.
                with torch.inference_mode(False), torch.no_grad():
                    replay, self._pool = self._record(self._forward, x, self._pool)
            self._replays[key] = replay
            if len(self._replays) > RECORDINGS:
                del self._replays[next(iter(self._replays))]
            return replay(x)

    def forget(self) -> None:
        """Record anew from now on, for the weights are others."""
        with self._lock:
            self._replays.clear()
            self._pool = None  # it goes with the last recording


def record_cuda_graph(forward: Replay, x: Tensor, pool: Any) -> tuple[Replay, Any]:
    """What computes `forward` for images such as `x`, and the pool of memory that it shares with later recordings."""
    images = torch.empty_like(x).copy_(x)
    here, apart = torch.cuda.current_stream(x.device), torch.cuda.Stream(x.device)
    apart.wait_stream(here)
    with torch.cuda.stream(apart):
        for _ in range(WARM_UP):
            forward(images)
    here.wait_stream(apart)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(x.device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = forward(images)

    def replay(x: Tensor) -> Tensor:
        images.copy_(x)
        graph.replay()
        return out.clone()  # the next replay overwrites it

    return replay, graph.pool()
