"""Max-SA, MaxViT's multi-axis attention, as one operator with swappable backends, and networks built from it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

from maxattn import nn as nn
from maxattn import plugins as plugins
from maxattn.build import build
from maxattn.ops.contract import Backend, Capabilities, Problem, Reason
from maxattn.ops.dispatch import BackendUnavailableError, list_backends, use_backend
from maxattn.ops.max_sa import explain, max_sa

if TYPE_CHECKING:
    from maxattn.inference import optimize_for_inference
    from maxattn.presets import list_presets, load_spec
    from maxattn.spec import MaxViTSpec
    from maxattn.weights import load_weights, open_model, save_weights

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "Capabilities",
    "MaxViTSpec",
    "Problem",
    "Reason",
    "build",
    "explain",
    "list_backends",
    "list_presets",
    "load_spec",
    "load_weights",
    "max_sa",
    "open_model",
    "optimize_for_inference",
    "save_weights",
    "use_backend",
]

_AT_FIRST_USE = {
    "list_presets": "maxattn.presets",
    "load_spec": "maxattn.presets",
    "MaxViTSpec": "maxattn.spec",
    "load_weights": "maxattn.weights",
    "open_model": "maxattn.weights",
    "optimize_for_inference": "maxattn.inference",
    "save_weights": "maxattn.weights",
}


def __getattr__(name: str) -> Any:
    """Specs, and all that needs them, are imported when first used: pydantic takes long to define them."""
    if name in _AT_FIRST_USE:
        return getattr(import_module(_AT_FIRST_USE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "nn"]
