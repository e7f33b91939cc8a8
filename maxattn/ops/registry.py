"""The backends there are, by name. Filled at first use by a loader from a layer above, which knows of plugins."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from maxattn.ops.contract import Backend, Capabilities

BACKENDS: dict[str, Backend] = {}
"""Every registered backend. Read it through `backends()`, which fills it first."""

_lock = threading.RLock()
_on_change: list[Callable[[], None]] = []
_loader: Callable[[], Mapping[str, Backend]] | None = None
_loading = False


def load_with(loader: Callable[[], Mapping[str, Backend]]) -> None:
    """Have the registry filled by `loader` when a backend is first asked for."""
    global _loader
    _loader = loader


def on_change(callback: Callable[[], None]) -> None:
    """Call `callback` whenever the set of backends has changed, for whoever caches a choice among them."""
    _on_change.append(callback)


def backends() -> Mapping[str, Backend]:
    """The registered backends by name."""
    global _loader, _loading
    if _loader is not None:
        with _lock:
            if _loader is not None and not _loading:  # a plugin may ask while it is being loaded itself
                _loading = True
                try:
                    BACKENDS.update(_loader())
                    _loader = None
                finally:
                    _loading = False
    return BACKENDS


def checked(backend: object) -> Backend:
    """`backend`, if it is an instance of `Backend` with a name and capabilities.

    Raises:
        TypeError: for what is none, or states no `Capabilities`.
        ValueError: for a name that is no identifier.
    """
    if isinstance(backend, type) and issubclass(backend, Backend):
        raise TypeError(f"a backend must be an instance: {backend.__name__}(), not the class")
    if not isinstance(backend, Backend):
        raise TypeError(f"a backend must be an instance of maxattn.Backend, not {backend!r}")
    name = getattr(backend, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"a backend's name must be an identifier, not {name!r}")
    facts = backend.capabilities
    if not isinstance(facts, Capabilities):
        raise TypeError(f"backend {name!r}: capabilities must be maxattn.Capabilities, not {facts!r}")
    return backend


def told(error: BaseException) -> str:
    """The error's kind and message in one line, as a traceback ends."""
    try:
        message = " ".join(str(error).split())
    except Exception:
        message = "<exception str() failed>"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


@contextmanager
def registered(backend: Backend) -> Iterator[Backend]:
    """Have `backend` registered within a `with` block, in place of one of the same name: for trying and testing one.

    Example:
        >>> from maxattn.ops.naive import Naive
        >>> class Mine(Naive):
        ...     name = "mine"
        >>> with registered(Mine()):
        ...     "mine" in backends()
        True
    """
    before = backends().get(checked(backend).name)
    BACKENDS[backend.name] = backend
    _changed()
    try:
        yield backend
    finally:
        del BACKENDS[backend.name]
        if before is not None:
            BACKENDS[backend.name] = before
        _changed()


def _changed() -> None:
    for callback in _on_change:
        callback()
