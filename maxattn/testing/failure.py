"""How a check says no."""

from __future__ import annotations


class CheckFailed(AssertionError):  # noqa: N818 - it is no error of the program
    """A backend does not keep a promise."""


def require(condition: bool, message: str) -> None:
    """Raise CheckFailed with `message` unless `condition` holds."""
    if not condition:
        raise CheckFailed(message)


class NotApplicable(Exception):  # noqa: N818
    """A check cannot be made here; the message says why."""
