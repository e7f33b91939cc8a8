"""Weights files: what they hold, as tensors; and written whole or not at all."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor

SPEC, VERSION, EXTRA = "maxattn.spec", "maxattn.version", "maxattn.extra"  # in the metadata of our own files
OPTIMIZED = "maxattn.optimized"  # there too, if the weights are those of a network made for inference
SAFE = "a .safetensors file or a state dict saved by torch.save"
# Where training scripts put the weights in a checkpoint; averaged weights first, as timm takes them.
ENTRIES = ("model_ema", "state_dict_ema", "ema", "state_dict", "model_state_dict", "model", "net", "module", "weights")
_WRAPPERS = re.compile(r"^((module|model|_orig_mod)\.)+|(?<=\.)_orig_mod\.")


@dataclass(frozen=True)
class Weights:
    """Tensors by name, without the prefixes that wrappers put before them.

    Attributes:
        source: the path or "the state dict", for errors.
        ignored: how many entries are no tensors, or count steps.
        metadata: of a safetensors file.
    """

    tensors: dict[str, Tensor]
    source: str
    ignored: int = 0
    metadata: Mapping[str, str] = field(default_factory=dict)


def read_weights(source: str | Path | Mapping[str, Any]) -> Weights:
    """The tensors of a file or of a state dict, also of one nested in a checkpoint.

    Raises:
        OSError: for a path that cannot be read.
        ValueError: for a file or a mapping without weights, saying what it looks like.
        TypeError: for anything else.
    """
    metadata: Mapping[str, str] = {}
    if isinstance(source, Mapping):
        data, name = source, "the state dict"
    elif isinstance(source, (str, Path)):
        (data, metadata), name = _read_file(Path(source)), str(source)
    else:
        raise TypeError(f"weights are a path or a state dict, not {type(source).__name__}; of a module, .state_dict()")
    if not isinstance(data, Mapping):
        raise ValueError(f"{name} holds a {type(data).__name__}, no state dict: {SAFE} would work")
    entry = next((entry for entry in ENTRIES if isinstance(data.get(entry), Mapping) and data[entry]), None)
    if entry is not None:
        data, name = data[entry], f"{name}[{entry!r}]"
    tensors = {_WRAPPERS.sub("", key): _tensor(value) for key, value in data.items() if isinstance(key, str)}
    tensors.pop("n_averaged", None)
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    if not kept:
        keys = ", ".join(map(repr, list(data)[:3])) + (", ..." if len(data) > 3 else "")
        raise ValueError(f"{name} holds no tensors ({keys or 'it is empty'}): a state dict maps names to tensors")
    return Weights(kept, name, len(data) - len(kept), metadata)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place if the block ends well and is removed if not."""
    temporary = path.with_name(f".{path.name}.{token_hex(4)}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # some writers make a file that none but its owner may read
        yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value.detach()
    if not hasattr(value, "__array__"):
        return None
    import numpy as np

    try:
        return torch.from_numpy(np.array(value))
    except TypeError:  # strings and objects
        return None


def _read_file(path: Path) -> tuple[Any, Mapping[str, str]]:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a weights file; give the path of {SAFE}")
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}; give the path of {SAFE}")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is empty (0 bytes): copy or download it again")
    if head.isascii() and b"\0" not in head:
        first = head.splitlines()[0].decode()
        raise ValueError(f"{path} is no weights file, it begins with the text {first!r}: {SAFE} would work")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith((b"PK", b"\x80")):
        return _read_torch(path), {}
    raise ValueError(f"{path} is no weights file, it begins with {head[:8]!r}: {SAFE} would work")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is no complete safetensors file ({error}): it is cut off, damaged or of another kind; "
            "copy or download it again"
        ) from error


def _read_torch(path: Path) -> Any:
    try:
        # Training scripts keep their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"WeightsUnpickler error: (.*?)( was not an allowed|\n|$)", str(error))
        raise ValueError(
            f"{path} is refused: it is a pickle of more than tensors ({found[1] if found else error}), which could run "
            "any code; where you trust it, load it yourself and save its state dict by safetensors.torch.save_file"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError) as error:
        if path.suffix == ".npz":
            raise ValueError(f"{path} holds arrays: load_weights(model, dict(numpy.load(path)))") from error
        detail = str(error).partition(". ")[0] or "it ends early"
        raise ValueError(
            f"{path} is no complete file of torch.save ({detail}): it is cut off, damaged or of another kind; copy or "
            "download it again"
        ) from error
