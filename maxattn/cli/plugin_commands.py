"""`maxattn plugins`: begin a distribution of one's own."""

from __future__ import annotations

import re
import shutil
from importlib.resources import files
from importlib.resources.abc import Traversable
from keyword import iskeyword
from pathlib import Path
from secrets import token_hex
from string import Template
from typing import Annotated

import typer

from maxattn import plugins

SUFFIX = ".tmpl"
RESERVED = frozenset({"core", "maxattn"})


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Write a backend of your own.")
    group.command()(new)
    app.add_typer(group, name="plugins")


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The backend's name, as in backend='NAME'.")],
    into: Annotated[
        Path,
        typer.Option("--into", metavar="DIR", file_okay=False, help="Where to make the folder NAME; made if missing."),
    ] = Path(),
) -> None:
    """Write the skeleton of a distribution that provides a backend.

    The folder NAME gets a pyproject.toml with the entry point that maxattn finds, a package with a backend in plain
    PyTorch that is correct as it stands, and its tests, which are the conformance kit's. Replace what computes by your
    kernel, state what it can do, and have `maxattn check NAME` tell what is wrong. docs/guide/write-a-backend.md goes
    through all of it.

    \b
    Example:
      $ maxattn plugins new mine
      $ maxattn plugins new mine --into plugins
    """
    _check(name)
    folder = into / name
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} exists already: choose another name, another --into, or remove it")
    try:
        into.mkdir(parents=True, exist_ok=True)
        _write(folder, _skeleton(name))
    except OSError as error:
        raise type(error)(f"choose another folder by --into: {folder} cannot be written: {error.strerror}") from error
    typer.echo(f"{folder} holds maxattn-{_dashed(name)}, with the backend {name!r}:\n")
    typer.echo("".join(f"  {path.relative_to(folder)}\n" for path in sorted(folder.rglob("*")) if path.is_file()))
    typer.echo(f"Install it, and try all that it declares:\n\n  cd {folder}\n  pip install -e '.[test]'\n  pytest")
    typer.echo(f"  maxattn check {name}")


def _check(name: str) -> None:
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ValueError(f"{name!r} is no name of a backend: give an identifier in lower case, such as my_kernel")
    if name in RESERVED or iskeyword(name):
        raise ValueError(f"{name!r} is a name of maxattn's own, or of Python's: choose another")
    owner = plugins.load().owners.get(name)
    if owner is not None:
        raise ValueError(f"{owner} provides a backend {name!r} already, and names are unique: choose another")


def _skeleton(name: str) -> dict[str, str]:
    """The text of each file, by its path in the folder."""
    words = {
        "name": name,
        "class_name": "".join(map(str.capitalize, name.split("_"))) + "Backend",
        "distribution": f"maxattn-{_dashed(name)}",
        "package": f"maxattn_{name}",
    }
    templates = _templates(files("maxattn") / "skeleton")
    return {
        path.replace("src/package", f"src/{words['package']}").removesuffix(SUFFIX): Template(text).substitute(words)
        for path, text in templates.items()
    }


def _templates(folder: Traversable, under: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for entry in folder.iterdir():
        path = under + entry.name
        found |= _templates(entry, path + "/") if entry.is_dir() else {path: entry.read_text("utf-8")}
    return found


def _dashed(name: str) -> str:
    return name.replace("_", "-")


def _write(folder: Path, texts: dict[str, str]) -> None:
    """All files or none."""
    temporary = folder.with_name(f".{folder.name}.{token_hex(4)}")
    try:
        for path, text in texts.items():
            file = temporary / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
