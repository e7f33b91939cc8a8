"""Checkpoints: all that a training needs to go on as if it had never stopped."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from maxattn.weights.files import replacing

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors and plain data to `path`, whole or not at all."""
    with replacing(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or no checkpoint of this version's format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path} to resume from; without --resume the training starts anew")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no complete checkpoint: it is cut off, damaged or of another kind") from error
    seen = state.get("format") if isinstance(state, dict) else None
    if seen != FORMAT:
        raise ValueError(f"{path} is no checkpoint of this version of maxattn: its format is {seen}, not {FORMAT}")
    return state


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the random generators that a training draws from."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_state(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
