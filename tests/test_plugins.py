"""Plugins are found, guarded one by one, and reported; ours come through the same hook.

The plugins here are real distributions, a module and its metadata on the path of a fresh interpreter.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import maxattn
from maxattn import core_plugin, hookspecs

MODULE = """
import torch
from maxattn import Backend, Capabilities, max_sa
from maxattn.hookspecs import hookimpl

class Own(Backend):
    name = "{plugin}"

    def attend(self, qkv, bias, problem):
        return max_sa(qkv, problem.axis, problem.window, bias, backend="naive") + 1

"""

HOOK = """
@hookimpl
def maxattn_backends():
    return [Own()]
"""

# The code of each plugin, after MODULE, that is fine; and of each that is not, with a part of the failure reported.
FINE = {
    "fine": HOOK,
    "newer_minor": "Own.api_version = (1, 7)\n" + HOOK,
    "asks_while_it_is_loaded": "import maxattn\nmaxattn.list_backends()\n" + HOOK,
}
BROKEN = {
    "without_the_hook": ("", "hook maxattn_backends is missing; it must return a list of backends"),
    "forgets_to_return": (
        "@hookimpl\ndef maxattn_backends():\n    [Own()]\n",
        "hook maxattn_backends returned None; it must return a list of backends",
    ),
    "import_error": ("import a_library_that_is_missing\n", "No module named 'a_library_that_is_missing'"),
    "crash": ("1 / 0\n", "ZeroDivisionError: division by zero"),
    "exit": ("raise SystemExit('I leave')\n", "SystemExit: I leave"),
    "syntax_error": ("def\n", "SyntaxError: invalid syntax"),
    "crash_in_hook": ("@hookimpl\ndef maxattn_backends():\n    1 / 0\n", "ZeroDivisionError: division by zero"),
    "no_list": (HOOK.replace("[Own()]", "Own()"), "'Own' object is not iterable"),
    "a_class": (
        HOOK.replace("Own()", "Own"),
        "must return instances of maxattn.Backend, not <class 'a_class_mod.Own'>",
    ),
    "a_string": (HOOK.replace("Own()", "'naive'"), "must return instances of maxattn.Backend, not 'naive'"),
    "abstract": ("del Own.attend\nOwn.__abstractmethods__ = frozenset({'attend'})\n" + HOOK, "abstract"),
    "unnamed": ("del Own.name\n" + HOOK, "a backend's name must be an identifier, not None"),
    "misnamed": ("Own.name = 'my-own'\n" + HOOK, "a backend's name must be an identifier, not 'my-own'"),
    "capabilities": (
        "Own.capabilities = {'bias': True}\n" + HOOK,
        "backend 'capabilities': capabilities must be maxattn.Capabilities, not {'bias': True}",
    ),
    "too_new": (
        "Own.api_version = (2, 0)\n" + HOOK,
        "backend 'too_new' is written for plugin API 2.0, this maxattn has 1.0",
    ),
    "kwargs_of_hook": (
        "@hookimpl\ndef maxattn_backends(**options):\n    return [Own()]\n",
        "hook maxattn_backends takes **options: name the arguments it uses instead",
    ),
    "kwargs_of_attend": (
        "Own.attend = lambda self, qkv, bias, problem, **kwargs: qkv[:, :, :, 2]\n" + HOOK,
        "backend 'kwargs_of_attend': attend takes **kwargs; its arguments are qkv, bias, problem",
    ),
    "unknown_argument": ("@hookimpl\ndef maxattn_backends(device):\n    return [Own()]\n", "Argument(s) {'device'}"),
    "unknown_hook": (HOOK + "@hookimpl\ndef maxattn_nonsense():\n    return []\n", "unknown hook 'maxattn_nonsense'"),
    "unmarked": (
        "def maxattn_backends():\n    return [Own()]\n",
        "hook maxattn_backends is not marked: put @maxattn.hookspecs.hookimpl above it",
    ),
    "same_name_twice": (HOOK.replace("Own()", "Own(), Own()"), "'same_name_twice' is given twice by the same plugin"),
    "takes_naive": (
        "Own.name = 'naive'\n" + HOOK,
        "backend 'naive' is provided by two distributions, maxattn and takes-naive-dist: uninstall one",
    ),
    "takes_fine": (
        "Own.name = 'fine'\n" + HOOK,
        "backend 'fine' is provided by two distributions, fine-dist and takes-fine-dist: uninstall one",
    ),
}

REPORT = """
import dataclasses, json, torch, maxattn
loaded = maxattn.plugins.load()
qkv = torch.randn(1, 4, 4, 3, 1, 2)
naive = maxattn.max_sa(qkv, window=2, backend="naive")
print(json.dumps({
    "plugins": {plugin.name: dataclasses.asdict(plugin) for plugin in loaded.plugins},
    "backends": maxattn.list_backends(),
    "owners": loaded.owners,
    "added": {
        name: (maxattn.max_sa(qkv, window=2, backend=name) - naive).mean().item() for name in maxattn.list_backends()
    },
}))
"""


def install(site: Path, plugin: str, code: str, *, metadata: bool = True) -> None:
    """Put a distribution with one plugin into `site`, as an installer does."""
    (site / f"{plugin}_mod.py").write_text(MODULE.format(plugin=plugin) + code)
    folder = site / f"{plugin}_dist-1.2.dist-info"
    folder.mkdir(parents=True)
    (folder / "entry_points.txt").write_text(f"[maxattn]\n{plugin} = {plugin}_mod\n")
    if metadata:
        name = f"{plugin}-dist".replace("_", "-")
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")


def report(site: Path, **environment: str) -> dict[str, Any]:
    """What a fresh interpreter with `site` on its path finds; `log` is what it wrote to stderr."""
    path = os.pathsep.join([str(site), str(Path(maxattn.__file__).parents[1])])
    run = subprocess.run(
        [sys.executable, "-c", REPORT],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return {**json.loads(run.stdout), "log": run.stderr}


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All plugins above installed at once, good and bad."""
    site = tmp_path_factory.mktemp("site")
    for plugin, code in FINE.items():
        install(site, plugin, code)
    for plugin, (code, _) in BROKEN.items():
        install(site, plugin, code)
    install(site, "no_metadata", HOOK, metadata=False)
    install(site, "no_module", HOOK)
    (site / "no_module_mod.py").unlink()
    return report(site)


