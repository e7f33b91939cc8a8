"""Kernels of our own for compiled training on a GPU; in Triton, which is imported at the first call of one."""

from maxattn.nn.gpu.layers import batch_norm_act, convolved, expanded, mlp, norm_linear, squeeze_excite_conv
from maxattn.nn.gpu.serving import (
    IDENTITY,
    name_of,
    serves_batch_norm,
    serves_depthwise,
    serves_expanded,
    serves_mlp,
    serves_norm_linear,
    serves_squeeze_excite,
    unchanged,
)

__all__ = [
    "IDENTITY",
    "batch_norm_act",
    "convolved",
    "expanded",
    "mlp",
    "name_of",
    "norm_linear",
    "serves_batch_norm",
    "serves_depthwise",
    "serves_expanded",
    "serves_mlp",
    "serves_norm_linear",
    "serves_squeeze_excite",
    "squeeze_excite_conv",
    "unchanged",
]
