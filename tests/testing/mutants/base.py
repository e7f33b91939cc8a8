"""What a mutant is, and how one is written: as a function around `naive`, or as a backend with one step changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import maxattn
from maxattn import Backend, Capabilities, Problem

Attend = Callable[[Tensor, Tensor | None, Problem], Tensor]


@dataclass(frozen=True)
class Mutant:
    """A backend with one bug, and one line that says which."""

    name: str
    bug: str
    make: Callable[[], Backend]


def mutant(**facts: Any) -> Callable[[type[Backend] | Attend], Mutant]:
    """The mutant of a backend's class or of an `attend` function; its docstring is the bug.

    The `facts` are its capabilities, if they are not those of its class.
    """

    def decorate(written: type[Backend] | Attend) -> Mutant:
        name = written.__name__
        if isinstance(written, type):
            name = re.sub(r"(?<!^)(?=[A-Z])|(?<=[a-z]{3})(?=[0-9])", "_", name).lower()
        bug = (written.__doc__ or "").strip()
        assert bug, f"{name} does not say what its bug is"
        base: tuple[type, ...] = (written,) if isinstance(written, type) else (Backend,)
        body: dict[str, Any] = {"name": name}
        if not isinstance(written, type):
            body["attend"] = lambda self, qkv, bias, problem: written(qkv, bias, problem)
        if facts:
            body["capabilities"] = Capabilities(**facts)
        return Mutant(name, bug, type(name, base, body))

    return decorate


def exact(qkv: Tensor, bias: Tensor | None, problem: Problem, **changed: Any) -> Tensor:
    """What is right, for a mutant to spoil: `naive`, with some of the arguments of `max_sa` changed."""
    arguments = {
        "axis": problem.axis,
        "window": problem.window,
        "scale": problem.scale,
        "dropout_p": problem.dropout_p,
    } | changed
    return maxattn.max_sa(qkv, bias=bias, **arguments, backend="naive")


EAGER = {"compile": False, "export": False}
"""The facts of backends that a compiler cannot trace, because they keep state or look at addresses."""
