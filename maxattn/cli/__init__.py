"""The command line: `maxattn`. Facts go to standard output, as text or with `--json` as JSON, errors to standard error.

Exit codes: 0 fine, 1 the answer is no (something is broken, invalid or not able), 2 the input was wrong.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from maxattn import BackendUnavailableError, __version__
from maxattn.cli import (
    backend_commands,
    bench_commands,
    check_commands,
    doctor_commands,
    explain_commands,
    plugin_commands,
    spec_commands,
    train_commands,
)

BAD_INPUT = (
    BackendUnavailableError,
    FileExistsError,
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    TypeError,
    ValueError,
)


class Commands(TyperGroup):
    """A group that tells what is wrong with the input in one message; with `--debug` it leaves the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BAD_INPUT as error:
            if ctx.params["debug"]:
                raise
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    name="maxattn",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of the command `maxattn`."""
    app(prog_name="maxattn")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"maxattn {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    ctx: typer.Context,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log which backend was chosen for each problem, and why.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """MaxViT networks, and their attention with swappable backends.

    \b
    Example:
      $ maxattn doctor
      $ maxattn summary maxvit_tiny_tf_224
      $ maxattn train digits.yaml data --out runs/digits
    """
    if verbose:
        ctx.with_resource(_log_to_stderr())


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    log, handler = logging.getLogger("maxattn"), logging.StreamHandler()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


for commands in (
    train_commands,
    doctor_commands,
    backend_commands,
    check_commands,
    explain_commands,
    spec_commands,
    bench_commands,
    plugin_commands,
):
    commands.register(app)
