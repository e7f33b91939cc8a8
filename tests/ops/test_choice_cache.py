"""When the choice of a backend is made anew: for another problem, another override, another thread or task."""

from __future__ import annotations

import asyncio
import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from recording import BIAS, QKV, Recording, attend, chosen, recording
from torch import Tensor

import maxattn
from maxattn import Capabilities, Reason
from maxattn.ops.registry import registered


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


CHANGES: dict[str, Callable[[], Any]] = {
    "dtype": lambda: attend(QKV.double()),
    "device": lambda: attend(QKV.to("meta")),
    "batch": lambda: attend(QKV.repeat(2, 1, 1, 1, 1, 1)),
    "height": lambda: attend(QKV[:, :7]),
    "width": lambda: attend(QKV[:, :, :7]),
    "heads": lambda: attend(QKV[:, :, :, :, :1]),
    "head_dim": lambda: attend(QKV[..., :3]),
    "axis": lambda: attend(axis="grid"),
    "window": lambda: attend(window=2),
    "bias": lambda: attend(bias=BIAS),
    "dtype of the bias": lambda: attend(bias=BIAS.double()),
    "gradient of the bias": lambda: attend(bias=BIAS.clone().requires_grad_()),
    "gradient of qkv": lambda: attend(QKV.clone().requires_grad_()),
    "scale": lambda: attend(scale=0.1),
    "dropout": lambda: attend(dropout_p=0.1),
    "argument": lambda: attend(backend="spy"),
}


class TestCache:
    def test_the_same_call_asks_once(self) -> None:
        with registered(Recording("spy")) as spy:
            for _ in range(3):
                attend()
            attend(window=[4, 4])
            attend(torch.zeros_like(QKV))
            with torch.no_grad():
                attend(QKV.clone().requires_grad_())
            with torch.inference_mode():
                attend()
        assert spy.asked == 1

    @pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
    def test_another_problem_asks_again_and_going_back_does_not(self, change: Callable[[], Any]) -> None:
        with registered(Recording("spy")) as spy:
            attend()
            for _ in range(2):
                change()
                assert spy.asked == 2
                attend()
                assert spy.asked == 2

    def test_grad_mode_asks_again_where_there_is_something_to_differentiate(self) -> None:
        qkv = QKV.clone().requires_grad_()
        with registered(Recording("spy")) as spy:
            attend(qkv)
            with torch.no_grad():
                attend(qkv)
            assert spy.asked == 2
            attend(qkv)
        assert spy.asked == 2

    def test_the_environment_is_read_at_each_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with registered(Recording("spy")) as spy:
            attend()
            monkeypatch.setenv("MAXATTN_BACKEND", "spy")
            attend()
            assert (spy.asked, spy.used) == (2, 1)
            monkeypatch.setenv("MAXATTN_BACKEND", "naive")
            attend()
            assert (spy.asked, spy.used) == (3, 1)
            monkeypatch.delenv("MAXATTN_BACKEND")
            attend()
            assert (spy.asked, spy.used) == (3, 1)

    def test_use_backend_is_heeded_at_each_call(self) -> None:
        with registered(Recording("spy")) as spy:
            attend()
            for _ in range(2):
                with maxattn.use_backend("spy"):
                    attend()
            attend()
        assert (spy.asked, spy.used) == (2, 2)

    def test_deterministic_mode_is_heeded_at_each_call(self) -> None:
        class Undeterministic(Recording):
            capabilities = Capabilities(deterministic=False)

        with registered(Undeterministic("hasty", speed=9.0)) as hasty:
            attend()
            with deterministic_algorithms():
                attend()
                explanation = maxattn.explain(QKV, "block", 4)
            attend()
        assert hasty.used == 2
        assert explanation.problem.deterministic
        assert explanation.backend == "sdpa"

    def test_a_backend_that_comes_or_goes_is_noticed(self) -> None:
        attend()
        with registered(Recording("fast", speed=9.0)) as fast:
            attend()
        attend()
        assert fast.used == 1


