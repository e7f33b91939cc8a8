"""What the conformance kit found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from maxattn.ops.contract import Problem
from maxattn.testing.case import Case


@dataclass(frozen=True)
class Outcome:
    """How one check went.

    `examples` is how many cases kept the promise. On failure, `failure` says what was wrong, `case` is the smallest
    case found that fails, with its `Problem`, and `seed` draws it again. `fatal` tells that the device can do nothing
    more in this process, so that no later check was run. `reason` tells why a check does not apply.
    """

    name: str
    promise: str
    status: Literal["passed", "failed", "not applicable"]
    seed: int
    examples: int = 0
    failure: str = ""
    case: Case | None = None
    fatal: bool = False
    reason: str = ""

    @property
    def problem(self) -> Problem | None:
        """The smallest problem found that fails."""
        return self.case.problem if self.case else None

    def __str__(self) -> str:
        if self.status == "passed":
            return f"{self.name:21}  passed, {self.examples} examples"
        if self.status == "not applicable":
            return f"{self.name:21}  not applicable: {self.reason}"
        facts = [f"{self.name:21}  FAILED: {self.failure}", f"promised: {self.promise}"]
        facts += [f"smallest case found: {self.case}"] if self.case else []
        facts += ["the device can do nothing more in this process: no later check was run"] if self.fatal else []
        return f"\n{'':23}".join(facts)


@dataclass(frozen=True)
class Report:
    """How a backend did on a device: an `Outcome` for each check that ran."""

    backend: str
    device: str
    checks: tuple[Outcome, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed, and some were made."""
        return not self.failed and any(outcome.status == "passed" for outcome in self.checks)

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The checks that failed."""
        return tuple(outcome for outcome in self.checks if outcome.status == "failed")

    def __str__(self) -> str:
        examples = sum(outcome.examples for outcome in self.checks)
        tried = any(outcome.status != "not applicable" for outcome in self.checks)
        verdict = (
            "nothing was tried"
            if not tried
            else "passes"
            if self.passed
            else f"FAILS {len(self.failed)} of {len(self.checks)} checks"
        )
        lines: list[str] = []
        first: dict[str, str] = {}
        for outcome in self.checks:
            known = first.setdefault(outcome.failure, outcome.name) if outcome.failure else outcome.name
            lines.append(str(outcome) if known == outcome.name else f"{outcome.name:21}  FAILED: as {known} does")
        return "\n".join([*lines, f"{self.backend} on {self.device}: {verdict}, {examples} examples"])
