"""Pictures of what a network does: predictions, and what one pixel attends to through block and grid.

The weights are those the backend itself applies: Max-SA's output is linear in v, and its derivative with respect to v
are the attention weights. So any backend that has a backward pass can be looked into, and none has to hand out weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from maxattn.nn import MaxAttention, MaxViT
from maxattn.ops.max_sa import max_sa
from maxattn.weights.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Pixel = tuple[int, int]
WRONG, MARK = "#c1121f", "#00d5ff"


class Attended(NamedTuple):
    """A Max-SA module and what it was given in a forward pass, `x (B, H, W, width)`."""

    attention: MaxAttention
    x: Tensor


def attention_map(attention: MaxAttention, x_BHWC: Tensor, pixel: Pixel) -> Tensor:
    """The weights `(heads, H, W)` with which one pixel of `x (1, H, W, width)` attends to all others.

    They sum to 1 for each head, and are 0 outside the pixel's group. Dropout is left out.

    Raises:
        ValueError: for more than one image, or a pixel outside it.

    Example:
        >>> import torch, maxattn
        >>> block = maxattn.nn.MaxAttention(64, axis="block", window=4)
        >>> weights = attention_map(block, torch.randn(1, 12, 12, 64), (0, 5))
        >>> weights.shape, (weights > 0).sum().item()
        (torch.Size([2, 12, 12]), 32)
    """
    return _pull_back(attention, x_BHWC, _one_hot(x_BHWC, pixel))


def rollout(layers: Sequence[Attended], pixel: Pixel) -> Tensor:
    """The weights `(H, W)` with which one pixel reaches all others through layers in sequence, heads averaged.

    It is the row of the product of the layers' attention matrices (attention rollout, Abnar and Zuidema, 2020,
    without their share for the residual connection).

    Raises:
        ValueError: for no layer, more than one image, or a pixel outside it.

    Example:
        >>> import torch, maxattn
        >>> block, grid = (maxattn.nn.MaxAttention(64, axis=axis, window=4) for axis in ("block", "grid"))
        >>> x = torch.randn(1, 16, 16, 64)
        >>> (rollout([Attended(block, x), Attended(grid, x)], (0, 5)) > 0).all().item()
        True
    """
    if not layers:
        raise ValueError("a rollout needs at least one layer")
    weights = _one_hot(layers[-1].x, pixel)
    for attention, x in reversed(layers):
        weights = _pull_back(attention, x, weights).mean(0)
    return weights


@torch.no_grad()
def attended(model: MaxViT, x: Tensor) -> list[Attended]:
    """Every Max-SA of a network, in order, with what it is given for the images `x (B, in_chans, H, W)`."""
    found: list[Attended] = []

    def note(attention: Any, args: tuple[Tensor]) -> None:
        found.append(Attended(attention, args[0]))

    hooks = [attention.register_forward_pre_hook(note) for attention in model.attentions()]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def draw_predictions(
    path: Path,
    images: Tensor,
    probabilities: Tensor,
    labels: Tensor,
    classes: Sequence[str],
    *,
    title: str = "",
    columns: int = 10,
) -> None:
    """Write a PNG of images `(B, C, H, W)` uint8 with the most probable class of each, and the right one if another.

    `probabilities` are `(B, classes)`, `labels (B)`.
    """
    from matplotlib.figure import Figure

    rows = -(-len(images) // columns)
    figure = Figure(figsize=(columns, 1.3 * rows + 0.3), layout="constrained")
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, share, label in zip(grid.flat, images, probabilities, labels.tolist(), strict=False):
        likeliest = int(share.argmax())
        verdict = f"{classes[likeliest]} {share[likeliest]:.0%}"
        axes.imshow(_viewable(image), cmap="gray", vmin=0, vmax=255)
        if likeliest == label:
            axes.set_title(f"\n{verdict}", fontsize=9)
        else:
            axes.set_title(f"{verdict}\nis {classes[label]}", fontsize=9, color=WRONG, weight="bold")
    _save(figure, path)


def draw_attention(path: Path, model: MaxViT, x: Tensor, images: Tensor, pixels: Sequence[Pixel]) -> None:
    """Write a PNG of what a pixel attends to in the network's first block, a row an image.

    The columns are the image, each Max-SA's map, heads averaged, and the rollout through all of them.

    Args:
        x: what the network takes, `(B, in_chans, H, W)`.
        images: the same to look at, `(B, C, H, W)` uint8.
        pixels: one for each image, in the feature map that the attention sees.

    Raises:
        ValueError: if the first block has no Max-SA, or for a pixel outside its feature map.
    """
    from matplotlib.figure import Figure

    count = sum(isinstance(module, MaxAttention) for module in model.get_submodule("stages.0.blocks.0").modules())
    if not count:
        raise ValueError("the network's first block has no Max-SA to draw")
    figure = Figure(figsize=(2.4 * (count + 2), 2.4 * len(pixels) + 0.6), layout="constrained")
    figure.suptitle("What the outlined pixel attends to; brightness is the square root of the weight")
    grid = figure.subplots(len(pixels), count + 2, squeeze=False)
    for row, image, one, pixel in zip(grid, images, x, pixels, strict=True):
        layers = attended(model, one[None])[:count]
        size = layers[0].x.shape[1:3]
        _draw_map(row[0], image, size, pixel, None)
        for axes, layer in zip(row[1:], layers, strict=False):
            _draw_map(axes, image, size, pixel, attention_map(*layer, pixel).mean(0))
        _draw_map(row[-1], image, size, pixel, rollout(layers, pixel))
    names = [layer.attention.axis for layer in layers]
    for axes, title in zip(grid[0], ["image", *names, " then ".join(names)], strict=True):
        axes.set_title(title)
    _save(figure, path)


def _draw_map(axes: Axes, image: Tensor, size: Sequence[int], pixel: Pixel, weights_HW: Tensor | None) -> None:
    """The image, darkened under the weights if there are any, and the pixel outlined."""
    from matplotlib.patches import Rectangle

    extent = (0, size[1], size[0], 0)
    axes.imshow(_viewable(image), cmap="gray", vmin=0, vmax=255, extent=extent)
    if weights_HW is not None:
        share = (weights_HW / weights_HW.max()).sqrt().cpu().numpy()
        axes.imshow(share, cmap="inferno", extent=extent, alpha=0.8, interpolation="nearest")
    axes.add_patch(Rectangle((pixel[1], pixel[0]), 1, 1, fill=False, color=MARK, linewidth=2))
    axes.set_xticks([])
    axes.set_yticks([])


def _one_hot(x_BHWC: Tensor, pixel: Pixel) -> Tensor:
    batch, height, width, _ = x_BHWC.shape
    if batch != 1:
        raise ValueError(f"an attention map is of one image, not of {batch}: pass x[i : i + 1]")
    if not (0 <= pixel[0] < height and 0 <= pixel[1] < width):
        raise ValueError(f"pixel {pixel} lies outside the {height} x {width} image")
    weights_HW = x_BHWC.new_zeros(height, width)
    weights_HW[pixel] = 1.0
    return weights_HW


def _pull_back(attention: MaxAttention, x_BHWC: Tensor, weights_HW: Tensor) -> Tensor:
    """The sum over pixels of their weight times their attention map, `(heads, H, W)`: a vector-Jacobian product."""
    with torch.inference_mode(False), torch.no_grad():
        qkv, bias = attention.project(x_BHWC.clone())
    with torch.inference_mode(False), torch.enable_grad():
        qkv.requires_grad_()
        out_BHWhd = max_sa(qkv, attention.axis, attention.window, bias, attention.scale, 0.0, attention.backend)
        reached = (out_BHWhd[0, :, :, :, 0] * weights_HW.clone()[:, :, None]).sum()
        (gradient,) = torch.autograd.grad(reached, qkv)
    return gradient[0, :, :, 2, :, 0].permute(2, 0, 1)


def _viewable(image: Tensor) -> Any:
    """`(C, H, W)` as an array `(H, W)` of grey or `(H, W, 3)`."""
    return image[:3].squeeze(0).cpu().numpy() if len(image) == 1 else image[:3].permute(1, 2, 0).cpu().numpy()


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
