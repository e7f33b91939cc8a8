"""The checks there are: each a function with a name, what it promises, and what it needs a backend to declare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from maxattn.testing.subject import Subject

Needs = Callable[[Subject], str]
"""Why a check does not apply, or an empty text."""


@dataclass(frozen=True)
class Check:
    """One promise of the contract. `needs` tells why it does not apply to a backend; an empty text means it does."""

    name: str
    promise: str
    run: Callable[[Subject], None]
    needs: tuple[Needs, ...] = ()

    def not_applicable(self, subject: Subject) -> str:
        return next(filter(None, (needs(subject) for needs in self.needs)), "")


CHECKS: dict[str, Check] = {}
"""All checks by name, in the order they run in: cheap ones first."""


def check(promise: str, *needs: Needs) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    """Register a function as the check of its name."""

    def register(run: Callable[[Subject], None]) -> Callable[[Subject], None]:
        CHECKS[run.__name__] = Check(run.__name__, promise, run, needs)
        return run

    return register


def declared(*names: str) -> Needs:
    """Needs that the capabilities declare all of `names`."""

    def missing(subject: Subject) -> str:
        absent = [name for name in names if not getattr(subject.facts, name)]
        return f"not declared: {', '.join(absent)}" if absent else ""

    return missing


def on(*devices: str) -> Needs:
    """Needs one of `devices`."""
    return lambda subject: "" if subject.device in devices else f"only on {' and '.join(devices)}"
