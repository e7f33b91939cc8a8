"""What a network made for inference must move and compute on a GPU, kernel by kernel: the floors of a roofline.

Each kernel reads its inputs and weights once and writes its output once; what fits the caches in between costs nothing.
Shapes: B images of H x W pixels, C channels in, N channels out, s bytes an element.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from maxattn.inference import gpu
from maxattn.nn import AttentionLayer, Downsample, Head, MaxAttention, MaxViT, MBConv, Shortcut, Stem
from maxattn.ops.windows import spans


class Cost(NamedTuple):
    """Bytes moved and floating point operations (a multiply-add is two) of one kernel: `kind` of the layer `name`."""

    name: str
    kind: str
    bytes: int
    flops: int

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The least time on a device that does so much."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)


class Pixels(NamedTuple):
    """The pixels of a batch."""

    batch: int
    height: int
    width: int

    @property
    def total(self) -> int:
        return prod(self)

    def strided(self, stride: int) -> Pixels:
        return Pixels(self.batch, -(-self.height // stride), -(-self.width // stride))


def costs(model: MaxViT, batch: int, img_size: tuple[int, int], itemsize: int = 2) -> list[Cost]:
    """The kernels of `optimize_for_inference(model)` for `batch` images, in order, where all of them serve.

    `model` may be plain, and on the meta device: only the shapes of its weights are looked at.

    Example:
        >>> import maxattn
        >>> by_kind = {}
        >>> for cost in costs(maxattn.build("maxvit_tiny_tf_224"), batch=256, img_size=(224, 224)):
        ...     by_kind[cost.kind] = by_kind.get(cost.kind, 0) + cost.bytes
        >>> f"depthwise {by_kind['depthwise'] / 1e9:.1f} GB of {sum(by_kind.values()) / 1e9:.1f}"
        'depthwise 6.0 GB of 32.1'
    """
    pixels = Pixels(batch, *img_size)
    return list(_network(model, pixels, itemsize))


def pointwise(
    rows: int, weight: tuple[int, ...], itemsize: int, gates: int = 0, added: bool = False
) -> tuple[int, int]:
    """Bytes `s (M C + N C + N + M N)`, and `s B C` for a gate, and `s M N` for a residual; `2 M N C` operations."""
    N, C = weight[:2]
    elements = rows * C + N * C + N + rows * N * (1 + added) + gates * C
    return itemsize * elements, 2 * rows * N * C


def mlp(rows: int, weight: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """Bytes `s (2 M C + 2 N C + N + C)`, of N hidden channels; `4 M N C` operations."""
    N, C = weight
    return itemsize * (2 * rows * C + 2 * N * C + N + C), 4 * rows * N * C


def depthwise(pixels: Pixels, weight: tuple[int, ...], stride: int, itemsize: int) -> tuple[int, int]:
    """Bytes `s C (B H W + B H' W' + 9 + 1)`; `2 * 9 B H' W' C` operations. The parts of the mean are negligible."""
    C, taps, out = weight[0], prod(weight[2:]), pixels.strided(stride).total
    return itemsize * C * (pixels.total + out + taps + 1), 2 * taps * out * C


def convolution(pixels: Pixels, weight: tuple[int, ...], stride: int, itemsize: int) -> tuple[int, int]:
    """Bytes `s (B H W C + kernel C N + N + B H' W' N)`; `2 kernel B H' W' C N` operations."""
    out, product = pixels.strided(stride).total, prod(weight)
    return itemsize * (pixels.total * weight[1] + product + weight[0] + out * weight[0]), 2 * out * product


def norm(rows: int, width: int, itemsize: int) -> tuple[int, int]:
    """Bytes `2 s M C` of a pass of its own; its operations are negligible."""
    return itemsize * 2 * rows * width, 0


def attention(pixels: Pixels, attn: MaxAttention, width: int, itemsize: int) -> tuple[int, int]:
    """Bytes `4 s B H W C`, and the bias once; `2 * 2 C` operations a query-key pair, of tokens that exist."""
    _, height, columns = pixels
    rows, across = (
        sum(run.groups * run.tokens**2 for run in spans(size, window, attn.axis))
        for size, window in zip((height, columns), attn.window, strict=True)
    )
    bias = 0 if attn.rel_pos is None else attn.heads * prod(attn.window) ** 2
    return itemsize * (4 * pixels.total * width + bias), 4 * pixels.batch * rows * across * width


def _network(model: MaxViT, pixels: Pixels, itemsize: int) -> Iterator[Cost]:
    for name, module in model.named_modules():
        if isinstance(module, Stem):
            yield from _stem(name, module, pixels, itemsize)
            pixels = pixels.strided(module.conv1.stride[0])
        elif isinstance(module, Downsample):
            yield from _shortcut(name, module, pixels, itemsize)
            pixels = pixels.strided(_stride(module))
        elif isinstance(module, MBConv):
            yield from _mbconv(name, module, pixels, itemsize)
            pixels = pixels.strided(module.conv2.stride[0])
        elif isinstance(module, AttentionLayer):
            yield from _attention_layer(name, module, pixels, itemsize)
        elif isinstance(module, Head):
            yield from _head(name, module, pixels, itemsize)


def _stem(name: str, stem: Stem, pixels: Pixels, itemsize: int) -> Iterator[Cost]:
    stride = stem.conv1.stride[0]
    yield Cost(f"{name}.conv1", "stem", *convolution(pixels, stem.conv1.weight.shape, stride, itemsize))
    pixels = pixels.strided(stride)
    yield Cost(f"{name}.conv2", "stem", *convolution(pixels, stem.conv2.weight.shape, 1, itemsize))


def _shortcut(name: str, shortcut: Shortcut, pixels: Pixels, itemsize: int, in_width: int = 0) -> Iterator[Cost]:
    out, width = pixels.strided(_stride(shortcut)), in_width
    if shortcut.conv is not None:
        width = shortcut.conv.weight.shape[1]
    if shortcut.pool is not None:
        yield Cost(f"{name}.pool", "shortcut", itemsize * width * (pixels.total + out.total), 0)
    if shortcut.conv is not None:
        yield Cost(f"{name}.conv", "shortcut", *pointwise(out.total, shortcut.conv.weight.shape, itemsize))


def _mbconv(name: str, layer: MBConv, pixels: Pixels, itemsize: int) -> Iterator[Cost]:
    up, down = layer.conv1.weight.shape, layer.conv3.weight.shape
    out, gates = pixels.strided(layer.conv2.stride[0]), 0
    yield Cost(f"{name}.conv1", "expansion", *pointwise(pixels.total, up, itemsize))
    yield Cost(
        f"{name}.conv2", "depthwise", *depthwise(pixels, layer.conv2.weight.shape, layer.conv2.stride[0], itemsize)
    )
    if layer.se is not None:
        gates = pixels.batch
        for part in ("fc1", "fc2"):
            weight = layer.se.get_submodule(part).get_parameter("weight").shape
            yield Cost(f"{name}.se.{part}", "squeeze_excite", *pointwise(gates, weight, itemsize))
    yield from _shortcut(f"{name}.shortcut", layer.shortcut, pixels, itemsize, up[1])
    yield Cost(f"{name}.conv3", "projection", *pointwise(out.total, down, itemsize, gates, added=True))


def _attention_layer(name: str, layer: AttentionLayer, pixels: Pixels, itemsize: int) -> Iterator[Cost]:
    attn, rows = layer.attn, pixels.total
    width = attn.proj.weight.shape[0]
    if not gpu.is_narrow(width):
        yield Cost(f"{name}.norm1", "norm", *norm(rows, width, itemsize))
    yield Cost(f"{name}.attn.qkv", "qkv", *pointwise(rows, attn.qkv.weight.shape, itemsize))
    yield Cost(f"{name}.attn", "attention", *attention(pixels, attn, width, itemsize))
    yield Cost(f"{name}.attn.proj", "proj", *pointwise(rows, attn.proj.weight.shape, itemsize, added=True))
    if layer.mlp is None:
        return
    up, down = layer.mlp.fc1.weight.shape, layer.mlp.fc2.weight.shape
    if gpu.is_narrow(width):
        yield Cost(f"{name}.mlp", "mlp", *mlp(rows, up, itemsize))
    else:
        if not gpu.is_narrow(width):
            yield Cost(f"{name}.norm2", "norm", *norm(rows, width, itemsize))
        yield Cost(f"{name}.mlp.fc1", "mlp", *pointwise(rows, up, itemsize))
        yield Cost(f"{name}.mlp.fc2", "mlp", *pointwise(rows, down, itemsize, added=True))


def _head(name: str, head: Head, pixels: Pixels, itemsize: int) -> Iterator[Cost]:
    yield Cost(f"{name}.pool", "head", itemsize * head.norm.normalized_shape[0] * (pixels.total + pixels.batch), 0)
    for part, linear in (("pre_logits", head.pre_logits), ("fc", head.fc)):
        if linear is not None:
            yield Cost(f"{name}.{part}", "head", *pointwise(pixels.batch, linear.weight.shape, itemsize))


def _stride(shortcut: Shortcut) -> int:
    return 1 if shortcut.pool is None else int(shortcut.pool.stride)  # type: ignore[arg-type]
