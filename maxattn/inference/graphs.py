"""A forward pass recorded as a CUDA graph, once for each size of images: replayed, it costs the host one launch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from maxattn.inference.fixed import Changes

RECORDINGS = 64
"""How many sizes of images and batches are kept; the one not used for longest goes first."""
WARM_UP = 2
"""Calls before recording: they compile kernels and make handles of libraries, which a recording cannot."""

Replay = Callable[[Tensor], Tensor]


class Memory(NamedTuple):
    """A pool of memory, and the stream that everything in it is recorded in."""

    pool: Any
    stream: Any


class Recorder(Protocol):
    """What can record a forward pass."""

    def serves(self, x: Tensor) -> bool:
        """Whether it can record one of such images, now."""

    def record(self, forward: Replay, x: Tensor, memory: Memory | None) -> tuple[Replay, Memory]:
        """What computes `forward` for images such as `x`, and the memory that later recordings share with it."""


class CUDAGraphs:
    """Recordings as CUDA graphs."""

    def serves(self, x: Tensor) -> bool:
        """On a GPU, unless the caller is recording a graph already: this one is part of it then."""
        return x.device.type == "cuda" and not torch.cuda.is_current_stream_capturing()

    def record(self, forward: Replay, x: Tensor, memory: Memory | None) -> tuple[Replay, Memory]:
        """cuBLAS's workspaces are given up before, so that it gets one in the recording's memory, and after.

        A compiler that records does the same: a workspace from before would be freed, and a replay still write to it.
        """
        if memory is None:
            memory = Memory(torch.cuda.graph_pool_handle(), torch.cuda.Stream(x.device))
        images, graph = torch.empty_like(x).copy_(x), torch.cuda.CUDAGraph()
        for _ in range(WARM_UP):
            forward(images)
        torch._C._cuda_clearCublasWorkspaces()
        try:
            with torch.cuda.device(x.device), torch.cuda.graph(graph, *memory, capture_error_mode="thread_local"):
                out = forward(images)
        finally:
            torch._C._cuda_clearCublasWorkspaces()

        def replay(x: Tensor) -> Tensor:
            images.copy_(x)
            graph.replay()
            return out.clone()  # the next replay overwrites it

        return replay, memory


class Graphs:
    """`forward`, recorded at the first call for each shape, dtype and value of `choices()`, and replayed from then on.

    Once `changes` counts further, all is recorded anew, for a recording reads the weights where they were. Whatever
    cannot be recorded is computed by `forward` itself. All recordings share their memory, so no two may run at the same
    time: in one stream they do not.
    """

    def __init__(
        self,
        forward: Replay,
        changes: Changes,
        choices: Callable[[], Hashable],
        recorder: Recorder | None = None,
    ) -> None:
        self._forward = forward
        self._changes = changes
        self._choices = choices
        self._recorder = recorder or CUDAGraphs()
        self._replays: dict[Hashable, Replay] = {}
        self._memory: Memory | None = None
        self._recorded_at = changes.count
        self._lock = threading.Lock()

    def __call__(self, x: Tensor) -> Tensor:
        if x.numel() == 0 or torch.is_autocast_enabled(x.device.type) or not self._recorder.serves(x):
            return self._forward(x)
        key = (x.shape, x.dtype, x.device, self._choices())
        with self._lock:
            if self._recorded_at != self._changes.count:
                self._recorded_at = self._changes.count
                self._replays.clear()
                self._memory = None  # it goes with the last recording
            replay = self._replays.pop(key, None)
            if replay is None:
                # Tensors made in inference mode could not be written to outside of it.
                with torch.inference_mode(False), torch.no_grad():
                    replay, self._memory = self._recorder.record(self._forward, x, self._memory)
            self._replays[key] = replay
            if len(self._replays) > RECORDINGS:
                del self._replays[next(iter(self._replays))]
            return replay(x)
