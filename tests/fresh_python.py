"""A new Python with plugins as their users get them: found by their entry points."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import distributions
from pathlib import Path


def python(*paths: Path, arguments: tuple[str, ...]) -> str:
    """The output of a new Python with `paths` in front of its path, and no plugins but those announced there."""
    path = os.pathsep.join(filter(None, [*map(str, paths), *sys.path]))
    points = [point for found in distributions(path=[*map(str, paths)]) for point in found.entry_points]
    plugins = ",".join(point.name for point in points if point.group == "maxattn")
    command = [sys.executable, *arguments]
    env = {**os.environ, "PYTHONPATH": path, "MAXATTN_PLUGINS": plugins}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def hiding(modules: Iterable[str], versions: Iterable[str] = ()) -> str:
    """The first lines of a program for which these modules, and the versions of these distributions, are not there."""
    return f"""
import sys
from importlib import metadata
sys.modules.update(dict.fromkeys({sorted(modules)!r}))  # an import fails, and a search finds nothing
real = metadata.version
def version(name):
    if name in {sorted(versions)!r}:
        raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
"""


def announce(project: Path, site: Path) -> None:
    """Write into `site` what installing the plugin in the folder `project` would say of it."""
    told = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    metadata = site / f"{told['name'].replace('-', '_')}-0.1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {told['name']}\nVersion: 0.1.0\n")
    points = "\n".join(f"{name} = {value}" for name, value in told["entry-points"]["maxattn"].items())
    (metadata / "entry_points.txt").write_text(f"[maxattn]\n{points}\n")
