"""`maxattn bench`: measurements of this machine, and the pages that are made of them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer

from maxattn.bench.machine import device_types
from maxattn.bench.results import Mode
from maxattn.bench.timing import QUICK, Effort
from maxattn.cli import values
from maxattn.cli.explain_commands import AxisName
from maxattn.cli.measuring import measuring, write_pages
from maxattn.cli.memory import let_segments_grow
from maxattn.cli.output import JsonOption

TINY = "maxvit_tiny_tf_224"
ON_GPU = (TINY, "maxvit_base_tf_384", "maxvit_tiny_tf_512")
OTHERS_ON_GPU = ("swin_tiny_patch4_window7_224",)
OUT = Path("docs/benchmarks")


class PassName(StrEnum):
    """What is timed of a call of the operator."""

    forward = "forward"
    training = "training"


SpecsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[SPEC]...", help=f"Presets or spec files; by default {TINY}, on a GPU also the goals' others."
    ),
]
BatchOption = Annotated[
    list[int] | None, typer.Option(min=1, metavar="N", help="Images in a batch; may be given again.")
]
SizeOption = Annotated[
    str | None, typer.Option("--img-size", metavar="N|HxW", help="Pixels of the images; by default the spec's.")
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help="float32, bf16, ...; by default bf16 on a GPU, else float32."),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", metavar="DEVICE", help="cpu or cuda; by default the best there is.")
]
PeersOption = Annotated[
    bool, typer.Option("--peers/--no-peers", help="Beside timm's and torchvision's same network, where installed.")
]
CompileOption = Annotated[
    bool | None,
    typer.Option(
        "--compile/--eager",
        help="With torch.compile too, or without; by default with it, but for training on a CPU.",
    ),
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="Few samples, small defaults, nothing compiled: to see that it works.")
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Keep the result in this folder, case by case, and write its pages anew at the end."
    ),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        no_args_is_help=True,
        help="Measure how fast things are on this machine, beside the floor, other backends and other libraries.",
    )
    for command in (op, model, train, scaling, dispatch, report):
        group.command()(command)
    app.add_typer(group, name="bench")


def op(
    batch: Annotated[int | None, typer.Option(min=1, metavar="N", help="Images; by default 8, on a GPU 256.")] = None,
    size: Annotated[str | None, typer.Option(metavar="N|HxW", help="Pixels of one feature map of your own.")] = None,
    width: Annotated[int, typer.Option(min=1, metavar="N", help="With --size: channels, in heads of 32.")] = 64,
    window: Annotated[str, typer.Option(metavar="N|HxW", help="With --size: tokens of a group.")] = "7",
    axis: Annotated[list[AxisName] | None, typer.Option(help="Just this one; by default both.")] = None,
    only: Annotated[list[PassName] | None, typer.Option("--pass", help="Just this one; by default both.")] = None,
    bias: Annotated[
        bool | None, typer.Option("--bias/--no-bias", help="Just this one; by default with it, on a GPU both.")
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Just this one; may be given again; NAME+compile: under torch.compile."),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    quick: QuickOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure Max-SA by every backend that can serve it, beside the time that moving its bytes takes.

    By default the shapes of MaxViT-T's four stages, on a GPU also larger windows; a bias is in fp32. Every backend is
    first checked against the specification in fp64, within the error budget of `maxattn check`; one that is wrong is
    not timed. On a GPU calls are replayed from a CUDA graph with a cold cache.

    \b
    Example:
      $ maxattn bench op --quick
      $ maxattn bench op --size 14x10 --width 32 --window 7x5 --axis grid --pass forward --batch 1 --quick
      $ maxattn bench op --size 14 --backend naive --backend sdpa --pass training --no-bias --quick --json > op.json
    """
    from maxattn.bench import op as measurement
    from maxattn.ops.contract import Problem
    from maxattn.testing.case import Case
    from maxattn.testing.observe import verify

    where, kind = _where(device, dtype)
    images = batch or (2 if quick else 256 if where == "cuda" else 8)
    if size is None:
        shapes = measurement.shapes(images, more=where == "cuda" and not quick)
    else:
        pixels, tokens = values.size(size, "--size"), values.size(window, "--window")
        shapes = (measurement.Shape(images, pixels, width, tokens),)
    passes: list[measurement.Pass] = [one.value for one in only or PassName]
    if where == "cuda" and "training" in passes:
        passes.append("training without a graph")
    biases = ([True, False] if where == "cuda" else [True]) if bias is None else [bias]

    def within_budget(attend: object, problem: Problem) -> None:
        verify(attend, Case(problem=problem))  # type: ignore[arg-type]

    with measuring(out, as_json) as (show, keep):
        measurement.measure(
            shapes,
            within_budget,
            axes=[one.value for one in axis or AxisName],
            passes=passes,
            biases=biases,
            backends=backend,
            dtype=kind,
            device=where,
            effort=_effort(quick),
            show=show,
            keep=keep,
        )


