"""Printing facts: as a table for people, cut nowhere, or as plain JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from maxattn.ops.contract import dtype_name

JsonOption = Annotated[bool, typer.Option("--json", help="Print plain JSON, for programs.")]

UNLIMITED = 100_000
"""The width of what is no terminal: a pipe or a file takes lines of any length."""


def print_json(data: Any) -> None:
    """`data`, which may hold dataclasses, dtypes and sets, as JSON on standard output."""
    typer.echo(json.dumps(data, indent=2, allow_nan=False, default=_encode))


def print_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", right: Sequence[str] = ()
) -> None:
    """Rows under `header`, the columns named in `right` aligned there. A terminal's width wraps cells, never cuts."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=any(header))
    for name in header:
        table.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console(width=None if sys.stdout.isatty() else UNLIMITED)
    with console.capture() as capture:
        if title:
            console.print(Text(title, style="bold"))
        console.print(table)
    typer.echo("\n".join(line.rstrip() for line in capture.get().splitlines()))


def _encode(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if isinstance(value, frozenset):
        return sorted(value, key=str)
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    raise TypeError(f"no JSON for {value!r}")
