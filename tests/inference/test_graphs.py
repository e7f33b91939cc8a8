"""Recordings of a forward pass: one for each size, few of them, and none that outlives its weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import maxattn
from maxattn.inference import graphs
from maxattn.inference.graphs import Graphs, Replay


class Recorder:
    """Records on the CPU as on a GPU: into memory of its own, which a replay overwrites."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.pools: list[Any] = []

    def __call__(self, forward: Replay, x: Tensor, pool: Any) -> tuple[Replay, Any]:
        self.pools.append(pool)
        self.shapes.append(tuple(x.shape))
        images = x.clone()

        def replay(x: Tensor) -> Tensor:
            return forward(images.copy_(x))

        return replay, len(self.shapes)


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_each_size_is_recorded_once() -> None:
    recorder = Recorder()
    replayed = Graphs(double, recorder)
    for size in (2, 3, 2, 3, 2):
        x = torch.randn(size)
        assert replayed(x).equal(2 * x)
    assert recorder.shapes == [(2,), (3,)]
    assert recorder.pools == [None, 1]


def test_the_choice_of_a_backend_is_another_recording() -> None:
    recorder, x = Recorder(), torch.ones(2)
    replayed = Graphs(double, recorder)
    replayed(x)
    for _ in range(2):
        with maxattn.use_backend("naive"):
            replayed(x)
    assert len(recorder.shapes) == 2


def test_the_size_unused_for_longest_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "RECORDINGS", 2)
    recorder = Recorder()
    replayed = Graphs(double, recorder)
    for size in (1, 2, 1, 3, 1, 2):
        replayed(torch.ones(size))
    assert recorder.shapes == [(1,), (2,), (3,), (2,)]


def test_nothing_is_recorded_under_autocast_or_of_no_images() -> None:
    recorder = Recorder()
    replayed = Graphs(double, recorder)
    assert replayed(torch.ones(0, 3)).shape == (0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert replayed(torch.ones(2)).equal(torch.full((2,), 2.0))
    assert recorder.shapes == []


def test_one_made_in_inference_mode_serves_outside_of_it() -> None:
    replayed, x = Graphs(double, Recorder()), torch.ones(2)
    with torch.inference_mode():
        replayed(torch.ones(2))
    assert replayed(x).equal(2 * x)


@pytest.mark.parametrize("change", [lambda m: m.float(), lambda m: m.load_state_dict(m.state_dict())])
def test_a_network_moved_or_loaded_is_recorded_anew(change: Any) -> None:
    recorder, x = Recorder(), torch.randn(1, 3, 28, 28)
    optimized = maxattn.optimize_for_inference(maxattn.build("nano"))
    optimized._graph = Graphs(optimized.forward_features, recorder)
    optimized(x), optimized(x)
    assert len(recorder.shapes) == 1
    change(optimized)
    assert optimized(x).shape == (1, 48, 7, 7)
    assert recorder.pools == [None, None]
