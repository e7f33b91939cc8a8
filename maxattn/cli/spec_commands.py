"""`maxattn spec` and `maxattn summary`: networks as data, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import maxattn
from maxattn.cli import values
from maxattn.cli.output import JsonOption, print_json, print_table
from maxattn.spec import MaxViTSpec, pair

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
SpecArgument = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A preset, or a spec's YAML or JSON file.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="Replace a field, such as stages.*.window=7x5; may be repeated."),
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="List, show and check networks as data.")
    group.command("list")(list_specs)
    group.command()(show)
    group.command()(validate)
    group.command()(schema)
    app.add_typer(group, name="spec")
    app.command()(summary)


def list_specs(
    pattern: Annotated[str, typer.Argument(metavar="PATTERN", help="Shell pattern of the names.")] = "*",
    as_json: JsonOption = False,
) -> None:
    """List the presets with their image size and parameters.

    \b
    Example:
      $ maxattn spec list
      $ maxattn spec list 'maxvit_tiny*'
    """
    names = maxattn.list_presets(pattern)
    if not names:
        raise ValueError(f"no preset matches {pattern!r}; patterns are the shell's, such as '*tiny*'")
    found = [(name, pair(maxattn.load_spec(name).img_size), _params(name)) for name in names]
    if as_json:
        print_json([{"name": name, "img_size": size, "params": params} for name, size, params in found])
        return
    rows = [(name, f"{height}x{width}", f"{params:,}") for name, (height, width), params in found]
    print_table(("preset", "img_size", "params"), rows, right=("img_size", "params"))


def show(
    spec: SpecArgument,
    assignments: SetOption = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Write out every setting of every layer, defaults too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Print a spec as YAML or JSON.

    \b
    Example:
      $ maxattn spec show nano > my.yaml
      $ maxattn spec show nano --set num_classes=5 --set stages.*.window=7x5 --resolved
    """
    chosen = _load(spec, assignments)
    chosen = chosen.resolved() if resolved else chosen
    typer.echo(chosen.to_json() if as_json else chosen.to_yaml(), nl=False)


def validate(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="YAML or JSON files.")],
    as_json: JsonOption = False,
) -> None:
    """Check spec files, naming each wrong field.

    The exit code is 1 if a file is invalid, is none or cannot be read.

    \b
    Example:
      $ maxattn spec validate my.yaml
      $ maxattn spec validate my.yaml --json
    """
    errors = {str(file): _error(file) for file in files}
    if as_json:
        print_json([{"file": file, "valid": not error, "error": error} for file, error in errors.items()])
    else:
        for file, error in errors.items():
            typer.echo(error or f"{file}: valid", err=bool(error))
    if any(errors.values()):
        raise typer.Exit(1)


def schema() -> None:
    """Print the JSON schema of spec files, for editors.

    An editor with yaml-language-server completes and checks a file whose first line names the schema:

    \b
      # yaml-language-server: $schema=maxvit.schema.json

    \b
    Example:
      $ maxattn spec schema > maxvit.schema.json
    """
    print_json({"$schema": SCHEMA_DIALECT, **MaxViTSpec.model_json_schema()})


def summary(
    spec: SpecArgument,
    img_size: Annotated[
        str | None,
        typer.Option(metavar="N|HxW", help="Pixels of the image; by default the spec's. Windows stay as they are."),
    ] = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Count the parameters and FLOPs of each layer of a network.

    A FLOP is one multiply-add of a product of matrices, as papers count them. No weight is allocated.

    \b
    Example:
      $ maxattn summary maxvit_tiny_tf_224
      $ maxattn summary nano --img-size 224x320 --set stages.1.depth=3
    """
    size = None if img_size is None else values.size(img_size, "--img-size")
    result = _load(spec, assignments).summary(size)
    if as_json:
        print_json(result)
    else:
        typer.echo(str(result))


def _load(source: str, assignments: list[str] | None) -> MaxViTSpec:
    return maxattn.load_spec(source).override(**values.settings(assignments or [], "--set"))


def _params(name: str) -> int:
    with torch.device("meta"):
        model = maxattn.build(name)
    return sum(parameter.numel() for parameter in model.parameters())


def _error(file: Path) -> str:
    """What is wrong with a spec file; empty if nothing is."""
    try:
        maxattn.load_spec(file)
    except (OSError, ValueError) as error:
        return str(error)
    return ""