def model(
    specs: SpecsArgument = None,
    batch: BatchOption = None,
    img_size: SizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    peers: PeersOption = True,
    beside: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another network of timm to time too; on a GPU by default Swin-T."),
    ] = None,
    compiled: CompileOption = None,
    quick: QuickOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure inference of whole networks: ours plain and optimised, beside timm's and torchvision's.

    Each eager and compiled, the others in both memory layouts, all with the same weights; logits are first checked
    against ours in fp64. Batches of 1 and 8, on a GPU of 256. Compiling takes a minute a network on a small CPU.

    \b
    Example:
      $ maxattn bench model nano --quick
      $ maxattn bench model nano --batch 1 --batch 4 --img-size 56 --eager --quick --json > model.json
    """
    from maxattn.bench import model as measurement

    where, kind = _where(device, dtype)
    on_gpu = where == "cuda" and not quick
    with measuring(out, as_json) as (show, keep):
        measurement.measure(
            specs or (ON_GPU if on_gpu else (TINY,)),
            batches=batch or ((1,) if quick else (256,) if on_gpu else (1, 8)),
            img_size=None if img_size is None else values.size(img_size, "--img-size"),
            dtype=kind,
            device=where,
            modes=_modes(not quick if compiled is None else compiled),
            peers=peers,
            beside=beside or (OTHERS_ON_GPU if on_gpu and not specs else ()),
            effort=_effort(quick),
            show=show,
            keep=keep,
        )


def train(
    specs: SpecsArgument = None,
    batch: BatchOption = None,
    img_size: SizeOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    peers: PeersOption = True,
    compiled: CompileOption = None,
    quick: QuickOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a training step of whole networks: forward, backward and AdamW, beside timm's and torchvision's.

    Images a second, and peak memory with weights, gradients and the optimizer's state. On a GPU under autocast to bf16,
    batches of 128, compiled also as CUDA graphs; else fp32 and batches of 4. The first loss and gradient are checked
    against ours in a finer dtype.

    \b
    Example:
      $ maxattn bench train nano --quick
      $ maxattn bench train nano --batch 4 --dtype bf16 --no-peers --quick --json > train.json
    """
    from maxattn.bench import train as measurement

    where, kind = _where(device, dtype)
    if where == "cuda":
        let_segments_grow()
    with measuring(out, as_json) as (show, keep):
        measurement.measure(
            specs or (TINY,),
            batches=batch or ((2,) if quick else (128,) if where == "cuda" else (4,)),
            img_size=None if img_size is None else values.size(img_size, "--img-size"),
            dtype=kind,
            device=where,
            modes=_modes(where != "cpu" and not quick if compiled is None else compiled, recorded=where == "cuda"),
            peers=peers,
            effort=_effort(quick),
            show=show,
            keep=keep,
        )


def scaling(
    spec: Annotated[str, typer.Argument(metavar="[SPEC]", help="A preset or a spec file.")] = TINY,
    size: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Pixels of a side; may be given again. By default 224 to 4096."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, metavar="N", help="Images in a batch.")] = 1,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    max_seconds: Annotated[
        float, typer.Option(min=0, metavar="S", help="Leave out images whose call would take longer.")
    ] = 20.0,
    quick: QuickOption = False,
    out: OutOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure time and memory against pixels, windows of one size, and full attention beside them.

    Both networks are made for inference. The exponents of the pixels that fit the larger images are told: 1 is linear,
    2 quadratic. Images that would take more than half of the free memory are left out.

    \b
    Example:
      $ maxattn bench scaling nano --size 28 --size 56 --size 112 --quick
      $ maxattn bench scaling nano --size 56 --size 112 --max-seconds 5 --quick --json > scaling.json
    """
    from maxattn.bench import scaling as measurement

    where, kind = _where(device, dtype)
    with measuring(out, as_json) as (show, keep):
        measurement.measure(
            spec,
            sizes=size or (measurement.SIZES[:2] if quick else measurement.SIZES),
            batch=batch,
            dtype=kind,
            device=where,
            max_seconds=max_seconds,
            effort=QUICK if quick else Effort(least=3, most=10, seconds=3.0),
            show=show,
            keep=keep,
        )


def dispatch(out: OutOption = None, as_json: JsonOption = False) -> None:
    """Measure what choosing a backend adds to a call.

    `max_sa` is timed with a backend that does nothing, and so is that backend's `attend` alone: the difference is the
    eager cost of a choice that is cached, whichever of the ways asked for the backend. In compiled code the choice has
    been made while tracing; what is left are the guards of the whole compiled function.

    \b
    Example:
      $ maxattn bench dispatch
      $ maxattn bench dispatch --json > dispatch.json
    """
    from maxattn.bench import dispatch as measurement

    with measuring(out, as_json) as (show, keep):
        measurement.measure(show=show, keep=keep)


def report(
    folder: Annotated[
        Path, typer.Argument(metavar="[FOLDER]", help="Where the pages go; the results are in FOLDER/results.")
    ] = OUT,
) -> None:
    """Write the pages of benchmarks: tables and plots of all results that other commands put there by --out.

    \b
    Example:
      $ maxattn bench report
      $ maxattn bench report docs/benchmarks
    """
    written = write_pages(folder)
    for path in written:
        typer.echo(f"wrote {path}")
    if not written:
        typer.echo(f"no results in {folder / 'results'}; to get some: maxattn bench model --out {folder}")


def _where(device: str | None, dtype: str | None) -> tuple[str, torch.dtype]:
    """The device and the dtype that are asked for, or those by default."""
    known = device_types()
    found = known[-1] if device is None else values.device(device, "--device").type
    if found not in known:
        raise typer.BadParameter(f"there is no {found} here, only {', '.join(known)}", param_hint="--device")
    if dtype is not None:
        return found, values.dtype(dtype, "--dtype")
    return found, torch.float32 if found == "cpu" else torch.bfloat16


def _modes(compiled: bool, *, recorded: bool = False) -> tuple[Mode, ...]:
    if not compiled:
        return ("eager",)
    return ("eager", "compiled", "recorded") if recorded else ("eager", "compiled")


def _effort(quick: bool) -> Effort:
    return QUICK if quick else Effort()
