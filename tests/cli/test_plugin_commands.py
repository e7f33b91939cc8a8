"""`maxattn plugins new` writes a distribution that is complete, whole or not at all."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

Run = Callable[..., Result]

REPOSITORY = Path(__file__).parents[2]


def texts(folder: Path) -> dict[str, str]:
    """Every file's text by its path, without what tools leave behind."""
    left_behind = {"__pycache__", "build", "dist", ".hypothesis", ".pytest_cache"}
    return {
        str(path.relative_to(folder)): path.read_text("utf-8")
        for path in folder.rglob("*")
        if path.is_file() and not any(part in left_behind or part.endswith(".egg-info") for part in path.parts)
    }


def test_the_template_is_what_the_command_writes(run: Run) -> None:
    run("plugins", "new", "template")
    assert texts(Path("template")) == texts(REPOSITORY / "plugins" / "template")


def test_the_name_is_spelled_as_each_place_needs_it(run: Run) -> None:
    told = run("plugins", "new", "my_fast_kernel2", "--into", "some/where").stdout
    folder = Path("some/where/my_fast_kernel2")
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["name"] == "maxattn-my-fast-kernel2"
    assert project["entry-points"]["maxattn"] == {"my_fast_kernel2": "maxattn_my_fast_kernel2"}
    backend = ast.parse((folder / "src" / "maxattn_my_fast_kernel2" / "backend.py").read_text("utf-8"))
    (written,) = (node for node in backend.body if isinstance(node, ast.ClassDef))
    assert written.name == "MyFastKernel2Backend"
    assert 'name = "my_fast_kernel2"' in ast.unparse(written).replace("'", '"')
    assert all(f"  {path}\n" in told for path in texts(folder))
    assert f"  cd {folder}\n" in told
    assert told.endswith("  maxattn check my_fast_kernel2\n")


def test_nothing_of_the_templates_language_is_left(run: Run) -> None:
    run("plugins", "new", "mine")
    assert not any("$" in text or "template" in text for text in texts(Path("mine")).values())


@pytest.mark.parametrize(
    "name", ["my-kernel", "1st", "Mine", "my kernel", "../mine", "", "mine_", "_mine", "my__own", "é", "mine\n"]
)
def test_what_is_no_name_is_refused_with_one_that_is(name: str, run: Run) -> None:
    told = run("plugins", "new", name, exit_code=2).stderr
    assert told == f"Error: {name!r} is no name of a backend: give an identifier in lower case, such as my_kernel\n"
    assert list(Path().iterdir()) == []


def test_the_name_of_an_installed_backend_is_refused_with_its_distribution(run: Run) -> None:
    told = run("plugins", "new", "sdpa", exit_code=2).stderr
    assert told == "Error: maxattn provides a backend 'sdpa' already, and names are unique: choose another\n"
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_what_is_there_already_is_left_as_it_is(kind: str, run: Run) -> None:
    there = Path("mine")
    match kind:
        case "folder":
            there.mkdir()
        case "file":
            there.write_text("precious", encoding="utf-8")
        case _:
            there.symlink_to("nowhere")
    before = there.lstat()
    told = run("plugins", "new", "mine", exit_code=2).stderr
    assert told == "Error: mine exists already: choose another name, another --into, or remove it\n"
    assert there.lstat() == before
    assert list(Path().iterdir()) == [there]


def test_a_file_is_no_place_for_it(run: Run) -> None:
    Path("file").touch()
    assert "'--into'" in run("plugins", "new", "mine", "--into", "file", exit_code=2).stderr


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    command = f"ulimit -f 1; exec {sys.executable} -m maxattn plugins new mine"  # a KiB: enough for some of the files
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONDONTWRITEBYTECODE": "1"}
    finished = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert finished.stderr.rstrip().endswith("File too large"), finished.stderr
    assert list(tmp_path.iterdir()) == []
