"""The conformance kit: does a backend compute Max-SA, for all that it declares? Anyone may point it at theirs.

`check_backend` checks and reports, `parametrize_with_backend_checks` makes tests of it. Both draw their problems with
hypothesis: `pip install 'maxattn[testing]'`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maxattn.testing import strategies
    from maxattn.testing.case import Case
    from maxattn.testing.parametrize import parametrize_with_backend_checks
    from maxattn.testing.report import Outcome, Report
    from maxattn.testing.runner import check_backend

__all__ = ["Case", "Outcome", "Report", "check_backend", "parametrize_with_backend_checks", "strategies"]

_AT_FIRST_USE = {
    "Case": "maxattn.testing.case",
    "Outcome": "maxattn.testing.report",
    "Report": "maxattn.testing.report",
    "check_backend": "maxattn.testing.runner",
    "parametrize_with_backend_checks": "maxattn.testing.parametrize",
    "strategies": "maxattn.testing.strategies",
}


def __getattr__(name: str) -> Any:
    if name not in _AT_FIRST_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module(_AT_FIRST_USE[name])
    except ModuleNotFoundError as error:
        if error.name not in ("hypothesis", "pytest"):
            raise
        raise ModuleNotFoundError(
            f"{name} needs {error.name}, which is not installed: pip install 'maxattn[testing]'", name=error.name
        ) from error
    return module if name == "strategies" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
