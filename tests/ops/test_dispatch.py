"""Who decides on the backend, and what is told of the choice."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext

import pytest
import torch
from recording import BIAS, QKV, Recording, attend, chosen, recording
from torch import Tensor

import maxattn
from maxattn import BackendUnavailableError, Problem, Reason
from maxattn.ops.registry import registered


@pytest.fixture
def c() -> Iterator[Recording]:
    with registered(Recording("c")) as backend:
        yield backend


@pytest.fixture
def unable() -> Iterator[Recording]:
    with registered(Recording("unable", Reason("moon", "the moon is not full", "wait two weeks"))) as backend:
        yield backend


class TestPrecedence:
    @pytest.mark.parametrize("argument", [None, "c"])
    @pytest.mark.parametrize("context", [None, "b"])
    @pytest.mark.parametrize("environment", [None, "a"])
    def test_argument_then_use_backend_then_environment_then_automatic(
        self,
        environment: str | None,
        context: str | None,
        argument: str | None,
        monkeypatch: pytest.MonkeyPatch,
        a: Recording,
        b: Recording,
        c: Recording,
    ) -> None:
        if environment:
            monkeypatch.setenv("MAXATTN_BACKEND", environment)
        with maxattn.use_backend(context) if context else nullcontext():
            assert chosen(backend=argument) == (argument or context or environment or "sdpa")
            explanation = maxattn.explain(QKV, "block", 4, backend=argument)
        if argument:
            assert (explanation.asked_by, explanation.asked_for) == ("backend argument", ("c",))
        elif context:
            assert (explanation.asked_by, explanation.asked_for) == ("use_backend", ("b",))
        elif environment:
            assert (explanation.asked_by, explanation.asked_for) == ("MAXATTN_BACKEND", ("a",))
        else:
            assert (explanation.asked_by, explanation.asked_for) == ("automatic", ())

    def test_automatic_takes_the_fastest_able_one(self) -> None:
        unable = Recording("unable", Reason("no", "no"), speed=9.0)
        with recording(Recording("slow", speed=0.001), Recording("fast", speed=3.0), unable):
            assert chosen() == "fast"
            names = [candidate.name for candidate in maxattn.explain(QKV, "block", 4).candidates]
        assert names == ["fast", "sdpa", "naive", "slow", "unable"]

    def test_nested_blocks_the_innermost_wins_and_the_outer_comes_back(self, a: Recording, b: Recording) -> None:
        with maxattn.use_backend("a"):
            with maxattn.use_backend("b"):
                assert chosen() == "b"
            assert chosen() == "a"
            with pytest.raises(KeyError), maxattn.use_backend("b"):
                raise KeyError
            assert chosen() == "a"
        assert chosen() == "sdpa"

    def test_none_gives_the_choice_back(self, a: Recording, b: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
        with maxattn.use_backend("a"), maxattn.use_backend(None):
            assert chosen() == "sdpa"
            monkeypatch.setenv("MAXATTN_BACKEND", "b")
            assert chosen() == "b"

    def test_one_object_may_be_entered_again_and_again(self, a: Recording, b: Recording) -> None:
        use_a = maxattn.use_backend("a")
        with use_a, maxattn.use_backend("b"), use_a:
            assert chosen() == "a"
        with use_a:
            assert chosen() == "a"
        assert chosen() == "sdpa"

    def test_an_empty_environment_variable_asks_for_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MAXATTN_BACKEND", "")
        assert chosen() == "sdpa"

    @pytest.mark.parametrize("names", ["", " ", ",", " , "])
    def test_use_backend_refuses_an_empty_list_at_once(self, names: str) -> None:
        with pytest.raises(ValueError, match=r"no backend name in .*known: naive, sdpa"):
            maxattn.use_backend(names)

    @pytest.mark.parametrize("force", ["argument", "use_backend", "environment"])
    @pytest.mark.parametrize(
        ("names", "expected"),
        [("a,b", "a"), ("b,a", "b"), (" b , a ", "b"), ("unable,b", "b"), ("unable,,b,a,", "b"), ("a,a", "a")],
    )
    def test_of_a_comma_list_the_first_able_one(
        self,
        force: str,
        names: str,
        expected: str,
        a: Recording,
        b: Recording,
        unable: Recording,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if force == "environment":
            monkeypatch.setenv("MAXATTN_BACKEND", names)
        with maxattn.use_backend(names) if force == "use_backend" else nullcontext():
            assert chosen(backend=names if force == "argument" else None) == expected


class TestForcedAndUnable:
    @pytest.mark.parametrize("force", ["argument", "use_backend", "environment"])
    def test_raises_with_the_reasons_and_never_falls_back(
        self, force: str, a: Recording, unable: Recording, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if force == "environment":
            monkeypatch.setenv("MAXATTN_BACKEND", "unable")
        with (
            maxattn.use_backend("unable") if force == "use_backend" else nullcontext(),
            pytest.raises(BackendUnavailableError) as caught,
        ):
            attend(backend="unable" if force == "argument" else None)
        asked_by = {"argument": "backend argument", "environment": "MAXATTN_BACKEND"}.get(force, force)
        assert str(caught.value).splitlines() == [
            f"{asked_by} asked for unable, which cannot serve: {maxattn.explain(QKV, 'block', 4).problem}",
            "  unable: the moon is not full (wait two weeks)",
            "able here: sdpa, naive, a",
        ]
        assert caught.value.reasons == {"unable": [Reason("moon", "the moon is not full", "wait two weeks")]}
        assert caught.value.problem == maxattn.explain(QKV, "block", 4).problem
        assert a.used == unable.used == 0

    def test_of_a_list_every_backend_gives_its_reasons(self, unable: Recording) -> None:
        with (
            registered(Recording("late", Reason("late", "it is too late"), Reason("dark", "it is too dark"))),
            pytest.raises(BackendUnavailableError, match="asked for unable, late, nowhere, which cannot") as caught,
        ):
            attend(backend="unable,late,nowhere")
        codes = {name: [reason.code for reason in reasons] for name, reasons in caught.value.reasons.items()}
        assert codes == {"unable": ["moon"], "late": ["late", "dark"], "nowhere": ["unknown"]}

    def test_raises_each_time_it_is_called(self, unable: Recording) -> None:
        for _ in range(2):
            with pytest.raises(BackendUnavailableError):
                attend(backend="unable")

    def test_explain_tells_so_without_raising(self, unable: Recording) -> None:
        explanation = maxattn.explain(QKV, "block", 4, backend="unable")
        assert explanation.backend is None
        assert explanation.kernel == ""
        assert "-> none, backend argument: unable" in str(explanation)

    @pytest.mark.parametrize(("name", "near"), [("sdap", "'sdpa'"), ("naiv", "'naive'"), ("spda", "'sdpa'")])
    def test_an_unknown_name_gets_the_nearest_and_all_known_ones(self, name: str, near: str) -> None:
        with pytest.raises(BackendUnavailableError) as caught:
            attend(backend=name)
        assert f"no backend is named '{name}' (did you mean {near}? known: naive, sdpa)" in str(caught.value)

    def test_a_name_like_no_other_gets_all_known_ones(self) -> None:
        with pytest.raises(BackendUnavailableError, match=r"named 'qqq' \(known: naive, sdpa\)"):
            attend(backend="qqq")

    def test_an_unknown_name_beside_a_known_one_is_told_of(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, "maxattn"), registered(Recording("fresh")):
            assert chosen(backend="sdap,fresh") == "fresh"
        assert "backend argument: no backend is named 'sdap' (did you mean 'sdpa'?" in caplog.text

    def test_automatic_raises_where_no_backend_is_able(self) -> None:
        with (
            recording(Recording("naive", Reason("no", "not today")), Recording("sdpa", Reason("no", "never"))),
            pytest.raises(BackendUnavailableError) as caught,
        ):
            attend()
        assert str(caught.value).startswith("no backend can serve this problem: block 4x4, image 1x8x8")
        assert set(str(caught.value).splitlines()[1:]) == {"  naive: not today", "  sdpa: never"}


class Crashing(Recording):
    """Raises in the method that is named."""

    def __init__(self, method: str) -> None:
        super().__init__("crashing", speed=9.0)
        self.method = method

    def crash(self, method: str) -> None:
        if method == self.method:
            raise ZeroDivisionError("division of something by zero")

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        self.crash("unsupported")
        return super().unsupported(problem)

    def relative_speed(self, problem: Problem) -> float:
        self.crash("relative_speed")
        return super().relative_speed(problem)

    def kernel(self, problem: Problem) -> str:
        self.crash("kernel")
        return "a kernel"


class TestCrashes:
    @pytest.mark.parametrize("method", ["unsupported", "relative_speed"])
    def test_a_crash_while_asked_is_a_reason_and_stops_no_other(
        self, method: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with registered(Crashing(method)):
            assert chosen() == "sdpa"
            with pytest.raises(BackendUnavailableError) as caught:
                attend(backend="crashing")
        (reason,) = caught.value.reasons["crashing"]
        assert reason.code == "crashed"
        assert reason.message == "its own check failed: ZeroDivisionError: division of something by zero"
        assert "Traceback" in caplog.text

    def test_a_crash_while_naming_its_kernel_is_told_and_stops_nothing(self) -> None:
        with registered(Crashing("kernel")):
            assert chosen() == "crashing"
            assert maxattn.explain(QKV, "block", 4).kernel == (
                "unknown, ZeroDivisionError: division of something by zero"
            )

    def test_a_crash_while_computing_is_the_callers_to_see(self) -> None:
        class Failing(Recording):
            def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
                raise ZeroDivisionError

        with registered(Failing("failing", speed=9.0)), pytest.raises(ZeroDivisionError):
            attend()


class TestExplain:
    def test_for_tensors_and_for_their_problem_it_is_the_same(self) -> None:
        by_tensors = maxattn.explain(QKV, "grid", (4, 2), BIAS[:, :8, :8], 0.3, 0.1)
        assert by_tensors.problem == Problem(
            axis="grid",
            window=(4, 2),
            batch=1,
            height=8,
            width=8,
            heads=2,
            head_dim=4,
            bias=torch.float32,
            scale=0.3,
            dropout_p=0.1,
        )
        assert maxattn.explain(by_tensors.problem) == by_tensors

    def test_heeds_what_forces_the_choice(self, a: Recording, b: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
        problem = maxattn.explain(QKV, "block", 4).problem
        assert maxattn.explain(problem, backend="a").backend == "a"
        with maxattn.use_backend("b"):
            assert maxattn.explain(problem).backend == "b"
        monkeypatch.setenv("MAXATTN_BACKEND", "a")
        assert maxattn.explain(problem).asked_by == "MAXATTN_BACKEND"

    def test_computes_nothing(self) -> None:
        with registered(Recording("spy", speed=9.0)) as spy:
            assert maxattn.explain(QKV, "block", 4).backend == "spy"
        assert spy.used == 0

    def test_prints_the_problem_the_choice_and_every_backend_best_first(self, unable: Recording) -> None:
        with recording(Recording("fast", speed=2.5), Recording("naive", speed=0.25)):
            lines = str(maxattn.explain(QKV, "block", 4)).splitlines()
        assert lines == [
            "block 4x4, image 1x8x8, 2 heads of 4, float32, cpu, no bias, no gradient",
            "-> fast, automatic",
            "   fast    able, 2.5x sdpa expected",
            "   sdpa    able, 1x sdpa expected",
            "   naive   able, 0.25x sdpa expected",
            "   unable  the moon is not full (wait two weeks)",
        ]

    def test_prints_who_forced_the_choice_and_the_kernel_inside(self) -> None:
        assert "\n-> sdpa (kernel: flash), backend argument: sdpa, naive\n" in str(
            maxattn.explain(QKV, "block", 4, backend="sdpa,naive")
        )


def test_list_backends_names_all_of_them(a: Recording) -> None:
    assert maxattn.list_backends() == ["a", "naive", "sdpa"]


def test_a_registered_backend_takes_the_place_of_one_of_its_name_for_a_while() -> None:
    with registered(Recording("naive")) as spy:
        attend(backend="naive")
        assert spy.used == 1
        assert maxattn.list_backends() == ["naive", "sdpa"]
    attend(backend="naive")
    assert spy.used == 1
    with pytest.raises(KeyError), registered(Recording("spy")):
        raise KeyError
    assert maxattn.list_backends() == ["naive", "sdpa"]


@pytest.mark.parametrize(
    ("speed", "reasons", "told"),
    [
        (None, [], "float() argument must be"),
        (float("nan"), [], "relative_speed() is not a number"),
        (1.0, ["no"], "unsupported() must give instances of maxattn.Reason, not 'no'"),
    ],
)
def test_a_wrong_answer_of_a_backend_counts_as_a_crash_of_its_check(
    speed: float | None, reasons: list[str], told: str
) -> None:
    class Wrong(Recording):
        def unsupported(self, problem: Problem) -> Sequence[Reason]:
            return reasons

        def relative_speed(self, problem: Problem) -> float:
            return speed

    with registered(Wrong("wrong")):
        explanation = maxattn.explain(QKV, "block", 4)
    assert explanation.backend == "sdpa"
    (answer,) = [candidate for candidate in explanation.candidates if candidate.name == "wrong"]
    assert answer.reasons[0].code == "crashed"
    assert told in answer.reasons[0].message
