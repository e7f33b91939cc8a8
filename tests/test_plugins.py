"""Plugins are found, guarded one by one, and reported; ours come through the same hook.

The plugins here are real distributions, installed by pip on the path of a fresh interpreter.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from plugin_zoo import BROKEN, FAILURES, FINE, HOOK, RAISING, distribution_of, install, install_all

import maxattn
from maxattn import core_plugin, hookspecs

REPORT = """
import dataclasses, json, torch, maxattn
loaded = maxattn.plugins.load()
qkv = torch.randn(1, 4, 4, 3, 1, 2)
explanation = maxattn.explain(qkv, window=2)
answers = {one.name: [str(reason) for reason in one.reasons] for one in explanation.candidates}
naive = maxattn.max_sa(qkv, window=2, backend="naive")
equal = {name: maxattn.max_sa(qkv, window=2, backend=name).equal(naive) for name in answers if not answers[name]}
print(json.dumps({
    "plugins": [dataclasses.asdict(plugin) for plugin in loaded.plugins],
    "backends": maxattn.list_backends(),
    "owners": loaded.owners,
    "chosen": explanation.backend,
    "answers": answers,
    "equal": equal,
}))
"""


def python(program: str, *path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a fresh interpreter with `path` before this maxattn on its path."""
    folders = os.pathsep.join(map(str, [*path, Path(maxattn.__file__).parents[1]]))
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": folders, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def report(*path: Path, **environment: str) -> dict[str, Any]:
    """What a fresh interpreter with `path` finds, and nothing else on its stdout; `log` is what it wrote to stderr."""
    run = python(REPORT, *path, **environment)
    assert run.returncode == 0, run.stderr
    return {**json.loads(run.stdout), "log": run.stderr}


