"""Random values for everything in a network, such that activations stay sane and nothing is trivial."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import maxattn

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
    model = maxattn.build(SMALL, **overrides)
    randomise(model, seed)
    return model.eval()


def randomise(network: nn.Module, seed: int = 0) -> nn.Module:
    """Fill weights, biases, norms' statistics and tables of relative positions, in place; return the network."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(_values(name, torch.randn(tensor.shape, generator=generator, dtype=torch.float64)))
    return network


def _values(name: str, normal: Tensor) -> Tensor:
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return normal.abs() + 0.5
    if leaf in ("table", "relative_position_bias_table"):
        return normal
    if normal.ndim > 1:
        return normal / normal[0].numel() ** 0.5
    return 1 + 0.2 * normal if leaf == "weight" else 0.2 * normal
