"""Max-SA, MaxViT's multi-axis attention, as one operator with swappable backends, and networks built from it."""

__version__ = "0.1.0"

from maxattn import nn as nn
from maxattn import plugins as plugins
from maxattn.build import build
from maxattn.ops.contract import Backend, Capabilities, Problem, Reason
from maxattn.ops.dispatch import BackendUnavailableError, list_backends, use_backend
from maxattn.ops.max_sa import explain, max_sa
from maxattn.presets import list_presets, load_spec
from maxattn.spec import MaxViTSpec

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
    "max_sa",
    "use_backend",
]
