"""The networks are timm's and torchvision's: the same weights, everything in them random, give the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import small_torchvision, timm, torchvision
from random_weights import randomise
from torch import Tensor, nn

import maxattn

Networks = tuple[nn.Module, maxattn.nn.MaxViT]

SHALLOW = {"stages.*.depth": 1}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def timm_tiny(**changes: Any) -> Networks:
    return timm.create_model("maxvit_tiny_tf_224", **changes), maxattn.build("maxvit_tiny_tf_224")


def timm_tiny_rectangular() -> Networks:
    theirs = timm.create_model("maxvit_tiny_tf_224", img_size=(64, 96))
    return theirs, maxattn.build("maxvit_tiny_tf_224", img_size=(64, 96), window="img/32")


def timm_shallow(name: str) -> Networks:
    theirs = timm.create_model(name, img_size=64, depths=(1, 1, 1, 1))
    return theirs, maxattn.build(name, img_size=64, window=2, drop_path_rate=0.0, **SHALLOW)


def torchvision_tiny(**changes: Any) -> Networks:
    return torchvision.models.maxvit_t(), maxattn.build("maxvit_t", **changes)


def torchvision_shallow() -> Networks:
    return small_torchvision(), maxattn.build("maxvit_t", window=2, drop_path_rate=0.0, **SHALLOW)


def same_weights(networks: Networks, dtype: torch.dtype = torch.float64) -> Networks:
    theirs, ours = (network.to(dtype).eval() for network in networks)
    maxattn.load_weights(ours, randomise(theirs).state_dict())
    return theirs, ours


def images(batch: int, height: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert ours.shape == theirs.shape
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    ("networks", "size"),
    [
        pytest.param(timm_tiny, (224, 224), id="timm-tiny"),
        pytest.param(timm_tiny_rectangular, (64, 96), id="timm-tiny-rectangular"),
        pytest.param(lambda: timm_shallow("maxvit_small_tf_224"), (64, 64), id="timm-small"),
        pytest.param(lambda: timm_shallow("maxvit_large_tf_224"), (64, 64), id="timm-large"),
        pytest.param(torchvision_tiny, (224, 224), id="torchvision"),
        pytest.param(lambda: torchvision_tiny(attn_scale="head_dim"), (224, 224), id="torchvision-scale-folded"),
    ],
)
def test_logits_equal_the_peers_under_every_backend_of_the_core(
    networks: Callable[[], Networks], size: tuple[int, int], dtype: torch.dtype
) -> None:
    theirs, ours = same_weights(networks(), dtype)
    x = images(1, *size, dtype)
    with torch.no_grad():
        expected = theirs(x)
        for backend in ("naive", "sdpa"):
            with maxattn.use_backend(backend):
                assert difference(ours(x), expected) <= TOLERANCE[dtype], backend


def test_logits_equal_timm_with_the_windows_of_larger_images() -> None:
    name = "maxvit_tiny_tf_384"
    theirs, ours = same_weights((timm.create_model(name), maxattn.build(name)))
    x = images(1, 384, 384)
    with torch.no_grad():
        assert difference(ours(x), theirs(x)) <= TOLERANCE[torch.float64]


def test_feature_maps_equal_timm() -> None:
    theirs, ours = same_weights(timm_tiny_rectangular())
    x = images(2, 64, 96)
    with torch.no_grad():
        expected = theirs.forward_intermediates(x, intermediates_only=True)
        maps = ours.features(x)
    assert len(maps) == len(expected) == 5
    assert max(map(difference, maps, expected)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize(
    "networks",
    [
        pytest.param(lambda: timm_shallow("maxvit_tiny_tf_224"), id="timm"),
        pytest.param(torchvision_shallow, id="torchvision"),
    ],
)
def test_a_training_step_gives_the_peers_gradients_and_norm_statistics(networks: Callable[[], Networks]) -> None:
    theirs, ours = same_weights(networks())
    x = images(4, 64, 64)
    for network in (theirs, ours):
        network.train()(x).square().sum().backward()
    # In the place of their weights their gradients and statistics, so that the key map finds ours for each.
    after = theirs.state_dict() | {name: parameter.grad for name, parameter in theirs.named_parameters()}
    expected = maxattn.build(ours.spec).double()
    maxattn.load_weights(expected, after)
    seen = ours.state_dict() | {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, tensor in expected.state_dict().items():
        # A batch norm takes away what a bias before it adds; the gradient of such a bias is rounding alone.
        allowed = TOLERANCE[torch.float64] * max(tensor.abs().max().item(), 1e-3)
        assert (seen[name] - tensor).abs().max().item() <= allowed, name
