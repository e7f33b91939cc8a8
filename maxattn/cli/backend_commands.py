"""`maxattn backends`: what each backend can do."""

from __future__ import annotations

import torch
import typer

from maxattn import plugins
from maxattn.cli.output import JsonOption, print_json, print_table
from maxattn.ops.contract import Capabilities, dtype_name

FEATURES = {
    "bias": "relative position bias",
    "bias_gradient": "gradient of the bias",
    "backward": "backward pass",
    "dropout": "dropout",
    "deterministic": "deterministic algorithms",
    "ragged": "windows the image does not fill",
    "compile": "torch.compile",
    "export": "torch.export",
    "double_backward": "double backward",
}


def register(app: typer.Typer) -> None:
    app.command()(backends)


def backends(as_json: JsonOption = False) -> None:
    """List the backends of max_sa and what each states it can do.

    \b
    Example:
      $ maxattn backends
      $ maxattn backends --json
    """
    loaded = plugins.load()
    if as_json:
        print_json(
            [
                {"name": name, "distribution": loaded.owners[name], "capabilities": backend.capabilities}
                for name, backend in loaded.backends.items()
            ]
        )
        return
    columns = [_column(loaded.owners[name], backend.capabilities) for name, backend in loaded.backends.items()]
    rows = [(fact, *(column[fact] for column in columns)) for fact in columns[0]]
    print_table(("backend", *loaded.backends), rows)


def _column(distribution: str, facts: Capabilities) -> dict[str, str]:
    low, high = facts.compute_capability or (None, None)
    return {
        "distribution": distribution,
        "devices": "any" if facts.devices is None else ", ".join(sorted(facts.devices)),
        "compute capability": f"{_dotted(low)} to {_dotted(high)}" if facts.compute_capability else "any",
        "dtypes": _dtypes(facts.dtypes),
        "dtypes of the bias": "any" if facts.bias_dtypes is None else _dtypes(facts.bias_dtypes),
        "head_dim": _range(facts.head_dims) + (f", x{facts.head_dim_multiple}" if facts.head_dim_multiple > 1 else ""),
        "tokens of a window": _range(facts.window_tokens),
        **{words: "yes" if getattr(facts, field) else "no" for field, words in FEATURES.items()},
    }


def _dtypes(dtypes: frozenset[torch.dtype]) -> str:
    return "any" if dtypes >= Capabilities().dtypes else ", ".join(sorted(map(dtype_name, dtypes)))


def _range(limits: tuple[int, int] | None) -> str:
    return "any" if limits is None else f"{limits[0]} to {limits[1]}"


def _dotted(capability: tuple[int, int] | None) -> str:
    return "any" if capability is None else "{}.{}".format(*capability)
