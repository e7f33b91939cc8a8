"""`maxattn bench`."""

from __future__ import annotations

import typer

from maxattn import bench
from maxattn.cli.output import JsonOption, print_json, print_table


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Measure how fast things are on this machine.")
    group.command()(dispatch)
    app.add_typer(group, name="bench")


def dispatch(as_json: JsonOption = False) -> None:
    """Measure what choosing a backend adds to a call.

    `max_sa` is timed with a backend that does nothing, and so is that backend's `attend` alone: the difference is the
    eager cost of a choice that is cached, whichever of the ways asked for the backend.

    \b
    Example:
      $ maxattn bench dispatch
      $ maxattn bench dispatch --json > dispatch.json
    """
    result = bench.dispatch_cost()
    if as_json:
        print_json(result)
        return
    rows = [
        (
            cost.asked_by,
            f"{cost.call:.2f}",
            f"{cost.added:.2f}",
            f"{cost.low:.2f} to {cost.high:.2f}",
            _verdict(cost.added),
        )
        for cost in result.costs
    ]
    typer.echo(f"{result.machine}\n")
    print_table(
        ("choice asked by", "max_sa", "added", "quartiles", f"goal {bench.GOAL_US:g}"),
        rows,
        title=f"us a call; median of {result.rounds} rounds of {result.calls} calls",
        right=("max_sa", "added", "quartiles"),
    )


def _verdict(added: float) -> str:
    return "met" if added <= bench.GOAL_US else "missed"
