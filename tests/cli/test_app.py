"""What holds for every command: its help teaches, its errors are one message, its output is for pipes too."""

from __future__ import annotations

import inspect
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

import maxattn
from maxattn.cli import Commands, _options, app

Run = Callable[..., Result]

REPOSITORY = Path(__file__).parents[2]
MAXATTN = (sys.executable, "-m", "maxattn")
OF_TRAINING = ("train", "eval", "predict")
"""Commands whose examples need images and a trained network: tested with them."""


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with its words after `maxattn`, groups left out."""
    group = typer.main.get_command(app) if group is None else group
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


COMMANDS = [pytest.param(path, command, id=" ".join(path)) for path, command in commands()]


def examples(command: Any) -> list[str]:
    lines = [line.strip() for line in command.help.partition("Example:")[2].splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]


EXAMPLES = [line for path, command in commands() if path[0] not in OF_TRAINING for line in examples(command)]


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_an_option_whose_value_is_called_as_itself_is_named(path: tuple[str, ...], command: Any) -> None:
    """typer 0.27 takes such a metavar for the name: `--DEVICE`."""
    function = inspect.unwrap(command.callback)
    for parameter, hint in get_type_hints(function, include_extras=True).items():
        for option in getattr(hint, "__metadata__", ()):
            if isinstance(option, typer.models.OptionInfo) and option.metavar == parameter.upper():
                assert f"--{parameter}" in (option.default, *option.param_decls)  # typer keeps the first as the default


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_a_commands_help_says_what_it_does_and_gives_an_example_of_it(path: tuple[str, ...], command: Any) -> None:
    purpose = command.help.partition("\n\n")[0]
    assert purpose.endswith(".")
    called = [re.sub(r"^(\w+=\w+ )*", "", example).split() for example in examples(command)]
    assert all(words[0] == "maxattn" for words in called)
    assert any(words[1 : 1 + len(path)] == list(path) for words in called)


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_every_argument_and_option_has_help(path: tuple[str, ...], command: Any) -> None:
    undocumented = [parameter.name for parameter in command.params if not parameter.help]
    assert undocumented == []


def test_the_options_before_the_command_have_help() -> None:
    parameters = typer.main.get_command(app).params
    assert {"verbose", "debug", "version"} <= {parameter.name for parameter in parameters}
    assert all(parameter.help for parameter in parameters)


@pytest.mark.parametrize(("path", "command"), COMMANDS)
def test_help_prints_the_docstring_and_every_option(path: tuple[str, ...], command: Any, run: Run) -> None:
    told = run(*path, "--help").stdout
    for example in examples(command):
        assert f"$ {example}" in told
    for parameter in command.params:
        named = parameter.opts if parameter.opts[0].startswith("-") else [parameter.metavar or parameter.name.upper()]
        assert all(name in told for name in named)


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_examples_of_help_run(example: str, run: Run) -> None:
    Path("my.yaml").write_text(maxattn.load_spec("nano").to_yaml(), encoding="utf-8")
    words, _, file = example.partition(" > ")
    result = run(*shlex.split(words)[1:])
    assert result.stdout
    assert file == "" or not Path(file).exists() or file == "my.yaml"


BAD_INPUT = [
    ("summary maxvit_tny_tf_224", "no preset 'maxvit_tny_tf_224'; did you mean maxvit_tiny_tf_224"),
    ("summary missing.yaml", "no spec file missing.yaml"),
    ("summary nano --set stages.0.widht=3", "there is no field 'widht'; did you mean 'width'"),
    ("summary nano --set head_dim=7", "head_dim 7 does not divide the width"),
    ("summary nano --set stages.9.depth=3", "'9' is no index; allowed: 0 to 1"),
    ("summary nano --set window", "'window' is no field=value"),
    ("summary nano --set head={kind", "the value in 'head={kind' is no YAML"),
    ("summary nano --set drop_path_rate=.nan", "finite"),
    ("summary nano --img-size 7x", "'7x' is no size: give HxW, such as 7x5"),
    ("spec show truncated.yaml", "truncated.yaml is no YAML or JSON"),
    ("spec list nothing*", "no preset matches 'nothing*'"),
    ("spec show", "Missing argument"),
    ("explain --window 0", "'0' is no size"),
    ("explain --size 56x-1", "'56x-1' is no size"),
    ("explain --dtype int8", "'int8' is no dtype: give one of float16"),
    ("explain --bias-dtype int8", "'int8' is no dtype"),
    ("explain --device gpu", "'gpu' is no kind of device: give one such as cpu or cuda"),
    ("explain --device cuda:1", "'cuda:1' is no kind of device"),
    ("explain --compute-capability sm90", "'sm90' is no compute capability: give MAJOR.MINOR, such as 9.0"),
    ("explain --device cpu --compute-capability 9.0", "cpu has none, only cuda"),
    ("explain --axis diagonal", "'--axis'"),
    ("explain --dropout 1", "'--dropout'"),
    ("explain --backend ,", "no backend name in ','; known: naive, sdpa"),
    ("explain --img-size 224", "needs --spec"),
    ("explain --spec nano --window 5", "Invalid value for --window: has no effect with --spec"),
    ("explain --spec nano --head-dim 5", "Invalid value for --head-dim: has no effect with --spec"),
    ("explain --spec nanno", "did you mean nano"),
    ("bench", "Usage: maxattn bench"),
    ("doctr", "No such command 'doctr'"),
    ("doctor --jsn", "No such option: --jsn"),
]


@pytest.mark.parametrize(("line", "told"), BAD_INPUT)
def test_bad_input_exits_with_2_and_tells_what_would_work_on_stderr_alone(line: str, told: str, run: Run) -> None:
    Path("truncated.yaml").write_text("stages: [{width: 32,", encoding="utf-8")
    result = run(*shlex.split(line), exit_code=2)
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_an_error_of_the_module_is_one_line_on_stderr() -> None:
    finished = subprocess.run(
        [*MAXATTN, "summary", "nope"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == "Error: there is no preset 'nope'; maxattn.list_presets() names them all\n"


def test_debug_leaves_an_error_its_traceback(run: Run) -> None:
    result = run("--debug", "summary", "nope", exit_code=1)
    assert isinstance(result.exception, ValueError)
    assert "no preset 'nope'" in str(result.exception)


def test_version_is_printed_alone(run: Run) -> None:
    assert run("--version").stdout == f"maxattn {maxattn.__version__}\n"


def attend(width: int = 17, backend: str | None = None) -> None:
    for _ in range(2):
        maxattn.max_sa(torch.randn(1, 11, width, 3, 1, 8), "grid", (3, 4), backend=backend)
    typer.echo("done")


@pytest.fixture
def attending(run: Run) -> typer.Typer:
    """The real options before the command, and one command that calls the operator twice."""
    group = typer.Typer(cls=Commands)
    group.callback()(_options)
    group.command()(attend)
    return group


def test_verbose_logs_the_choice_of_a_backend_once(attending: typer.Typer) -> None:
    quiet = CliRunner().invoke(attending, ["attend", "--width", "18"])
    verbose = CliRunner().invoke(attending, ["-v", "attend", "--width", "19"])
    assert (quiet.stdout, quiet.stderr) == (verbose.stdout, "") == ("done\n", "")
    assert verbose.stderr.count("grid 3x4, image 1x11x19") == 1
    assert "-> sdpa" in verbose.stderr


def test_verbose_ends_with_the_command(attending: typer.Typer) -> None:
    log = logging.getLogger("maxattn")
    before = log.level, list(log.handlers)
    CliRunner().invoke(attending, ["-v", "attend"])
    assert (log.level, log.handlers) == before


def test_a_backend_that_is_not_able_is_bad_input(attending: typer.Typer) -> None:
    result = CliRunner().invoke(attending, ["attend", "--backend", "sdpaa"])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "Error: backend argument asked for sdpaa, which cannot serve" in result.stderr
    assert "did you mean 'sdpa'?" in result.stderr


def test_a_pipe_gets_whole_lines_whatever_the_width_of_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    told = run("backends").stdout
    assert "windows the image does not fill  yes" in told
    assert "\x1b" not in told
    assert all(line == line.rstrip() for line in told.splitlines())


def test_a_narrow_terminal_gets_wrapped_lines_and_every_word() -> None:
    terminal, stdout = os.openpty()
    process = subprocess.Popen(
        [*MAXATTN, "backends"], cwd=REPOSITORY, env={**os.environ, "COLUMNS": "40", "TERM": "xterm"}, stdout=stdout
    )
    os.close(stdout)
    told = b""
    try:
        while chunk := os.read(terminal, 65536):
            told += chunk
    except OSError:  # the other end is closed
        pass
    os.close(terminal)
    assert process.wait() == 0
    lines = re.sub(r"\x1b\[[0-9;]*m|\r", "", told.decode()).splitlines()
    assert max(map(len, lines)) <= 40
    assert {"windows", "image", "fill", "torch.compile", "torch.export", "naive", "sdpa"} <= {
        word for line in lines for word in line.split()
    }
