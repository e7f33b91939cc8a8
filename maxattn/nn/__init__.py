"""The modules networks are built from, each usable alone."""

from maxattn.nn.attention import MLP, AttentionLayer, MaxAttention
from maxattn.nn.conv import Conv2d, Downsample, MBConv, Shortcut, SqueezeExcite
from maxattn.nn.head import Head
from maxattn.nn.maxvit import Block, MaxViT, Parallel, Stage
from maxattn.nn.rel_pos import RelPosLogMLP, RelPosTable
from maxattn.nn.stem import Stem

__all__ = [
    "MLP",
    "AttentionLayer",
    "Block",
    "Conv2d",
    "Downsample",
    "Head",
    "MBConv",
    "MaxAttention",
    "MaxViT",
    "Parallel",
    "RelPosLogMLP",
    "RelPosTable",
    "Shortcut",
    "SqueezeExcite",
    "Stage",
    "Stem",
]
