"""`maxattn explain`: which backend serves a problem, and why."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer

import maxattn
from maxattn.bench import device_types
from maxattn.cli import values
from maxattn.cli.output import JsonOption, print_json
from maxattn.network_problems import network_problems
from maxattn.ops.contract import Problem
from maxattn.ops.dispatch import Explanation
from maxattn.ops.dispatch import compute_capability as capability_of
from maxattn.spec import pair

OF_A_NETWORK = ("axis", "window", "size", "heads", "head_dim", "no_bias", "dropout")
"""Options that a network settles itself."""


Layers = list[tuple[list[str], Explanation]]
"""The attention of a network: names of layers and the one explanation that holds for all of them."""


class AxisName(StrEnum):
    """`Axis` as a choice of the command line."""

    block = "block"
    grid = "grid"


def register(app: typer.Typer) -> None:
    app.command()(explain)


def explain(
    ctx: typer.Context,
    axis: Annotated[AxisName, typer.Option(help="Local windows or the dilated grid.")] = AxisName.block,
    window: Annotated[str, typer.Option(help="Tokens of a group: 7, or 7x5.", metavar="N|HxW")] = "7",
    size: Annotated[str, typer.Option(help="Pixels of the feature map: 56, or 56x40.", metavar="N|HxW")] = "56",
    batch: Annotated[int, typer.Option(help="Images.", min=0, metavar="N")] = 1,
    heads: Annotated[int, typer.Option(help="Heads.", min=1, metavar="N")] = 2,
    head_dim: Annotated[int, typer.Option(help="Channels of a head.", min=1, metavar="N")] = 32,
    dtype: Annotated[str, typer.Option("--dtype", help="Of qkv: float32, bf16, ...", metavar="DTYPE")] = "float32",
    device: Annotated[
        str | None, typer.Option("--device", help="cpu, cuda, ...; by default the best there is.", metavar="DEVICE")
    ] = None,
    compute_capability: Annotated[
        str | None, typer.Option(help="Of the GPU, such as 9.0; by default this machine's.", metavar="MAJOR.MINOR")
    ] = None,
    no_bias: Annotated[bool, typer.Option("--no-bias", help="Without a relative position bias.")] = False,
    bias_dtype: Annotated[str | None, typer.Option(help="Of the bias; by default qkv's.", metavar="DTYPE")] = None,
    train: Annotated[bool, typer.Option("--train/--eval", help="With gradients of qkv and bias, or without.")] = False,
    dropout: Annotated[
        float, typer.Option(help="Probability of dropping an attention weight.", min=0, max=0.999, metavar="P")
    ] = 0.0,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="As under torch.use_deterministic_algorithms(True).")
    ] = False,
    compiling: Annotated[bool, typer.Option("--compiling", help="As under torch.compile.")] = False,
    exporting: Annotated[bool, typer.Option("--exporting", help="As under torch.export.")] = False,
    backend: Annotated[
        str | None,
        typer.Option(help="Backend to force: a name, or a comma list in order of preference.", metavar="NAMES"),
    ] = None,
    spec: Annotated[
        str | None,
        typer.Option(help="Explain every attention problem of this preset or spec file.", metavar="NAME|FILE"),
    ] = None,
    img_size: Annotated[
        str | None, typer.Option(help="With --spec: pixels of the images; by default the spec's.", metavar="N|HxW")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell which backend would serve a problem, and why.

    Every backend answers, with its reasons if it is not able. The exit code is 1 if none that was asked for is. The
    first of these that is given decides: --backend, the environment variable MAXATTN_BACKEND, the fastest able one.

    \b
    Example:
      $ maxattn explain --axis grid --window 7x5 --size 56x40
      $ maxattn explain --device cuda --compute-capability 9.0 --dtype bf16 --train
      $ maxattn explain --spec maxvit_tiny_tf_224 --img-size 224x320 --batch 64
    """
    where = values.device(device or ("cuda" if compute_capability else device_types()[-1]), "--device")
    capability = capability_of(where)
    if compute_capability is not None:
        capability = values.compute_capability(compute_capability, "--compute-capability")
        if where.type != "cuda":
            raise typer.BadParameter(f"{where.type} has none, only cuda", param_hint="--compute-capability")
    qkv_dtype = values.dtype(dtype, "--dtype")
    wanted = {
        "dtype": qkv_dtype,
        "device": where.type,
        "compute_capability": capability,
        "bias": qkv_dtype if bias_dtype is None else values.dtype(bias_dtype, "--bias-dtype"),
        "requires_grad": train,
        "bias_requires_grad": train,
        "deterministic": deterministic,
        "compiling": compiling or exporting,
        "exporting": exporting,
    }
    if spec is None:
        _reject(ctx, ("img_size",), "needs --spec; the pixels of the feature map are --size")
        height, width = values.size(size, "--size")
        problem = Problem(
            axis=axis.value,
            window=values.size(window, "--window"),
            batch=batch,
            height=height,
            width=width,
            heads=heads,
            head_dim=head_dim,
            bias=None if no_bias else torch.float32,
            dropout_p=dropout,
        )
        explanations = [maxattn.explain(_under(problem, wanted), backend=backend)]
        if as_json:
            print_json(explanations[0])
        else:
            typer.echo(str(explanations[0]))
    else:
        _reject(ctx, OF_A_NETWORK, "has no effect with --spec, for the network settles it")
        layers = _explain_network(maxattn.load_spec(spec), batch, img_size, wanted, backend)
        explanations = [explanation for _, explanation in layers]
        _print_network(layers, as_json)
    if any(explanation.backend is None for explanation in explanations):
        raise typer.Exit(1)


def _explain_network(
    spec: maxattn.MaxViTSpec, batch: int, img_size: str | None, wanted: dict[str, Any], backend: str | None
) -> Layers:
    size = pair(spec.img_size) if img_size is None else values.size(img_size, "--img-size")
    layers: dict[Problem, list[str]] = {}
    for name, dropout, problem in network_problems(spec, batch, size):
        dropout_p = dropout if wanted["requires_grad"] else 0.0
        layers.setdefault(_under(replace(problem, dropout_p=dropout_p), wanted), []).append(name)
    forced = spec.backend if backend is None else backend
    return [(names, maxattn.explain(problem, backend=forced)) for problem, names in layers.items()]


def _under(problem: Problem, wanted: dict[str, Any]) -> Problem:
    """The same problem elsewhere: on another device, in another dtype, with gradients and so on."""
    without_bias = {"bias": None, "bias_requires_grad": False} if problem.bias is None else {}
    return replace(problem, **{**wanted, **without_bias})


def _reject(ctx: typer.Context, names: tuple[str, ...], why: str) -> None:
    for name in names:
        source = ctx.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise typer.BadParameter(why, param_hint=f"--{name.replace('_', '-')}")


def _print_network(layers: Layers, as_json: bool) -> None:
    if as_json:
        print_json([{"layers": names, "explanation": explanation} for names, explanation in layers])
        return
    counted = [f"{len(names)} layer{'s' if len(names) > 1 else ''}: {', '.join(names)}" for names, _ in layers]
    told = [f"{names}\n{explanation}" for names, (_, explanation) in zip(counted, layers, strict=True)]
    typer.echo("\n\n".join(told) or "the network has no attention layers")