def plugin_of(found: dict[str, Any], name: str) -> dict[str, Any]:
    (plugin,) = [plugin for plugin in found["plugins"] if plugin["name"] == name]
    return plugin


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The whole zoo installed at once, and a plugin whose module is gone."""
    site = tmp_path_factory.mktemp("site")
    install_all(site)
    install(site, [("no_module", HOOK)])
    (site / "no_module_mod.py").unlink()
    return report(site)


def test_the_cores_backends_come_through_the_hook(crowded: dict[str, Any]) -> None:
    core = plugin_of(crowded, "core")
    assert (core["distribution"], core["version"]) == ("maxattn", maxattn.__version__)
    assert core["backends"] == ["naive", "sdpa"]
    assert hasattr(core_plugin.maxattn_backends, "maxattn_impl")


@pytest.mark.parametrize("plugin", FINE)
def test_a_plugin_is_loaded_beside_all_that_are_broken(crowded: dict[str, Any], plugin: str) -> None:
    found = plugin_of(crowded, plugin)
    assert found["failure"] == found["traceback"] == ""
    assert found["distribution"] == distribution_of(plugin)
    assert found["version"] == "1.2"
    assert found["backends"] == [plugin]
    assert crowded["answers"][plugin] == []
    assert crowded["equal"][plugin]
    assert crowded["owners"][plugin] == found["distribution"]


@pytest.mark.parametrize(("plugin", "failure"), [(plugin, failure) for plugin, (_, failure) in BROKEN.items()])
def test_a_broken_plugin_is_recorded_with_what_is_wrong(crowded: dict[str, Any], plugin: str, failure: str) -> None:
    found = plugin_of(crowded, plugin)
    assert failure in found["failure"]
    assert "\n" not in found["failure"]
    assert found["traceback"].startswith(("Traceback", "  File"))
    last_line = found["traceback"].splitlines()[-1].strip()
    assert re.sub(r"^[\w.]+\.(?=\w+:)", "", last_line) in found["failure"]
    assert found["backends"] == []
    assert f"plugin {plugin} of {distribution_of(plugin)} is installed but failed: {found['failure']}" in crowded["log"]


def test_no_backend_of_a_broken_plugin_is_there_and_no_other_is_missing(crowded: dict[str, Any]) -> None:
    assert set(crowded["backends"]) == {"naive", "sdpa", *FINE, *RAISING}
    assert crowded["owners"]["naive"] == crowded["owners"]["sdpa"] == "maxattn"


@pytest.mark.parametrize("plugin", RAISING)
def test_a_backend_that_raises_when_it_is_asked_is_not_able_and_says_why(crowded: dict[str, Any], plugin: str) -> None:
    assert plugin_of(crowded, plugin)["failure"] == ""
    told = FAILURES.get(plugin, "LookupError: asked and failed")
    assert crowded["answers"][plugin] == [f"its own check failed: {told}"]
    assert f"backend {plugin} failed while it was asked about" in crowded["log"]
    assert crowded["chosen"] not in RAISING


def test_an_entry_point_to_nothing_is_recorded(crowded: dict[str, Any]) -> None:
    assert "No module named 'no_module_mod'" in plugin_of(crowded, "no_module")["failure"]


def test_the_time_that_loading_took_is_the_plugins_own(crowded: dict[str, Any]) -> None:
    assert plugin_of(crowded, "slow")["seconds"] >= 1.2
    assert 0 < plugin_of(crowded, "fine")["seconds"] < 1
    assert 0 < plugin_of(crowded, "crash")["seconds"] < 1


def test_what_a_plugin_prints_goes_to_stderr(crowded: dict[str, Any]) -> None:
    assert "I am imported\nI am asked\n" in crowded["log"]  # that stdout holds JSON alone is shown by `report`


def test_an_interrupt_while_a_plugin_is_loaded_ends_the_program(tmp_path: Path) -> None:
    install(tmp_path, [("interrupted", "raise KeyboardInterrupt\n"), ("other", HOOK)])
    run = python("import maxattn; maxattn.list_backends(); print('went on')", tmp_path)
    assert run.returncode != 0
    assert run.stdout == ""
    assert run.stderr.endswith("KeyboardInterrupt\n")


def test_distributions_without_metadata_are_told_apart_by_its_path(tmp_path: Path) -> None:
    install(tmp_path, [("fine", HOOK), ("other", HOOK), ("crash", "1 / 0\n")])
    for plugin in ("fine", "other", "crash"):
        (tmp_path / f"{plugin}_dist-1.2.dist-info" / "METADATA").unlink()
    found = report(tmp_path)
    assert {"naive", "sdpa", "fine", "other"} == set(found["backends"])
    for plugin in ("fine", "other", "crash"):
        path = str(tmp_path / f"{plugin}_dist-1.2.dist-info")
        assert (plugin_of(found, plugin)["distribution"], plugin_of(found, plugin)["version"]) == (path, "?")


def test_two_distributions_without_metadata_that_claim_one_name_are_both_named(tmp_path: Path) -> None:
    install(tmp_path, [("first", HOOK), ("second", "Own.name = 'first'\n" + HOOK)])
    paths = [tmp_path / f"{plugin}_dist-1.2.dist-info" for plugin in ("first", "second")]
    for path in paths:
        (path / "METADATA").unlink()
    failure = plugin_of(report(tmp_path), "second")["failure"]
    assert f"backend 'first' is provided by two distributions, {paths[0]} and {paths[1]}: uninstall one" in failure


@pytest.mark.parametrize("spelling", ["fine-dist", "Fine_Dist"])
def test_a_distribution_hides_later_ones_of_its_name_on_the_path(tmp_path: Path, spelling: str) -> None:
    for folder in ("first", "later"):
        install(tmp_path / folder, [("fine", f"print('the {folder}')\n" + HOOK)])
    metadata = tmp_path / "later" / "fine_dist-1.2.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text("utf-8").replace("fine-dist", spelling), "utf-8")
    found = report(tmp_path / "first", tmp_path / "later")
    assert plugin_of(found, "fine")["failure"] == ""
    assert "the first" in found["log"]


@pytest.mark.parametrize(
    ("allowed", "loaded"), [("", []), ("fine", ["fine"]), (" other , fine ,", ["fine", "other"]), ("nobody", [])]
)
def test_only_what_the_allowlist_names_is_imported(tmp_path: Path, allowed: str, loaded: list[str]) -> None:
    install(tmp_path, [(plugin, f"print('{plugin} is imported')\n" + HOOK) for plugin in ("fine", "other")])
    found = report(tmp_path, MAXATTN_PLUGINS=allowed)
    assert {"naive", "sdpa", *loaded} == set(found["backends"])
    for plugin in ("fine", "other"):
        assert (f"{plugin} is imported" in found["log"]) == (plugin in loaded)
        failure = "" if plugin in loaded else "not loaded: MAXATTN_PLUGINS does not name it"
        assert plugin_of(found, plugin)["failure"] == failure


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
    install(tmp_path, [("fine", HOOK), ("torn", HOOK)])
    (tmp_path / "torn_dist-1.2.dist-info" / "entry_points.txt").write_bytes(content)
    found = report(tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")  # torch itself reads all entry points, unguarded
    assert {"naive", "sdpa", "fine"} == set(found["backends"])
    assert plugin_of(found, "?")["failure"].startswith("its entry points cannot be read: ")
    assert plugin_of(found, "?")["distribution"] == "torn-dist"
    assert f"torn-dist: {plugin_of(found, '?')['failure']}" in found["log"]
