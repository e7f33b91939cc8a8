"""`plugins/template`, a stranger's backend: built as a wheel, installed by pip, and checked by its own tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from wheels import pip_install

REPOSITORY = Path(__file__).parents[1]


class Installed:
    """The source of the template outside this repository, and a folder that pip has installed its wheel into."""

    def __init__(self, folder: Path) -> None:
        self.source, self.site = folder / "template", folder / "site"
        ignored = shutil.ignore_patterns("build", "dist", "*.egg-info", "__pycache__")
        shutil.copytree(REPOSITORY / "plugins" / "template", self.source, ignore=ignored)
        self.python("-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
        (wheel,) = folder.glob("*.whl")
        pip_install(self.site, wheel)
        shutil.rmtree(self.source / "src")

    def python(self, *arguments: str | Path) -> str:
        """The output of Python, run where the template's source lies."""
        finished = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.source,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(self.site), str(REPOSITORY)])},
            capture_output=True,
            text=True,
            check=False,
        )
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("template"))


def test_maxattn_finds_it(installed: Installed) -> None:
    found = {one["name"]: one for one in json.loads(installed.python("-m", "maxattn", "backends", "--json"))}
    assert found["template"]["distribution"] == "maxattn-template"


def test_doctor_finds_it_sound(installed: Installed) -> None:
    facts = json.loads(installed.python("-m", "maxattn", "doctor", "--json"))
    (plugin,) = (plugin for plugin in facts["plugins"] if plugin["name"] == "template")
    assert (plugin["version"], plugin["backends"], plugin["failure"]) == ("0.1.0", ["template"], "")
    assert {check["status"] for check in facts["checks"] if check["backend"] == "template"} == {"ok"}
    assert facts["problems"] == []


def test_finding_it_imports_nothing_that_maxattn_has_not(installed: Installed) -> None:
    program = """
import sys, maxattn
before = set(sys.modules)
import maxattn_template
maxattn_template.maxattn_backends()
print(*sorted(sys.modules.keys() - before))
"""
    assert installed.python("-c", program).split() == ["maxattn_template", "maxattn_template.backend"]


def test_its_own_tests_pass(installed: Installed) -> None:
    told = installed.python("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests")
    assert " passed" in told
    assert "failed" not in told


def test_check_finds_it_right(installed: Installed) -> None:
    command = ("-m", "maxattn", "check", "template", "--examples", "10", "--only", "forward", "--only", "gradients")
    assert "template on cpu: passes" in installed.python(*command)