def test_the_cores_backends_come_through_the_hook(crowded: dict[str, Any]) -> None:
    core = crowded["plugins"]["core"]
    assert (core["distribution"], core["version"]) == ("maxattn", maxattn.__version__)
    assert core["backends"] == ["naive", "sdpa"]
    assert hasattr(core_plugin.maxattn_backends, "maxattn_impl")


@pytest.mark.parametrize("plugin", FINE)
def test_a_plugin_is_loaded_beside_all_that_are_broken(crowded: dict[str, Any], plugin: str) -> None:
    found = crowded["plugins"][plugin]
    assert found["failure"] == found["traceback"] == ""
    assert found["distribution"] == f"{plugin}-dist".replace("_", "-")
    assert found["version"] == "1.2"
    assert found["backends"] == [plugin]
    assert crowded["added"][plugin] == pytest.approx(1.0)
    assert crowded["owners"][plugin] == found["distribution"]


@pytest.mark.parametrize(("plugin", "failure"), [(plugin, failure) for plugin, (_, failure) in BROKEN.items()])
def test_a_broken_plugin_is_recorded_with_what_is_wrong(crowded: dict[str, Any], plugin: str, failure: str) -> None:
    found = crowded["plugins"][plugin]
    assert failure in found["failure"]
    assert "\n" not in found["failure"]
    assert found["traceback"].startswith("Traceback")
    assert found["backends"] == []
    distribution = f"{plugin}-dist".replace("_", "-")
    assert f"plugin {plugin} of {distribution} is installed but failed: {found['failure']}" in crowded["log"]


def test_no_backend_of_a_broken_plugin_is_there_and_no_other_is_missing(crowded: dict[str, Any]) -> None:
    expected = {"naive", "sdpa", "no_metadata", *FINE}
    assert expected <= set(crowded["backends"])
    assert not set(crowded["backends"]) & set(BROKEN)
    assert crowded["added"]["naive"] == 0.0
    assert crowded["owners"]["naive"] == crowded["owners"]["sdpa"] == "maxattn"


def test_a_distribution_without_metadata_is_loaded_under_an_unknown_name(crowded: dict[str, Any]) -> None:
    found = crowded["plugins"]["no_metadata"]
    assert (found["distribution"], found["version"], found["failure"]) == ("?", "?", "")


def test_an_entry_point_to_nothing_is_recorded(crowded: dict[str, Any]) -> None:
    assert "No module named 'no_module_mod'" in crowded["plugins"]["no_module"]["failure"]


@pytest.mark.parametrize(
    ("allowed", "loaded"), [("", []), ("fine", ["fine"]), (" other , fine ,", ["fine", "other"]), ("nobody", [])]
)
def test_only_what_the_allowlist_names_is_imported(tmp_path: Path, allowed: str, loaded: list[str]) -> None:
    for plugin in ("fine", "other"):
        install(tmp_path, plugin, f"print('{plugin} is imported', file=__import__('sys').stderr)\n" + HOOK)
    found = report(tmp_path, MAXATTN_PLUGINS=allowed)
    assert {"naive", "sdpa", *loaded} == set(found["backends"])
    for plugin in ("fine", "other"):
        assert (f"{plugin} is imported" in found["log"]) == (plugin in loaded)
        failure = "" if plugin in loaded else "not loaded: MAXATTN_PLUGINS does not name it"
        assert found["plugins"][plugin]["failure"] == failure


def test_every_hook_is_documented() -> None:
    hooks = {name: hook for name, hook in vars(hookspecs).items() if hasattr(hook, "maxattn_spec")}
    assert "maxattn_backends" in hooks
    for name, hook in hooks.items():
        assert inspect.getdoc(hook), f"{name} has no docstring"
        assert inspect.signature(hook).return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize(
    "content", [b"[console_scripts]\nbroken\n", b"[maxattn]\n\xff\xfe = x\n"], ids=["text", "bytes"]
)
def test_entry_points_that_cannot_be_read_hide_only_their_own(tmp_path: Path, content: bytes) -> None:
    install(tmp_path, "fine", HOOK)
    install(tmp_path, "torn", HOOK)
    (tmp_path / "torn_dist-1.2.dist-info" / "entry_points.txt").write_bytes(content)
    found = report(tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert {"naive", "sdpa", "fine"} <= set(found["backends"])
    assert found["plugins"]["?"]["failure"].startswith("its entry points cannot be read: ")
    assert found["plugins"]["?"]["distribution"] == "torn-dist"
