"""The same architectures of timm and torchvision, where those are installed."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maxattn.presets import load_spec
from maxattn.spec import MaxViTSpec, pair

OF_TIMM = re.compile(r"maxvit_(tiny|small|base|large|xlarge)_tf_\d+")
TORCHVISION = {"maxvit_t": "maxvit_t", "maxvit_tiny_tf_224": "maxvit_t"}
"""Which preset has the weights of torchvision's `maxvit_t`, for presets that it is measured beside."""
LIBRARIES = ("timm", "torchvision")


@dataclass(frozen=True)
class Peer:
    """Another library's network; `spec` describes it as a network of ours, which takes its weights."""

    library: str
    spec: MaxViTSpec
    create: Callable[[], nn.Module]


def find_peers(spec: MaxViTSpec) -> tuple[list[Peer], dict[str, str]]:
    """The networks of other libraries to measure beside ours, and why a library has none to offer.

    Example:
        >>> find_peers(load_spec("nano"))
        ([], {'timm': 'has no nano', 'torchvision': 'has no nano'})
    """
    peers, reasons = [], {}
    for library, find in (("timm", _timm), ("torchvision", _torchvision)):
        try:
            peers.append(find(spec))
        except LookupError as reason:
            reasons[library] = str(reason.args[0])
    return peers, reasons


def timm_network(name: str, img_size: tuple[int, int], **settings: Any) -> nn.Module:
    """A network of timm with random weights, for images of `img_size`.

    Raises:
        LookupError: if timm, or this network, is not there.
    """
    timm = _library("timm")
    if not timm.is_model(name):
        raise LookupError(f"has no {name}")
    usual = timm.get_pretrained_cfg(name).input_size[1:]
    resized = {} if img_size == tuple(usual) else {"img_size": img_size}  # not every network of timm takes that
    network: nn.Module = timm.create_model(name, **settings, **resized)
    return network


def _timm(spec: MaxViTSpec) -> Peer:
    name = spec.name or ""
    if not OF_TIMM.fullmatch(name):
        raise LookupError(f"has no {name}")
    _library("timm")
    size, settings = pair(spec.img_size), {"num_classes": spec.num_classes, "in_chans": spec.in_chans}
    published = load_spec(name)
    resized = {} if size == pair(published.img_size) else {"img_size": size, "window": "img/32"}
    return Peer("timm", published.override(**resized, **settings), lambda: timm_network(name, size, **settings))


def _torchvision(spec: MaxViTSpec) -> Peer:
    if spec.name not in TORCHVISION:
        raise LookupError(f"has no {spec.name}")
    same = load_spec(TORCHVISION[spec.name])
    if pair(spec.img_size) != pair(same.img_size):
        raise LookupError(f"{same.name} takes images of {pair(same.img_size)[0]} pixels alone")
    models = _library("torchvision").models

    def create() -> nn.Module:
        network: nn.Module = models.maxvit_t(num_classes=spec.num_classes)
        for module in network.modules():
            if type(module).__name__ == "StochasticDepth":
                module.p = 0.0  # type: ignore[assignment]
        return network

    return Peer("torchvision", same.override(num_classes=spec.num_classes), create)


@cache
def _library(name: str) -> Any:
    """The module; timm needs torchvision's too."""
    if find_spec(name) is None:
        raise LookupError(f"not installed: pip install {name}")
    _define_operators()
    try:
        return import_module(name)
    except Exception as error:
        raise LookupError(f"cannot be imported: {type(error).__name__}: {error}") from error


@cache
def _define_operators() -> torch.library.Library | None:
    """torchvision cannot be imported where its compiled operators do not fit PyTorch's build, for want of the names of
    two operators; its MaxViT needs neither."""
    found = find_spec("torchvision")
    with suppress(OSError):
        for folder in (found.submodule_search_locations if found else None) or ():
            for path in Path(folder).glob("_C*.so"):
                torch.ops.load_library(str(path))
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
