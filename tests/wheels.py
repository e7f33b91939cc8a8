"""Small wheels, written by hand and installed by pip: a distribution as its users get it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from pathlib import Path


def write_wheel(folder: Path, distribution: str, files: Mapping[str, str], plugins: Mapping[str, str]) -> Path:
    """A wheel of version 1.2 with `files` by path; `plugins` maps entry points of the group `maxattn` to objects."""
    stem = f"{distribution.replace('-', '_')}-1.2"
    info = f"{stem}.dist-info"
    points = "".join(f"{name} = {target}\n" for name, target in plugins.items())
    contents = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[maxattn]\n{points}",
    }
    record = "".join(f"{path},{_digest(text)},{len(text.encode())}\n" for path, text in contents.items())
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in contents.items():
            archive.writestr(path, text)
        archive.writestr(f"{info}/RECORD", f"{record}{info}/RECORD,,\n")
    return wheel


def pip_install(site: Path, *wheels: Path) -> None:
    """Install `wheels` into the folder `site`, without looking anywhere else."""
    options = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile", "--target", site)
    finished = subprocess.run(
        [sys.executable, "-m", "pip", "--isolated", "install", *options, *wheels],
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr


def _digest(text: str) -> str:
    digest = urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    return f"sha256={digest}"
