"""`maxattn doctor`."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import typer

import maxattn
from maxattn import plugins
from maxattn.bench import cpu_model, device_types
from maxattn.cli.output import JsonOption, print_json, print_table
from maxattn.cli.self_check import Check, check_backend
from maxattn.ops.contract import Problem
from maxattn.ops.dispatch import ENVIRONMENT_VARIABLE, compute_capability
from maxattn.ops.max_sa import explain
from maxattn.ops.registry import backends, told

SLOW_SECONDS = 1.0
"""A plugin that takes longer to load makes every program wait that asks for a backend."""
SMALL = Problem(axis="block", window=(7, 7), batch=1, height=14, width=14, heads=1, head_dim=32)


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(as_json: JsonOption = False) -> None:
    """Show what is installed and check that it works.

    The exit code is 1 if something is broken. Lists versions, devices, environment variables and plugins, and has
    every backend compute small problems, forward and backward, on each kind of device that it can use: the results must
    agree with the specification, which is `naive` in fp64. A plugin that fails is shown with its error, and stops no
    other; `--json` has its traceback.

    \b
    Example:
      $ maxattn doctor
      $ maxattn doctor --json
    """
    with _nothing_told_twice():
        facts = _facts()
    if as_json:
        print_json(facts)
    else:
        _print(facts)
    if facts["problems"]:
        raise typer.Exit(1)


@contextmanager
def _nothing_told_twice() -> Iterator[None]:
    """Leave stdout to the facts, whatever backends print, and unless asked for do not log what is in them anyway."""
    log, handler = logging.getLogger("maxattn"), logging.NullHandler()
    log.addHandler(handler)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        log.removeHandler(handler)


def _facts() -> dict[str, Any]:
    loaded = plugins.load()
    checks = [
        check
        for device in device_types()
        for backend in backends().values()
        for check in check_backend(backend, device)
    ]
    environment = {name: os.environ.get(name) for name in (ENVIRONMENT_VARIABLE, plugins.ALLOWLIST_VARIABLE)}
    problems = (
        _plugin_problems(loaded),
        _environment_problems(loaded, environment),
        _check_problems(checks),
        _kernel_problems(),
    )
    return {
        "versions": _versions(),
        "devices": _devices(),
        "environment": environment,
        "plugins": loaded.plugins,
        "checks": checks,
        "problems": [problem for found in problems for problem in found],
        "notes": _slow_plugins(loaded),
    }


def _versions() -> dict[str, str | None]:
    return {
        "maxattn": maxattn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "triton": _installed("triton"),
    }


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The version of NVIDIA's driver; None where there is none that answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(answer.stdout.split()), None)


def _devices() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"device": "cpu", "name": cpu_model(), "compute_capability": None}]
    for kind in device_types()[1:]:
        module = torch.get_device_module(kind)
        for index in range(torch.accelerator.device_count()):
            device = torch.device(kind, index)
            name = module.get_device_name(index) if hasattr(module, "get_device_name") else kind
            found.append({"device": str(device), "name": name, "compute_capability": compute_capability(device)})
    return found


def _plugin_problems(loaded: plugins.Loaded) -> list[str]:
    return [
        f"plugin {plugin.name} of {plugin.distribution}: installed, but failed: {plugin.failure}"
        for plugin in loaded.plugins
        if plugin.traceback
    ]


def _slow_plugins(loaded: plugins.Loaded) -> list[str]:
    return [
        f"plugin {plugin.name} of {plugin.distribution} took {plugin.seconds:.1f} s to load: "
        "import its library at first use, inside attend"
        for plugin in loaded.plugins
        if plugin.seconds > SLOW_SECONDS
    ]


def _environment_problems(loaded: plugins.Loaded, environment: dict[str, str | None]) -> list[str]:
    """Names in the variables that stand for nothing installed; a list of backends may have some, but not only such."""
    known = {
        ENVIRONMENT_VARIABLE: ("backend", list(loaded.backends)),
        plugins.ALLOWLIST_VARIABLE: ("plugin", [plugin.name for plugin in loaded.plugins[1:]]),
    }
    problems = []
    for variable, (what, names) in known.items():
        listed = _names(environment[variable])
        serves = variable == ENVIRONMENT_VARIABLE and any(name in names for name in listed)
        problems += [
            f"{variable} names {name!r}, but no such {what} is installed; known: {', '.join(names) or 'none'}"
            for name in listed
            if name not in names and not serves
        ]
    return problems


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def _check_problems(checks: Iterable[Check]) -> list[str]:
    """A line for each thing that is wrong with a backend on a device, with the problems that show it."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for check in checks:
        if check.status == "failed":
            found.setdefault((check.backend, check.device, check.detail), []).append(check.problem)
    return [
        f"backend {backend} failed on {device} ({first}{f'; and {len(others)} more' if others else ''}): {detail}"
        for (backend, device, detail), (first, *others) in found.items()
    ]


