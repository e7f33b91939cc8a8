"""What is installed, told without importing it: for backends, whose libraries are imported at first use."""

from __future__ import annotations

from importlib.machinery import PathFinder
from importlib.util import find_spec


def has_module(module: str) -> bool:
    """Whether there is such a module; nothing is imported, not even the package that it is part of.

    Example:
        >>> has_module("torch.nn"), has_module("torch.no_such_part"), has_module("no_such_package.part")
        (True, False, False)
    """
    package, _, rest = module.partition(".")
    spec = find_spec(package)
    if spec is None or not rest:
        return spec is not None
    return PathFinder.find_spec(module, spec.submodule_search_locations) is not None
