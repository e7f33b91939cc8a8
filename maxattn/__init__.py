"""Max-SA, MaxViT's multi-axis attention, as one operator with swappable backends, and networks built from it."""

__version__ = "0.1.0"

from maxattn import plugins as plugins
from maxattn.ops.contract import Backend, Capabilities, Problem, Reason
from maxattn.ops.dispatch import BackendUnavailableError, list_backends, use_backend
from maxattn.ops.max_sa import explain, max_sa

__all__ = [
    "Backend",
    "BackendUnavailableError",
    "Capabilities",
    "Problem",
    "Reason",
    "explain",
    "list_backends",
    "max_sa",
    "use_backend",
]
