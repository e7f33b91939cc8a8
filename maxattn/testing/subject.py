"""What a check is given: the backend under test, and ways to try it on cases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any

import hypothesis
import torch
from hypothesis.strategies import SearchStrategy

from maxattn.ops.contract import Backend, Capabilities, Problem, Reason
from maxattn.ops.dispatch import compute_capability
from maxattn.testing import strategies
from maxattn.testing.case import Case
from maxattn.testing.failure import NotApplicable
from maxattn.testing.observe import Attend, attend_by, verify

Test = Callable[[Case], None]
SEVERAL_TILES = 144
"""Tokens of a window that kernels walk in several tiles of keys."""
NO_GRADIENT = {"requires_grad": False, "bias_requires_grad": False}
"""The fields of a problem that asks for none."""
HEADS = (2, 4, 8, 1, 3)
"""What a base problem may have, the most liked first."""
SIMPLER: tuple[dict[str, Any], ...] = (
    {"bias": None, "bias_requires_grad": False, "bias_layout": "contiguous"},
    {"bias_requires_grad": False},
    {"requires_grad": False},
    {"batch": 1},
    {"heads": 1},
    {"layout": "contiguous"},
    {"grad_layout": "contiguous"},
    {"values": "normal"},
    {"scale": None},
)
"""What is left out of a case that fails, one after another."""
PREFERRED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Failing(Exception):  # noqa: N818 - it is no error of the program
    """A case that fails, the smallest one found, and what it fails with."""

    def __init__(self, case: Case | None, cause: BaseException) -> None:
        super().__init__(str(cause))
        self.case = case
        self.cause = cause

    @property
    def fatal(self) -> bool:
        """Whether the device can do nothing more in this process, as after an illegal access."""
        return isinstance(self.cause, torch.AcceleratorError)


@dataclass
class Subject:
    """A backend on a device. `done` counts the cases.

    `facts` are its capabilities, cut to the dtypes under test; and without gradients, where it serves several devices
    and declines them on this one.
    """

    backend: Backend
    device: str
    examples: int
    seed: int
    dtypes: Sequence[torch.dtype] = ()
    on_case: Callable[[], None] = lambda: None
    done: int = field(default=0, init=False)

    @cached_property
    def facts(self) -> Capabilities:
        declared = self.backend.capabilities
        if self.dtypes:
            declared = replace(declared, dtypes=declared.dtypes & set(self.dtypes))
        if declared.backward and declared.devices != frozenset({self.device}):
            inference = replace(self)
            inference.facts = replace(declared, backward=False, bias_gradient=False)
            reasons = self.backend.unsupported(replace(inference.base, requires_grad=True))
            if [reason.code for reason in reasons] == ["backward"]:
                return inference.facts
        return declared

    @cached_property
    def base(self) -> Problem:
        """A small problem with all that is declared, a bias and gradients: for cases that vary one thing.

        Of a rectangular window of about 16 tokens if the backend serves one, else of the next best that it serves.
        """
        first: Problem | None = None
        liked = sorted(self.windows(), key=lambda window: (abs(window[0] * window[1] - 15), *_unlike_5x3(window)))
        dims = sorted(self.head_dims(128), key=lambda d: abs(d - 16))
        for heads, axis, window, head_dim in product(HEADS, strategies.AXES, liked, dims):
            problem = replace(self._base(window, head_dim), axis=axis, heads=heads)
            first = first or problem
            if not self.reasons(problem):
                return problem
        assert first is not None
        return first

    def _base(self, window: tuple[int, int], head_dim: int) -> Problem:
        P_h, P_w = window
        capability = compute_capability(torch.device(self.device, 0)) if self.device == "cuda" else None
        facts, dtype = self.facts, next(dtype for dtype in PREFERRED if dtype in self.facts.dtypes)
        return Problem(
            axis="block",
            window=(P_h, P_w),
            batch=2,
            height=2 * P_h,
            width=2 * P_w,
            heads=2,
            head_dim=head_dim,
            dtype=dtype,
            device=self.device,
            compute_capability=capability,
            bias=self._bias_beside(dtype),
            requires_grad=facts.backward,
            bias_requires_grad=facts.bias and facts.backward and facts.bias_gradient,
        )

    def windows(self, most: int = strategies.SMALL_TOKENS) -> list[tuple[int, int]]:
        return strategies.windows(self.facts, most)

    def head_dims(self, most: int) -> list[int]:
        return strategies.head_dims(self.facts, most)

    @property
    def finest_bias(self) -> torch.dtype | None:
        """The most exact dtype of a bias below fp64 that is declared; None if there may be no bias."""
        return next((dtype for dtype in PREFERRED if dtype in strategies.bias_dtypes(self.facts)), None)

    def _bias_beside(self, dtype: torch.dtype) -> torch.dtype | None:
        return dtype if dtype in strategies.bias_dtypes(self.facts) else self.finest_bias

    def largest_window(self, most: int) -> tuple[int, int]:
        """The last of `windows(most)` that is served; the last of all, if none is."""
        windows, base = self.windows(most), Case(problem=self.base)
        served = (one for one in reversed(windows) if not self.reasons(base.but(**full_windows(one)).problem))
        return next(served, windows[-1])

    def attend(self, case: Case) -> Attend:
        return attend_by(self.backend.name, case)

    def verify(self, case: Case) -> None:
        """Raise CheckFailed unless the backend serves `case` within the error budget and keeps to the contract."""
        verify(self.attend(case), case)

    def reasons(self, problem: Problem) -> list[Reason]:
        """Why the backend declines `problem`; an empty list means that it must serve it."""
        return self.facts.unsupported(problem) or list(self.backend.unsupported(problem))

    def cases(self, **drawn: Any) -> SearchStrategy[Case]:
        """Cases that the backend says it serves; arguments as for `strategies.cases`."""
        return self.served(strategies.cases(self.facts, self.base, **drawn))

    def served(self, drawn: SearchStrategy[Case]) -> SearchStrategy[Case]:
        """Those of the cases that the backend says it serves."""
        return drawn.filter(lambda case: not self.reasons(case.problem))

    def all_cases(self) -> SearchStrategy[Case]:
        """Cases of everything that the facts allow, also such as the backend declines beyond them."""
        return strategies.cases(self.facts, self.base, **strategies.ANYTHING)

    def variants(self, *changes: dict[str, Any], **fixed: Any) -> list[Case]:
        """The cases of `base` with each of `changes`, block and grid, that the backend says it serves.

        Another dtype brings a bias of that dtype, where it is declared.
        """
        base, found = Case(problem=self.base, seed=self.seed), []
        for change in changes:
            with_dtype = "dtype" in change and self.base.bias is not None
            bias = {"bias": self._bias_beside(change["dtype"])} if with_dtype else {}
            found += [base.but(**(bias | fixed | change), axis=axis) for axis in strategies.AXES]
        return [case for case in dict.fromkeys(found) if not self.reasons(case.problem)]

    def try_drawn(self, drawn: SearchStrategy[Case], test: Test, *, share: float = 1.0) -> None:
        """Try `test` on cases that hypothesis draws, for a share of the examples. Raises Failing with the smallest."""
        failing: list[Failing] = []

        def tried(case: Case) -> None:
            if failing and failing[-1].fatal:
                raise failing[-1]
            try:
                self._try(test, case)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                failing.append(Failing(case, error))
                raise failing[-1] from error
            if not failing:
                self.count()

        explore = hypothesis.settings(
            max_examples=max(1, round(self.examples * share)),
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
            suppress_health_check=list(hypothesis.HealthCheck),
            report_multiple_bugs=False,
            print_blob=False,
            verbosity=hypothesis.Verbosity.quiet,
        )
        try:
            hypothesis.seed(self.seed)(explore(hypothesis.given(case=drawn)(tried)))()
        except hypothesis.errors.Unsatisfiable:
            reason = "the backend declines every problem that was drawn from its facts"
            raise Failing(None, NotApplicable(reason)) from None
        except Exception as error:
            raise (failing[-1] if failing else error) from None

    def try_each(self, cases: Iterable[Case], test: Test) -> None:
        """Try `test` on every case. Raises Failing with the first that fails, made simpler as long as it fails."""
        for case in cases:
            try:
                self._try(test, case)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                raise self._simplest(Failing(case, error), test) from error
            self.count()

    def _simplest(self, failing: Failing, test: Test) -> Failing:
        """The same failure of a case with less in it."""
        for change in SIMPLER:
            if failing.case is None or failing.fatal:
                break
            case = failing.case.but(**change)
            if case == failing.case or self.reasons(case.problem):
                continue
            try:
                self._try(test, case)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                if _kind(error) == _kind(failing.cause):
                    failing = Failing(case, error)
        return failing

    def _try(self, test: Test, case: Case) -> None:
        """One case; what fails on the device is told here, and not in the next case."""
        test(case)
        if self.device != "cpu":
            torch.accelerator.synchronize()

    def count(self) -> None:
        """One more case is done."""
        self.done += 1
        self.on_case()


def _unlike_5x3(window: tuple[int, int]) -> tuple[bool, int, bool]:
    """Rectangular windows before square ones, those that are nearly square before narrow ones, and high ones first."""
    high, wide = window
    return high == wide, abs(high - wide), high < wide


def _kind(error: BaseException) -> tuple[type, list[str]]:
    """What two errors have in common that tell of the same fault."""
    return type(error), str(error).split()[:3]


def full_windows(window: tuple[int, int]) -> dict[str, Any]:
    """The fields of a problem of one image of 2 x 1 full windows."""
    return {"window": window, "height": 2 * window[0], "width": window[1], "batch": 1}
