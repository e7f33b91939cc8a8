"""Launches that `python -m maxattn_triton` has measured on this machine, kept on disk under a stamp.

The stamp is all that the best launch depends on: the GPU, its driver, and the versions of torch, triton and this
package. A file may hold those of several stamps, as in a home directory that many machines share.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

from maxattn.weights.files import replacing
from maxattn_triton import __version__
from maxattn_triton.configs import Key, Launch

log = logging.getLogger("maxattn")


def path() -> Path:
    """The file: `MAXATTN_TRITON_LAUNCHES`, else `maxattn/triton-launches.json` in the user's cache."""
    named = os.environ.get("MAXATTN_TRITON_LAUNCHES")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(named or Path(base) / "maxattn" / "triton-launches.json").expanduser()


@cache
def stamp(device: int) -> str:
    """What the launches of the GPU of this number depend on; one for the interpreter where there is no GPU.

    Example:
        >>> stamp(0).startswith("gpu ")
        True
    """
    name, driver = "interpreter", "none"
    if torch.cuda.is_available():
        name, driver = torch.cuda.get_device_name(device), driver_version()
    facts = {"gpu": name, "driver": driver, "torch": torch.__version__, "triton": triton.__version__}
    return ", ".join(f"{fact} {value}" for fact, value in (facts | {"maxattn-triton": __version__}).items())


def driver_version() -> str:
    """The newest CUDA, or HIP, that the driver serves, as it numbers it: 13000 is 13.0; "unknown" without a driver."""
    nvidia = ("nvcuda.dll" if os.name == "nt" else "libcuda.so.1", "cuDriverGetVersion")
    library, function = ("libamdhip64.so", "hipDriverGetVersion") if torch.version.hip else nvidia
    number = ctypes.c_int()
    try:
        getattr(ctypes.CDLL(library), function)(ctypes.byref(number))
    except (OSError, AttributeError):
        return "unknown"
    return str(number.value)


def launch(key: Key) -> Launch | None:
    """The launch that was measured to be the fastest for `key` on the current GPU; None if none was measured."""
    known = _read()
    if not known:
        return None
    device = torch.cuda.current_device() if torch.cuda.is_available() else 0
    return known.get(stamp(device), {}).get(key)


def save(launches: Mapping[Key, Launch]) -> None:
    """Keep `launches` beside what is known; this process uses them at once."""
    file, device = path(), torch.cuda.current_device() if torch.cuda.is_available() else 0
    _read.cache_clear()
    known = _read()
    known = known | {stamp(device): known.get(stamp(device), {}) | dict(launches)}
    told = {
        one: [key._asdict() | launch._asdict() for key, launch in launches.items()] for one, launches in known.items()
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary:
        temporary.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    _read.cache_clear()


@cache
def _read() -> dict[str, dict[Key, Launch]]:
    """What the file holds, by stamp; nothing, with a warning, if it cannot be read."""
    file = path()
    try:
        found: dict[str, list[dict[str, Any]]] = json.loads(file.read_text(encoding="utf-8"))
        return {one: {_part(Key, each): _part(Launch, each) for each in launches} for one, launches in found.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s is left aside, for it cannot be read: %s: %s", file, type(error).__name__, error)
        return {}


def _part(kind: Any, values: dict[str, Any]) -> Any:
    return kind(**{name: values[name] for name in kind._fields})