def _kernel_problems() -> Iterator[str]:
    """Backends that can serve a problem, but cannot tell by which kernel."""
    for device in device_types():
        capability = compute_capability(torch.device(device))
        problem = replace(SMALL, device=device, compute_capability=capability)
        for backend in backends().values():
            if explain(problem, backend=backend.name).backend is None:
                continue
            try:
                backend.kernel(problem)
            except KeyboardInterrupt:
                raise
            except BaseException as error:
                yield f"backend {backend.name} cannot tell its kernel on {device}: {told(error)}"


def _print(facts: dict[str, Any]) -> None:
    versions = [(name, value or "none") for name, value in facts["versions"].items()]
    devices = [(one["device"], one["name"], _dotted(one["compute_capability"])) for one in facts["devices"]]
    environment = [(name, "not set" if value is None else repr(value)) for name, value in facts["environment"].items()]
    found = [(one.name, one.distribution, one.version, _outcome(one)) for one in facts["plugins"]]
    print_table(("", ""), versions, title="Versions")
    print_table(("device", "name", "compute capability"), devices, title="\nDevices")
    print_table(("", ""), environment, title="\nEnvironment")
    print_table(("plugin", "distribution", "version", "backends"), found, title="\nPlugins")
    print_table(("backend", "device", "result"), _check_rows(facts["checks"]), title="\nSelf check")
    if not facts["problems"]:
        typer.echo("\nEverything works.")
    for title in ("problems", "notes"):
        if facts[title]:
            typer.echo("\n".join([f"\n{title.capitalize()}:", *(f"- {told}" for told in facts[title])]))


def _outcome(plugin: plugins.Plugin) -> str:
    if plugin.traceback:
        return f"installed, but failed: {plugin.failure}"
    return plugin.failure or ", ".join(plugin.backends)


def _dotted(capability: tuple[int, int] | None) -> str:
    return "-" if capability is None else "{}.{}".format(*capability)


def _check_rows(checks: list[Check]) -> list[tuple[str, str, str]]:
    """A row for each backend and device: what went well, else what did not, else why nothing was tried."""
    groups: dict[tuple[str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.backend, check.device), []).append(check)
    return [(*key, _result(group)) for key, group in groups.items()]


def _result(checks: list[Check]) -> str:
    failed = [check for check in checks if check.status == "failed"]
    if failed:
        return f"failed: {len(failed)} of {len(checks)} problems, the first because {failed[0].detail}"
    reasons = "; ".join(dict.fromkeys(check.detail for check in checks if check.status == "unable"))
    shares = [check.share for check in checks if check.share is not None]
    if not shares:
        return f"not able: {reasons}"
    result = f"ok: {len(shares)} of {len(checks)} problems, largest error {max(shares):.0%} of what is allowed"
    return f"{result}; not able: {reasons}" if reasons else result
