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

PYTORCHS_OWN = frozenset({"aten", "prim", "prims", "profiler", "inductor", "rngprims", "debugprims"})


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


@check("torch.export gives a program that equals eager, for every batch", declared("export"))
def exported(subject: Subject) -> None:
    cases = subject.variants(
        {}, {"height": 2 * subject.base.window[0] - 1}, requires_grad=False, bias_requires_grad=False
    )
    served = _served(subject, cases, compiling=True, exporting=True)
    subject.try_each(served, lambda case: _check_exported(subject, case))


def _check_exported(subject: Subject, case: Case) -> None:
    attend = subject.attend(case)
    dynamic = not subject.reasons(case.but(batch=None, compiling=True, exporting=True).problem)

    class Attention(nn.Module):
        def forward(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
            return attend(qkv, bias)

    inputs = case.but(batch=4).tensors()
    of_bias: dict[int, Any] | None = None if inputs.bias is None else {}
    shapes = ({0: Dim("batch")}, of_bias) if dynamic else None
    with torch.no_grad():
        program = export(Attention(), (inputs.qkv, inputs.bias), dynamic_shapes=shapes).module()
        for batch in (4, 7) if dynamic else (4,):
            verify(program, case.but(batch=batch))


@check("custom operators pass torch.library.opcheck: their schema, fake and autograd are right", declared("compile"))
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
    for operator, args, kwargs in _custom_calls(subject, case):
        for test, outcome in torch.library.opcheck(operator, args, kwargs, raise_exception=False).items():
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
