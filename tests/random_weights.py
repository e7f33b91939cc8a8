"""Random values for everything in a network, as benchmarks take them too, and a small one."""

from __future__ import annotations

import maxattn
from maxattn.bench.networks import randomised as randomise

__all__ = ["SMALL", "randomise", "small"]

SMALL = {
    "name": "small",
    "img_size": 32,
    "num_classes": 10,
    "window": 4,
    "head_dim": 16,
    "expansion": 2,
    "mlp_ratio": 2,
    "stem": {"width": 16, "stride": 1},
    "head": {"kind": "linear"},
    "stages": [{"width": 32, "depth": 1}, {"width": 64, "depth": 1}],
}


def small(seed: int = 0, **overrides: object) -> maxattn.nn.MaxViT:
    """A network of 115 tensors, quick to run, in eval mode."""
    return randomise(maxattn.build(SMALL, **overrides), seed).eval()
