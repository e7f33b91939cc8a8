"""`python -m maxattn_triton`: measure launches on this GPU and keep the fastest."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

import maxattn
from maxattn.cli import values
from maxattn.cli.output import print_table
from maxattn.ops.contract import Problem
from maxattn.ops.dispatch import compute_capability
from maxattn_triton import configs, tuned, tuning

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def tune(
    size: Annotated[str, typer.Option(help="Height x width of the feature map, in pixels.")] = "56x56",
    window: Annotated[str, typer.Option(help="Height x width of the window, in tokens.")] = "7x7",
    batch: Annotated[int, typer.Option(min=1, help="Images.")] = 64,
    heads: Annotated[int, typer.Option(min=1, help="Attention heads.")] = 2,
    head_dim: Annotated[int, typer.Option(min=1, help="Channels of a head.")] = 32,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    grid: Annotated[bool, typer.Option("--grid", help="The grid axis; block is the default.")] = False,
    device: Annotated[
        str, typer.Option(help="cuda; cpu in Triton's interpreter, which says nothing of speed.")
    ] = "cuda",
) -> None:
    """Measure how to launch the kernels of `triton` on this GPU, forward and backward, and keep the fastest.

    Every launch is first checked against the specification. What is found is used from then on for windows of as many
    tokens, heads of as many channels, and dtypes of as many bytes, by every process on such a GPU with the same
    versions. Remove the file to forget it; MAXATTN_TRITON_LAUNCHES names another.

    \b
    Example:
      $ python -m maxattn_triton --window 12 --size 96 --batch 64
    """
    where, number = values.device(device, "--device"), values.dtype(dtype, "--dtype")
    height, width = values.size(size, "--size")
    problem = Problem(
        axis="grid" if grid else "block",
        window=values.size(window, "--window"),
        batch=batch,
        height=height,
        width=width,
        heads=heads,
        head_dim=head_dim,
        dtype=number,
        device=where.type,
        compute_capability=compute_capability(where),
        bias=number,
        requires_grad=True,
        bias_requires_grad=True,
    )
    explanation = maxattn.explain(problem, backend="triton")
    if explanation.backend is None:
        typer.echo(f"Error: {explanation}", err=True)
        raise typer.Exit(2)
    try:
        tuned.save({})
    except OSError as error:
        told = f"launches could not be kept in {tuned.path()}: {error.strerror}"
        typer.echo(f"Error: {told}; MAXATTN_TRITON_LAUNCHES names another file", err=True)
        raise typer.Exit(2) from None
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        keys = configs.keys(problem)
        task = bar.add_task(keys[0].kernel, total=sum(1 + sum(map(len, tuning.usual_steps(key))) for key in keys))

        def show(measured: tuning.Measured) -> None:
            bar.update(task, advance=1, description=measured.key.kernel)

        found = tuning.tune(problem, progress=show)
    _print(found)
    typer.echo(f"\nkept in {tuned.path()}")


def _print(found: list[tuning.Measured]) -> None:
    rows = []
    for kernel in dict.fromkeys(one.key.kernel for one in found):
        tried = [one for one in found if one.key.kernel == kernel]
        times = {one.milliseconds: one for one in tried if one.milliseconds is not None}
        best, before = times[min(times)], tried[0].milliseconds
        gain = "-" if before is None or best.milliseconds is None else f"{before / best.milliseconds:.2f}"
        blocks = f"{best.launch.block_m}x{best.launch.block_n}"
        rows.append(
            (
                kernel,
                f"{len(times)} of {len(tried)}",
                blocks,
                str(best.launch.warps),
                str(best.launch.stages),
                str(best.launch.programs),
                f"{best.milliseconds:.3f}",
                gain,
                f"{best.first_call:.2f}",
            )
        )
    header = ("kernel", "working", "tile", "warps", "stages", "programs", "ms a call", "x before", "first call, s")
    print_table(header, rows, title="the fastest launch of each kernel", right=header[1:])


if __name__ == "__main__":
    app()
