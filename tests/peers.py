"""timm and torchvision, which the tests compare with.

torchvision's import fails where its compiled operators do not load, as under the CPU build of torch, for want of two
operators' names. The networks need neither.
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path

import torch

with suppress(OSError):
    for folder in importlib.util.find_spec("torchvision").submodule_search_locations:
        torch.ops.load_library(str(Path(folder) / "_C.so"))

if not hasattr(torch.ops.torchvision, "nms"):
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import timm
import torchvision

__all__ = ["small_torchvision", "timm", "torchvision"]


def small_torchvision() -> torch.nn.Module:
    """torchvision's MaxViT-T with one block a stage, for images of 64 pixels and windows of 2."""
    return torchvision.models.maxvit.MaxVit(
        input_size=(64, 64),
        stem_channels=64,
        partition_size=2,
        block_channels=[64, 128, 256, 512],
        block_layers=[1, 1, 1, 1],
        head_dim=32,
        stochastic_depth_prob=0.0,
    )
