"""Recordings of a forward pass: one for each size, few of them, and none that outlives its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import maxattn
from maxattn.inference import graphs
from maxattn.inference.fixed import Changes
from maxattn.inference.graphs import CUDAGraphs, Graphs, Memory, Replay


class Recorder:
    """Records on the CPU as on a GPU: into memory of its own, which a replay overwrites."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.memories: list[Memory | None] = []

    def serves(self, x: Tensor) -> bool:
        return True

    def record(self, forward: Replay, x: Tensor, memory: Memory | None) -> tuple[Replay, Memory]:
        self.memories.append(memory)
        self.shapes.append(tuple(x.shape))
        images = x.clone()

        def replay(x: Tensor) -> Tensor:
            return forward(images.copy_(x))

        return replay, Memory("pool", f"stream {len(self.shapes)}")


def double(x: Tensor) -> Tensor:
    return 2 * x


def doubled(recorder: Recorder, changes: Changes | None = None, choices: Callable[[], Any] = tuple) -> Graphs:
    return Graphs(double, changes or Changes(), choices, recorder)


def test_each_size_is_recorded_once() -> None:
    recorder = Recorder()
    replayed = doubled(recorder)
    for size in (2, 3, 2, 3, 2):
        x = torch.randn(size)
        assert replayed(x).equal(2 * x)
    assert recorder.shapes == [(2,), (3,)]
    assert recorder.memories == [None, Memory("pool", "stream 1")]


def test_another_choice_is_another_recording() -> None:
    recorder, chosen = Recorder(), ["a"]
    replayed = doubled(recorder, choices=lambda: chosen[0])
    for chosen[0] in ("a", "b", "b", "a"):
        replayed(torch.ones(2))
    assert len(recorder.shapes) == 2


def test_a_change_has_all_recorded_anew_in_other_memory() -> None:
    recorder, changes = Recorder(), Changes()
    replayed = doubled(recorder, changes)
    for _ in range(2):
        changes.count += 1
        replayed(torch.ones(2)), replayed(torch.ones(3))
    assert recorder.shapes == [(2,), (3,)] * 2
    assert recorder.memories == [None, Memory("pool", "stream 1"), None, Memory("pool", "stream 3")]


def test_what_is_not_on_a_gpu_is_not_recorded() -> None:
    x = torch.ones(2)
    assert not CUDAGraphs().serves(x)
    assert Graphs(double, Changes(), tuple)(x).equal(2 * x)


def test_the_size_unused_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "RECORDINGS", 2)
    recorder = Recorder()
    replayed = doubled(recorder)
    for size in (1, 2, 1, 3, 1, 2):
        replayed(torch.ones(size))
    assert recorder.shapes == [(1,), (2,), (3,), (2,)]


def test_nothing_is_recorded_under_autocast_or_of_no_images() -> None:
    recorder = Recorder()
    replayed = doubled(recorder)
    assert replayed(torch.ones(0, 3)).shape == (0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert replayed(torch.ones(2)).equal(torch.full((2,), 2.0))
    assert recorder.shapes == []


def test_one_made_in_inference_mode_serves_outside_of_it() -> None:
    replayed, x = doubled(Recorder()), torch.ones(2)
    with torch.inference_mode():
        replayed(torch.ones(2))
    assert replayed(x).equal(2 * x)


@pytest.mark.parametrize("change", [lambda m: m.float(), lambda m: m.load_state_dict(m.state_dict())])
def test_every_part_with_tensors_tells_that_it_was_moved_or_loaded(change: Callable[[nn.Module], Any]) -> None:
    optimized = copy.deepcopy(maxattn.optimize_for_inference(maxattn.build("nano", conv_norm="group_norm")))
    parts = [m for m in optimized.modules() if [*m.parameters(recurse=False), *m.buffers(recurse=False)]]
    assert len(parts) > 20
    for part in [*parts, optimized.head, optimized]:
        before = optimized._changes.count
        change(part)
        assert optimized._changes.count > before
