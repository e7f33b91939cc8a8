"""Augmentation and normalisation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from maxattn.train.augment import normalise, random_flip, random_shift


def shifted(image: Tensor, down: int, right: int, pixels: int) -> Tensor:
    """By padding and cutting, the textbook way."""
    _, H, W = image.shape
    padded = F.pad(image[None], (pixels,) * 4, mode="replicate")[0]
    return padded[:, pixels - down : pixels - down + H, pixels - right : pixels - right + W]


@pytest.mark.parametrize("pixels", [1, 3])
@pytest.mark.parametrize("size", [(7, 9), (2, 2)])
def test_each_image_is_shifted_on_its_own_by_any_of_the_offsets_allowed(pixels: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = torch.rand(3, *size)
    sides = range(-pixels, pixels + 1)
    allowed = {shifted(image, down, right, pixels).numpy().tobytes() for down in sides for right in sides}
    seen = {one.contiguous().numpy().tobytes() for one in random_shift(image.expand(2000, -1, -1, -1), pixels)}
    assert seen == allowed


def test_shifting_keeps_uint8_and_the_order_of_the_images() -> None:
    images = torch.arange(10, dtype=torch.uint8).view(10, 1, 1, 1).expand(10, 2, 4, 4)
    assert random_shift(images, 2).equal(images)


def test_about_half_of_the_images_are_mirrored() -> None:
    torch.manual_seed(0)
    images = torch.rand(400, 3, 4, 5)
    flipped = random_flip(images)
    mirrored = (flipped == images.flip(-1)).all((1, 2, 3))
    assert (mirrored | (flipped == images).all((1, 2, 3))).all()
    assert 140 < mirrored.sum() < 260


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.25]), ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])])
def test_normalisation_subtracts_and_divides_for_each_channel(mean: list[float], std: list[float]) -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    result = normalise(images, mean, std)
    assert result.dtype == torch.float32
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - mean[channel % len(mean)]) / std[channel % len(std)]
        torch.testing.assert_close(result[:, channel], expected.float())