class TestLog:
    def test_an_automatic_choice_is_logged_once_per_problem(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "maxattn"), registered(Recording("unable", Reason("no", "not today"))):
            attend()
            attend()
            attend(window=2)
            maxattn.explain(QKV, "block", 4)
        messages = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
        assert [message.splitlines()[0] for message in messages] == [
            "block 4x4, image 1x8x8, 2 heads of 4, float32, cpu, no bias, no gradient",
            "block 2x2, image 1x8x8, 2 heads of 4, float32, cpu, no bias, no gradient",
        ]
        assert "-> sdpa" in messages[0]
        assert re.search("unable +not today", messages[0])

    def test_a_forced_choice_is_not_news(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.INFO, "maxattn"), registered(Recording("spy")):
            attend(backend="spy")
        assert not caplog.records


class TestThreadsAndTasks:
    def test_an_override_stays_in_its_thread(self, a: Recording) -> None:
        inside, checked = threading.Event(), threading.Event()

        def force() -> None:
            with maxattn.use_backend("a"):
                inside.set()
                checked.wait(30)

        with ThreadPoolExecutor(1) as pool:
            forcing = pool.submit(force)
            assert inside.wait(30)
            assert maxattn.explain(QKV, "block", 4).backend == "sdpa"
            checked.set()
            forcing.result(30)

    def test_a_new_thread_starts_without_an_override(self, a: Recording) -> None:
        with maxattn.use_backend("a"), ThreadPoolExecutor(1) as pool:
            assert pool.submit(lambda: maxattn.explain(QKV, "block", 4).backend).result(30) == "sdpa"

    def test_threads_that_force_different_backends_each_get_theirs(self) -> None:
        """Through one shared `use_backend` object a name, and calls of many sizes so that choices are made too."""
        spies = [Recording(f"spy{i}") for i in range(4)]
        barrier = threading.Barrier(len(spies))

        def call_many(spy: Recording, shared: maxattn.use_backend) -> None:
            barrier.wait(30)
            for i in range(50):
                with shared:
                    attend(QKV[:, : i % 8 + 1])

        with recording(*spies), ThreadPoolExecutor(len(spies)) as pool:
            calls = [pool.submit(call_many, spy, maxattn.use_backend(spy.name)) for spy in spies]
            for each in calls:
                each.result(60)
        assert [spy.used for spy in spies] == [50] * len(spies)

    def test_one_object_may_be_shared_by_threads(self, a: Recording) -> None:
        use_a, barrier = maxattn.use_backend("a"), threading.Barrier(2)

        def enter_together() -> str | None:
            with use_a:
                barrier.wait(30)
                backend = maxattn.explain(QKV, "block", 4).backend
                barrier.wait(30)
            assert maxattn.explain(QKV, "block", 4).backend == "sdpa"
            return backend

        with ThreadPoolExecutor(2) as pool:
            assert [each.result(30) for each in [pool.submit(enter_together) for _ in range(2)]] == ["a", "a"]

    def test_concurrent_first_calls_agree(self) -> None:
        barrier = threading.Barrier(8)

        def call() -> Tensor:
            barrier.wait(30)
            return attend(QKV[:, :5])

        with registered(Recording("spy")), ThreadPoolExecutor(8) as pool:
            results = [each.result(60) for each in [pool.submit(call) for _ in range(8)]]
        assert all(torch.equal(result, results[0]) for result in results)

    def test_an_override_stays_in_its_task(self, a: Recording, b: Recording) -> None:
        """The blocks overlap without nesting: a enters, b enters, a leaves, b leaves."""

        async def force(name: str, enter: asyncio.Event, entered: asyncio.Event, leave: asyncio.Event) -> list[str]:
            await enter.wait()
            with maxattn.use_backend(name):
                entered.set()
                seen = [chosen()]
                await leave.wait()
                seen.append(chosen())
            return [*seen, chosen()]

        async def overlap() -> tuple[list[str], list[str], str]:
            start, a_entered, b_entered, a_left = (asyncio.Event() for _ in range(4))
            first = asyncio.create_task(force("a", start, a_entered, b_entered))
            second = asyncio.create_task(force("b", a_entered, b_entered, a_left))
            start.set()
            seen_by_a = await first
            a_left.set()
            return seen_by_a, await second, chosen()

        seen_by_a, seen_by_b, outside = asyncio.run(overlap())
        assert seen_by_a == ["a", "a", "sdpa"]
        assert seen_by_b == ["b", "b", "sdpa"]
        assert outside == "sdpa"
        assert chosen() == "sdpa"
