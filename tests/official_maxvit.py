"""The official TensorFlow MaxViT in numpy: each operation as google-research/maxvit has it, NHWC, in eval mode.

Names and shapes of the variables are those which its layers create. For square images that the windows divide.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Array = np.ndarray
Variables = dict[str, Array]

HEAD_SIZE = 32
STEM = "maxvit/stem"


def shapes(
    stem: int, widths: Sequence[int], depths: Sequence[int], window: int, classes: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the variables."""
    yield from _conv_shapes(f"{STEM}/conv_0", 3, 3, stem)
    yield from _batch_norm_shapes(f"{STEM}/norm_0", stem)
    yield from _conv_shapes(f"{STEM}/conv_1", 3, stem, stem)
    inputs = stem
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        for number in range(depth):
            block = f"maxvit/block_{stage:0>2d}_{number:0>2d}"
            yield from _mbconv_shapes(f"{block}/mbconv", inputs, width)
            for suffix in ("", "_1"):
                yield from _transformer_shapes(block, suffix, width, window)
            inputs = width
    yield from _layer_norm_shapes("maxvit/final_layer_norm", inputs)
    yield from _dense_shapes("maxvit/cls_head/inner_dense", inputs, inputs)
    yield from _dense_shapes("maxvit/cls_head/logit_dense", inputs, classes)


def random_variables(names_and_shapes: Iterator[tuple[str, tuple[int, ...]]], seed: int = 0) -> Variables:
    """Values that keep activations sane."""
    random = np.random.default_rng(seed)
    variables = {}
    for name, shape in names_and_shapes:
        normal = random.standard_normal(shape)
        leaf = name.rsplit("/", 1)[-1]
        if leaf == "moving_variance":
            normal = np.abs(normal) + 0.5
        elif leaf == "gamma":
            normal = 1 + 0.2 * normal
        elif leaf in ("kernel", "depthwise_kernel", "weight"):
            outputs = shape[-1] if leaf == "kernel" or len(shape) == 2 or "/o/" in name else shape[-1] * shape[-2]
            normal /= (normal.size / outputs) ** 0.5
        elif leaf != "relative_bias":
            normal *= 0.2
        variables[name] = normal
    return variables


def logits(variables: Variables, images_BHWC: Array, depths: Sequence[int], window: int) -> Array:
    """What `MaxViT.call` returns."""
    x = _conv(images_BHWC, variables, f"{STEM}/conv_0", stride=2)
    x = _gelu(_batch_norm(x, variables, f"{STEM}/norm_0"))
    x = _conv(x, variables, f"{STEM}/conv_1")
    for stage, depth in enumerate(depths):
        for number in range(depth):
            block = f"maxvit/block_{stage:0>2d}_{number:0>2d}"
            x = _mbconv(x, variables, f"{block}/mbconv", stride=2 if number == 0 else 1)
            x = _transformer(x, variables, block, "", window)
            x = _transformer(x, variables, block, "_1", window)
    x = _layer_norm(x.mean((1, 2)), variables, "maxvit/final_layer_norm")
    x = np.tanh(_dense(x, variables, "maxvit/cls_head/inner_dense"))
    return _dense(x, variables, "maxvit/cls_head/logit_dense")


def attention(x_BLC: Array, variables: Variables, name: str, height: int, width: int) -> Array:
    """`Attention.call`, for `L = height * width` tokens: its einsums, letter by letter."""
    q, k, v = (
        np.einsum("ABC,CDE->ABDE", x_BLC, variables[f"{name}/{one}/weight"]) + variables[f"{name}/{one}/bias"]
        for one in "qkv"
    )
    q = q * HEAD_SIZE**-0.5
    scores = np.einsum("BSNK,BTNK->BNST", q, k)
    scores = scores + _reindex_2d_einsum_lookup(variables[f"{name}/relative_bias"], height, width)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("BNST,BTNK->BSNK", weights, v)
    return np.einsum("ABCD,CDE->ABE", out, variables[f"{name}/o/weight"]) + variables[f"{name}/o/bias"]


def _reindex_2d_einsum_lookup(relative_bias: Array, height: int, width: int) -> Array:
    indexed = np.einsum("nhw,ixh->nixw", relative_bias, _lookup(height))
    indexed = np.einsum("nixw,jyw->nijxy", indexed, _lookup(width))
    return indexed.reshape(-1, height * width, height * width)


def _lookup(length: int) -> Array:
    lookup = np.zeros((length, length, 2 * length - 1))
    for i in range(length):
        for x in range(length):
            lookup[i, x, x - i + length - 1] = 1
    return lookup


def _transformer(x: Array, variables: Variables, block: str, suffix: str, window: int) -> Array:
    batch, height, width, channels = x.shape
    y = _layer_norm(x, variables, f"{block}/attn_layer_norm{suffix}")
    rows, columns = height // window, width // window
    if suffix:  # the grid comes second
        y = y.reshape(-1, window, rows, window, columns, channels).transpose(0, 2, 4, 1, 3, 5)
    else:
        y = y.reshape(-1, rows, window, columns, window, channels).transpose(0, 1, 3, 2, 4, 5)
    y = attention(y.reshape(-1, window**2, channels), variables, f"{block}/attention{suffix}", window, window)
    y = y.reshape(-1, rows, columns, window, window, channels)
    y = y.transpose(0, 3, 1, 4, 2, 5) if suffix else y.transpose(0, 1, 3, 2, 4, 5)
    x = x + y.reshape(batch, height, width, channels)
    y = _layer_norm(x, variables, f"{block}/ffn_layer_norm{suffix}")
    y = _gelu(_dense(y, variables, f"{block}/ffn{suffix}/expand_dense"))
    return x + _dense(y, variables, f"{block}/ffn{suffix}/shrink_dense")


