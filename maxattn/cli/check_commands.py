"""`maxattn check`."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from maxattn.cli import values
from maxattn.cli.output import JsonOption, print_json


def register(app: typer.Typer) -> None:
    app.command()(check)


def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The backend, as `maxattn backends` names it.")],
    device: Annotated[str, typer.Option(help="The kind of device to check on: cpu, cuda.")] = "cpu",
    examples: Annotated[int, typer.Option(min=1, help="About how many problems each larger check draws.")] = 100,
    seed: Annotated[int, typer.Option(help="Draws other problems.")] = 0,
    only: Annotated[list[str] | None, typer.Option(help="Run just this check; may be given again.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Check just this dtype; may be given again.")] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", "-x", help="Stop at the first check that fails.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that a backend computes Max-SA, for all that it declares.

    Outputs and all gradients are compared with the specification in fp64, on problems drawn from the backend's own
    capabilities; then memory, state, determinism, dropout, compilers. What fails is shown with the smallest problem
    found. The exit code is 1 if something fails.

    \b
    Example:
      $ maxattn check sdpa --only forward --only ragged --examples 500
      $ maxattn check sdpa --only layouts --dtype bf16 --fail-fast
    """
    try:
        from maxattn.testing import check_backend
    except ModuleNotFoundError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None
    from maxattn.testing.runner import checks_named

    names = [one.name for one in checks_named(only or ())]
    dtypes = [values.dtype(one, "--dtype") for one in dtype or ()]
    columns = (TextColumn("{task.description:22}"), BarColumn(), TextColumn("{task.fields[cases]} cases"))
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task, cases = bar.add_task(names[0], total=len(names), cases=0), 0

        def show(running: Any) -> None:
            nonlocal cases
            cases += 1
            bar.update(task, description=running.name, completed=names.index(running.name), cases=cases)

        with redirect_stdout(sys.stderr):  # whatever the backend prints
            report = check_backend(
                name,
                device=device,
                examples=examples,
                seed=seed,
                only=names,
                dtypes=dtypes,
                fail_fast=fail_fast,
                progress=show,
            )
    if as_json:
        print_json({"backend": report.backend, "device": device, "passed": report.passed, "checks": report.checks})
    else:
        typer.echo(str(report))
    if not report.passed:
        raise typer.Exit(1)
