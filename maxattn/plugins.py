"""Finding plugins: each is loaded under guard, so that a broken one is reported and cannot stop the others."""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import Distribution, EntryPoint, distributions
from time import perf_counter

import pluggy

from maxattn import core_plugin, hookspecs
from maxattn.ops import registry
from maxattn.ops.contract import API_VERSION, Backend

GROUP = "maxattn"
ALLOWLIST_VARIABLE = "MAXATTN_PLUGINS"
log = logging.getLogger("maxattn")


@dataclass(frozen=True)
class Plugin:
    """One installed plugin and how loading it went; `failure` is empty if it went well.

    A distribution that does not tell its name is given by the path of its metadata. `seconds` is what importing the
    plugin and calling its hook took.
    """

    name: str
    distribution: str
    version: str
    backends: tuple[str, ...] = ()
    failure: str = ""
    traceback: str = ""
    seconds: float = 0.0


class PluginError(Exception):
    """A plugin that loads but does not keep to the contract."""


@dataclass
class Loaded:
    """Everything that was found: the plugins, well or not, and the backends of those that are well."""

    plugins: list[Plugin] = field(default_factory=list)
    backends: dict[str, Backend] = field(default_factory=dict)
    owners: dict[str, str] = field(default_factory=dict)


def load() -> Loaded:
    """Load the core's backends, then every allowed plugin in the order of their names; once per process."""
    registry.backends()
    return _load()


@cache
def _load() -> Loaded:
    """Called under the registry's lock: a plugin that asks for backends while it is loaded gets none yet."""
    loaded = Loaded()
    _load_one(loaded, "core", "maxattn", _own_version(), lambda: core_plugin)
    allowed = _allowlist()
    for point in _entry_points(loaded):
        distribution, version = _origin(point.dist)
        if allowed is not None and point.name not in allowed:
            skipped = f"not loaded: {ALLOWLIST_VARIABLE} does not name it"
            loaded.plugins.append(Plugin(point.name, distribution, version, failure=skipped))
            continue
        _load_one(loaded, point.name, distribution, version, point.load)
    return loaded


def _entry_points(loaded: Loaded) -> list[EntryPoint]:
    """Our group's entry points, of each distribution by itself: a file that cannot be read hides only its own.

    As everywhere in Python, the first distribution of a name on the path hides later ones.
    """
    found: dict[str, list[EntryPoint]] = {}
    for distribution in distributions():
        try:
            points = list(distribution.entry_points.select(group=GROUP))
            if points:
                found.setdefault(re.sub("[-_.]+", "-", _origin(distribution)[0]).lower(), points)
        except Exception as error:
            name, version = _origin(distribution)
            failure = f"its entry points cannot be read: {registry.told(error)}"
            log.warning("%s: %s", name, failure)
            loaded.plugins.append(Plugin("?", name, version, failure=failure, traceback=_traceback(error)))
    return sorted((point for points in found.values() for point in points), key=lambda one: (one.name, one.value))


def _origin(distribution: Distribution | None) -> tuple[str, str]:
    """The name and the version; where an interrupted installation left none, the path of the metadata and "?"."""
    path = str(getattr(distribution, "_path", "?"))
    try:
        return (distribution.name or path, distribution.version or "?") if distribution else (path, "?")
    except Exception:
        return path, "?"


def _load_one(loaded: Loaded, name: str, distribution: str, version: str, load_object: Callable[[], object]) -> None:
    start = perf_counter()
    try:
        with redirect_stdout(sys.stderr):  # a plugin's chatter would spoil a command's JSON
            backends = _backends_of(name, load_object())
        _check_unclaimed(loaded, backends, distribution)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # sys.exit(), and the panics of extension modules
        failure, seconds = registry.told(error), perf_counter() - start
        log.warning("plugin %s of %s is installed but failed: %s", name, distribution, failure)
        loaded.plugins.append(Plugin(name, distribution, version, (), failure, _traceback(error), seconds))
        return
    for backend in backends:
        loaded.backends[backend.name] = backend
        loaded.owners[backend.name] = distribution
    names = tuple(backend.name for backend in backends)
    loaded.plugins.append(Plugin(name, distribution, version, names, seconds=perf_counter() - start))


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def _check_unclaimed(loaded: Loaded, backends: list[Backend], distribution: str) -> None:
    for backend in backends:
        if backend.name in loaded.backends:
            raise PluginError(
                f"backend {backend.name!r} is provided by two distributions, {loaded.owners[backend.name]} and "
                f"{distribution}: uninstall one, or leave one out of {ALLOWLIST_VARIABLE}"
            )


def _backends_of(name: str, plugin: object) -> list[Backend]:
    """Call the plugin's hook through a manager of its own, so that what it gives or breaks is its own."""
    manager = pluggy.PluginManager("maxattn")
    manager.add_hookspecs(hookspecs)
    _check_hooks(plugin)
    manager.register(plugin, name)
    manager.check_pending()
    given = manager.hook.maxattn_backends()
    if not given:
        what = "returned None" if manager.hook.maxattn_backends.get_hookimpls() else "is missing"
        raise PluginError(f"hook maxattn_backends {what}; it must return a list of backends")
    backends = [backend for one in given for backend in one]
    names = [_checked(backend).name for backend in backends]
    twice = {backend for backend in names if names.count(backend) > 1}
    if twice:
        raise PluginError(f"backend {min(twice)!r} is given twice by the same plugin")
    return backends


def _check_hooks(plugin: object) -> None:
    for attribute in dir(plugin):
        implementation = getattr(plugin, attribute)
        if attribute.startswith("maxattn_") and callable(implementation):
            if not hasattr(implementation, "maxattn_impl"):
                raise PluginError(f"hook {attribute} is not marked: put @maxattn.hookspecs.hookimpl above it")
            for parameter in inspect.signature(implementation).parameters.values():
                if parameter.kind is parameter.VAR_KEYWORD:
                    raise PluginError(f"hook {attribute} takes **{parameter.name}: name the arguments it uses instead")


def _checked(given: object) -> Backend:
    backend = registry.checked(given)
    name = backend.name
    if backend.api_version[0] != API_VERSION[0]:
        seen, ours = (".".join(map(str, version)) for version in (backend.api_version, API_VERSION))
        raise PluginError(f"backend {name!r} is written for plugin API {seen}, this maxattn has {ours}")
    parameters = inspect.signature(backend.attend).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        raise PluginError(f"backend {name!r}: attend takes **kwargs; its arguments are qkv, bias, problem")
    return backend


def _allowlist() -> frozenset[str] | None:
    """The plugin names `MAXATTN_PLUGINS` allows; None if it is not set, which allows all. The core's is no plugin."""
    names = os.environ.get(ALLOWLIST_VARIABLE)
    return None if names is None else frozenset(name.strip() for name in names.split(",") if name.strip())


def _own_version() -> str:
    from maxattn import __version__

    return __version__


registry.load_with(lambda: _load().backends)