def _mbconv(x: Array, variables: Variables, name: str, stride: int) -> Array:
    batch, height, width, channels = x.shape
    y = _batch_norm(x, variables, f"{name}/pre_norm")
    y = _gelu(_batch_norm(_conv(y, variables, f"{name}/expand_conv"), variables, f"{name}/expand_norm"))
    y = _depthwise_conv(y, variables, f"{name}/depthwise_conv", stride)
    y = _gelu(_batch_norm(y, variables, f"{name}/depthwise_norm"))
    gate = _conv(y.mean((1, 2), keepdims=True), variables, f"{name}/se/reduce_conv2d")
    gate = _conv(gate * _sigmoid(gate), variables, f"{name}/se/expand_conv2d")
    y = _conv(_sigmoid(gate) * y, variables, f"{name}/shrink_conv")
    shortcut = x
    if stride > 1:
        shortcut = x.reshape(batch, height // stride, stride, width // stride, stride, channels).mean((2, 4))
    if f"{name}/shortcut_conv/kernel" in variables:
        shortcut = _conv(shortcut, variables, f"{name}/shortcut_conv")
    return shortcut + y


def _windows(x: Array, size: int, stride: int) -> Array:
    """`(B, H / stride, W / stride, C, size, size)` with TensorFlow's SAME padding; `stride` divides the sizes."""
    missing = size - stride
    pads = (missing // 2, missing - missing // 2) if missing > 0 else (0, 0)
    x = np.pad(x, ((0, 0), pads, pads, (0, 0)))
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))[:, ::stride, ::stride]


def _conv(x: Array, variables: Variables, name: str, stride: int = 1) -> Array:
    kernel = variables[f"{name}/kernel"]
    y = np.einsum("bhwiyx,yxio->bhwo", _windows(x, kernel.shape[0], stride), kernel, optimize=True)
    return y + variables[f"{name}/bias"] if f"{name}/bias" in variables else y


def _depthwise_conv(x: Array, variables: Variables, name: str, stride: int) -> Array:
    kernel = variables[f"{name}/depthwise_kernel"]
    return np.einsum("bhwcyx,yxcm->bhwc", _windows(x, kernel.shape[0], stride), kernel, optimize=True)


def _dense(x: Array, variables: Variables, name: str) -> Array:
    return x @ variables[f"{name}/weight"] + variables[f"{name}/bias"]


def _batch_norm(x: Array, variables: Variables, name: str) -> Array:
    scaled = (x - variables[f"{name}/moving_mean"]) / np.sqrt(variables[f"{name}/moving_variance"] + 1e-3)
    return scaled * variables[f"{name}/gamma"] + variables[f"{name}/beta"]


def _layer_norm(x: Array, variables: Variables, name: str) -> Array:
    scaled = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return scaled * variables[f"{name}/gamma"] + variables[f"{name}/beta"]


def _gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


Shapes = Iterator[tuple[str, tuple[int, ...]]]


def _conv_shapes(name: str, size: int, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    yield f"{name}/kernel", (size, size, inputs, outputs)
    if bias:
        yield f"{name}/bias", (outputs,)


def _dense_shapes(name: str, inputs: int, outputs: int) -> Shapes:
    yield f"{name}/weight", (inputs, outputs)
    yield f"{name}/bias", (outputs,)


def _layer_norm_shapes(name: str, width: int) -> Shapes:
    for leaf in ("gamma", "beta"):
        yield f"{name}/{leaf}", (width,)


def _batch_norm_shapes(name: str, width: int) -> Shapes:
    for leaf in ("gamma", "beta", "moving_mean", "moving_variance"):
        yield f"{name}/{leaf}", (width,)


def _mbconv_shapes(name: str, inputs: int, width: int) -> Shapes:
    inner = 4 * width
    if inputs != width:
        yield from _conv_shapes(f"{name}/shortcut_conv", 1, inputs, width)
    yield from _batch_norm_shapes(f"{name}/pre_norm", inputs)
    yield from _conv_shapes(f"{name}/expand_conv", 1, inputs, inner, bias=False)
    yield from _batch_norm_shapes(f"{name}/expand_norm", inner)
    yield f"{name}/depthwise_conv/depthwise_kernel", (3, 3, inner, 1)
    yield from _batch_norm_shapes(f"{name}/depthwise_norm", inner)
    yield from _conv_shapes(f"{name}/se/reduce_conv2d", 1, inner, width // 4)
    yield from _conv_shapes(f"{name}/se/expand_conv2d", 1, width // 4, inner)
    yield from _conv_shapes(f"{name}/shrink_conv", 1, inner, width)


def _transformer_shapes(block: str, suffix: str, width: int, window: int) -> Shapes:
    heads = width // HEAD_SIZE
    yield from _layer_norm_shapes(f"{block}/attn_layer_norm{suffix}", width)
    for one in "qkv":
        yield f"{block}/attention{suffix}/{one}/weight", (width, heads, HEAD_SIZE)
        yield f"{block}/attention{suffix}/{one}/bias", (heads, HEAD_SIZE)
    yield f"{block}/attention{suffix}/o/weight", (heads, HEAD_SIZE, width)
    yield f"{block}/attention{suffix}/o/bias", (width,)
    yield f"{block}/attention{suffix}/relative_bias", (heads, 2 * window - 1, 2 * window - 1)
    yield from _layer_norm_shapes(f"{block}/ffn_layer_norm{suffix}", width)
    yield from _dense_shapes(f"{block}/ffn{suffix}/expand_dense", width, 4 * width)
    yield from _dense_shapes(f"{block}/ffn{suffix}/shrink_dense", 4 * width, width)
