"""docs/guide/write-a-backend.md can be followed word by word, in a fresh environment, and prints what it shows.

What stands after the language of a block tells what it is: `sh exits with 1` fails, `text` is what the `sh` block
before it prints, with `...` for what may differ, `python PATH` is a file to write, `toml in PATH` a part of a file that
is there, `diff PATH` a change to one. The text before such a block names the path. A bare `python` block runs alone.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from doctest import ELLIPSIS, NORMALIZE_WHITESPACE, OutputChecker
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]
GUIDE = REPOSITORY / "docs" / "guide" / "write-a-backend.md"
CHECKOUT = ("maxattn", "pyproject.toml", "README.md", "LICENSE")
"""What is needed to install maxattn from its source."""

FOREIGN = ("PYTHON", "PIP_", "MAXATTN_")
"""Variables that would bring something else into the environment than the guide does."""


class Block(NamedTuple):
    """A block of the guide, with the line it begins on and the text since the block before it."""

    line: int
    before: str
    language: str
    about: str
    content: str


def blocks() -> list[Block]:
    text, found, end = GUIDE.read_text("utf-8"), [], 0
    for match in re.finditer(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        line = text[: match.start()].count("\n") + 1
        found.append(Block(line, text[end : match.start()], *match.groups()))
        end = match.end()
    return found


class Reader:
    """Somebody who does what the guide says, in an environment that has maxattn's dependencies but not maxattn."""

    def __init__(self, home: Path) -> None:
        self.folder, self.left_in, self.printed = home / "checkout", home / "left_in", ""
        self.folder.mkdir()
        for name in CHECKOUT:
            copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
            copy(REPOSITORY / name, self.folder / name)
        environment = home / "environment"
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
        # Python 3.11 puts an old setuptools there, which pip leaves alone when it builds in isolation.
        subprocess.run([environment / "bin" / "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True)
        (installed,) = environment.glob("lib/*/site-packages")
        lines = [f"import site; site.addsitedir({folder!r})\n" for folder in site.getsitepackages()]
        (installed / "dependencies.pth").write_text("".join(lines), encoding="utf-8")
        self.variables = {
            **{name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)},
            "OMP_NUM_THREADS": "1",
            "PATH": os.pathsep.join([str(environment / "bin"), os.environ["PATH"]]),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_BUILD_ISOLATION": "0",  # of this option, pip takes the value for the opposite
            "PIP_NO_INDEX": "1",
        }

    def follow(self, block: Block) -> None:
        path = block.about.removeprefix("in ")
        match block.language:
            case "sh":
                self.run(block.content, exit_code=1 if block.about == "exits with 1" else 0)
            case "text":
                self.compare(block.content)
            case "python" if not path:
                self.run(f"python - <<'END'\n{block.content}END\n")
            case _:
                assert f"`{path}`" in block.before, f"the text before does not name {path}"
                self.edit(self.folder / path, block)

    def run(self, commands: str, exit_code: int = 0) -> None:
        """Run commands where those before have left off, and keep what they print."""
        finished = subprocess.run(
            ["bash", "-ec", f"{commands}\npwd > {self.left_in}"],
            cwd=self.folder,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.printed = finished.stdout
        assert finished.returncode == exit_code, self.printed
        self.folder = Path(self.left_in.read_text("utf-8").strip()) if exit_code == 0 else self.folder

    def compare(self, shown: str) -> None:
        assert OutputChecker().check_output(shown, self.printed, ELLIPSIS | NORMALIZE_WHITESPACE), self.printed

    def edit(self, file: Path, block: Block) -> None:
        if block.about.startswith("in "):
            assert block.content in file.read_text("utf-8")
        elif block.language == "diff":
            lines = block.content.splitlines(keepends=True)
            old, new = ("".join(line[1:] for line in lines if line[0] in signs) for signs in (" -", " +"))
            text = file.read_text("utf-8")
            assert text.count(old) == 1, f"{file} has the lines to be changed {text.count(old)} times"
            file.write_text(text.replace(old, new), encoding="utf-8")
        else:
            file.write_text(block.content, encoding="utf-8")


@pytest.mark.timeout(900)
def test_the_guide_can_be_followed_word_by_word(tmp_path: Path) -> None:
    reader = Reader(tmp_path)
    for block in blocks():
        try:
            reader.follow(block)
        except AssertionError as error:
            pytest.fail(f"{GUIDE.name}:{block.line} ({block.language} {block.about}): {error}")


def test_every_block_of_the_guide_is_of_a_known_kind() -> None:
    fences = GUIDE.read_text("utf-8").count("\n```")
    assert fences == 2 * len(blocks())
    assert {block.language for block in blocks()} == {"diff", "python", "sh", "text", "toml"}
