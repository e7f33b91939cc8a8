"""What every `maxattn bench` command does around its measurement: show how far it is, keep what there is, tell it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from maxattn.bench.compare import Show
from maxattn.bench.results import Keep, Result
from maxattn.cli.output import print_json


@contextmanager
def measuring(out: Path | None, as_json: bool) -> Iterator[tuple[Show, Keep]]:
    """Who shows how far a measurement is, and who keeps it after each case: what there is at the end is told, even if
    that comes early. A folder that cannot take the pages is refused before."""
    from maxattn.bench import report

    latest: Result | None = None

    def keep(result: Result) -> None:
        nonlocal latest
        latest = result
        if out is not None:
            result.write(out / report.RESULTS)

    if out is not None:
        with _without_matplotlib_told():
            report.ready(out)
    try:
        with _showing() as show:
            yield show, keep
    finally:
        if latest is not None:
            _tell(latest, out, as_json)


def _tell(result: Result, out: Path | None, as_json: bool) -> None:
    """Print the result, and write the pages where it is kept."""
    from maxattn.bench import report, tables

    text, console = tables.OF_KIND[result.kind](result), Console()
    if as_json:
        print_json(result.to_dict())
    else:
        typer.echo(f"{result.machine}\n")
        if console.is_terminal:
            console.print(Markdown(text))
        else:
            typer.echo(text)
    if not result.finished:
        typer.echo("Not finished: the run ended before all of its cases were measured", err=True)
    if out is not None:
        for path in (out / report.RESULTS / result.file_name, *write_pages(out)):
            typer.echo(f"wrote {path}", err=True)


def write_pages(folder: Path) -> list[Path]:
    """Write the pages of all results in the folder; their paths."""
    from maxattn.bench import report

    with _without_matplotlib_told():
        return report.write(folder)


@contextmanager
def _without_matplotlib_told() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


@contextmanager
def _showing() -> Iterator[Show]:
    """A bar on a terminal; and a word if others keep the machine busy, for that is measured too."""
    busy, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if busy > cores / 4:
        typer.echo(f"Note: other programs keep {busy:.1f} of {cores} cores busy; times will be disturbed", err=True)
    console = Console(file=sys.stderr)
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda share, what: bar.update(task, completed=share, description=what)
