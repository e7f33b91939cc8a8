"""Initial weights, as the official MaxViT code sets them: N(0, 0.02) everywhere, biases zero."""

from __future__ import annotations

from torch import nn

from maxattn.nn.rel_pos import RelPosTable

STD = 0.02


def init_weights(root: nn.Module) -> None:
    """Initialise every convolution, Linear and relative position table below `root`; norms keep one and zero."""
    for module in root.modules():
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            continue  # nothing to write to, and PyTorch takes seconds to find out
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.normal_(module.weight, std=STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RelPosTable):
            nn.init.normal_(module.table, std=STD)
