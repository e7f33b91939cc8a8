"""Under PyTorch's compilers, which trace what eager calls run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, export
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from maxattn.testing import strategies
from maxattn.testing.budget import collect
from maxattn.testing.case import Case
from maxattn.testing.failure import NotApplicable, require
from maxattn.testing.observe import verify
from maxattn.testing.registry import check, declared
from maxattn.testing.subject import NO_GRADIENT, Subject

PYTORCHS_OWN = frozenset({"aten", "prim", "prims", "profiler", "inductor", "rngprims", "debugprims", "higher_order"})


@check(
    "torch.compile(fullgraph=True) traces forward and backward, and equals eager for every batch", declared("compile")
)
def compiled(subject: Subject) -> None:
    cases = subject.variants(
        {}, {"height": 2 * subject.base.window[0] - 1}, {"bias": None, "bias_requires_grad": False}
    )
    cases += subject.variants({"dtype": strategies.dtypes(subject.facts)[-1], "scale": 0.3})
    subject.try_each(_served(subject, cases, compiling=True), lambda case: _check_compiled(subject, case, "aot_eager"))


@check("so does code that the default compiler generates", declared("compile"))
def generated(subject: Subject) -> None:
    if subject.device == "cpu" and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
        raise NotApplicable("PyTorch's compiler needs a C++ compiler for the CPU, and there is none")
    cases = [case for case in subject.variants({}) if case.problem.axis == "grid"]
    subject.try_each(_served(subject, cases, compiling=True), lambda case: _check_compiled(subject, case, "inductor"))


def _check_compiled(subject: Subject, case: Case, compiler: str) -> None:
    with _fresh_compiler():
        attend = torch.compile(subject.attend(case), fullgraph=True, backend=compiler)
        dynamic = not subject.reasons(case.but(batch=None, compiling=True).problem)
        for batch in (2, 5, 3) if dynamic else (2,):
            verify(attend, case.but(batch=batch))


@check(
    "torch.export gives a program that equals eager, for every batch, and every size if it can be left open",
    declared("export"),
)
def exported(subject: Subject) -> None:
    tried: list[dict[str, Any]] = [{}, {"height": 2 * subject.base.window[0] - 1}, {"scale": 0.3, "bias": None}]
    cases = subject.variants(*tried, requires_grad=False, bias_requires_grad=False)
    served = _served(subject, cases, compiling=True, exporting=True)
    subject.try_each(served, lambda case: _check_exported(subject, case))


def _check_exported(subject: Subject, case: Case) -> None:
    attend, problem = subject.attend(case), case.problem
    (P_h, P_w), (_, height, width) = problem.window, case.sizes

    class Attention(nn.Module):
        def forward(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
            return attend(qkv, bias)

    def check(names: tuple[str, ...], *sizes: tuple[int, int, int], may_fail: bool = False) -> None:
        """Export at the first of `sizes`, with those that are named left open; try all of them."""
        first, *_ = cases = [case.but(batch=B, height=H, width=W) for B, H, W in sizes]
        inputs = first.tensors()
        least = {"batch": 1, "height": P_h + 1, "width": P_w + 1}  # a graph may take several groups a side for granted
        of_qkv = {list(least).index(name): Dim(name, min=least[name]) for name in names}
        of_bias: dict[int, Any] | None = None if inputs.bias is None else {}
        with torch.no_grad():
            try:
                program = export(Attention(), (inputs.qkv, inputs.bias), dynamic_shapes=(of_qkv, of_bias)).module()
            except Exception:
                if may_fail:
                    return
                raise
            for each in cases:
                verify(program, each)

    def served(*names: str) -> bool:
        return not subject.reasons(case.but(**dict.fromkeys(names), compiling=True, exporting=True).problem)

    if served("batch", "height", "width"):
        sizes = (4, 2 * P_h + 1, 3 * P_w), (7, 3 * P_h, 2 * P_w + 1), (3, 5 * P_h, 4 * P_w)
        check(("batch", "height", "width"), *sizes, may_fail=True)
    if served("batch"):
        check(("batch",), (4, height, width), (7, height, width))
    else:
        check((), (4, height, width))


@check("custom operators pass torch.library.opcheck: their schema, autograd and, where compile is declared, fake")
def operators(subject: Subject) -> None:
    dtypes = [{"dtype": dtype} for dtype in strategies.dtypes(subject.facts)]
    cases = subject.variants(*dtypes, NO_GRADIENT, {"bias": None, "bias_requires_grad": False})
    if not any(_custom_calls(subject, case) for case in cases):
        raise NotApplicable("it calls no operator but PyTorch's own")
    subject.try_each(cases, lambda case: _check_operators(subject, case))


_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


def _custom_calls(subject: Subject, case: Case) -> list[_Call]:
    """Calls of operators that are not PyTorch's own, forward and backward, with their arguments."""
    calls: list[_Call] = []

    def fresh(x: Tensor) -> Tensor:
        """A copy that needs a gradient if it did, unless this is the backward pass, which has none of its own."""
        return x.detach().clone().requires_grad_(x.requires_grad and torch.is_grad_enabled())

    class Recorder(TorchDispatchMode):
        supports_higher_order_operators = True

        @classmethod
        def is_infra_mode(cls) -> bool:
            """So that a backend that compiles a kernel of its own may do so while this looks on."""
            return True

        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if operator.namespace not in PYTORCHS_OWN:
                calls.append((operator, *tree_map_only(Tensor, fresh, (args, kwargs or {}))))
            return operator(*args, **(kwargs or {}))

    inputs = case.tensors()
    recorder: TorchDispatchMode = Recorder()  # type: ignore[no-untyped-call]
    with recorder, torch.set_grad_enabled(case.problem.differentiated):
        collect(subject.attend(case)(inputs.qkv, inputs.bias), inputs.leaves, inputs.grad_out)
    return calls


def _check_operators(subject: Subject, case: Case) -> None:
    tests = ["test_schema", "test_autograd_registration"]
    tests += ["test_faketensor", "test_aot_dispatch_dynamic"] if subject.facts.compile else []
    for operator, args, kwargs in _custom_calls(subject, case):
        outcomes = torch.library.opcheck(operator, args, kwargs, test_utils=tests, raise_exception=False)
        for test, outcome in outcomes.items():
            require(outcome == "SUCCESS", f"opcheck of {operator}, {test}: {outcome}")


def _served(subject: Subject, cases: list[Case], **compiler: bool) -> list[Case]:
    """Those that the backend says it serves under this compiler."""
    return [case for case in cases if not subject.reasons(case.but(**compiler).problem)]


@contextmanager
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    try:
        yield
    finally:
        torch.compiler.reset()
