"""MBConv and what it is made of. NHWC in and out; inside, the same memory is seen as channels-last NCHW."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from maxattn.nn import gpu
from maxattn.nn.basic import ACTIVATIONS, conv_norm, update
from maxattn.nn.checkpointing import Selective

Padding = Literal["same", "symmetric"]


class Conv2d(nn.Conv2d):
    """A convolution whose output has `ceil(size / stride)` pixels: padding "same" (TensorFlow's) or "symmetric"."""

    def __init__(
        self,
        in_width: int,
        width: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: Padding = "same",
        groups: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__(in_width, width, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias)
        self.pads_by_size = padding == "same" and stride > 1

    def forward(self, x: Tensor) -> Tensor:
        if gpu.serves_depthwise(self, x):
            return gpu.convolved(self, x, self._pads(x))
        if not self.pads_by_size:
            return super().forward(x)
        x = F.pad(x, (*self._pads(x)[1], *self._pads(x)[0]))
        return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def _pads(self, x: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """Zeros above and below x, and left and right of it."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if not self.pads_by_size:
            return (kernel // 2,) * 2, (kernel // 2,) * 2
        return same_padding(x.shape[2], kernel, stride), same_padding(x.shape[3], kernel, stride)


class SqueezeExcite(nn.Module):
    """A gate per channel from the image's mean: 1x1, SiLU, 1x1, sigmoid."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(width, hidden, 1)
        self.act = nn.SiLU()
        self.fc2 = nn.Conv2d(hidden, width, 1)

    @property
    def parts(self) -> tuple[nn.Conv2d, nn.Module, nn.Conv2d]:
        return self.fc1, self.act, self.fc2

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.act(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()


class Shortcut(nn.Module):
    """The identity, as far as stride and width allow: pooling where there is a stride, then a 1x1 convolution.

    `(B, C, H, W)` to `(B, width, ceil(H / stride), ceil(W / stride))`. The convolution comes in if the width
    changes, or, with `conv="stride"`, also whenever there is a stride.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        stride: int = 1,
        pool: Literal["avg2", "avg3", "max2", "max3"] = "avg2",
        conv: Literal["width", "stride"] = "width",
    ) -> None:
        super().__init__()
        self.pool = _pool(pool, stride) if stride > 1 else None
        needed = in_width != width or (conv == "stride" and stride > 1)
        self.conv = nn.Conv2d(in_width, width, 1) if needed else None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pool is None else self.pool(x)
        return x if self.conv is None else self.conv(x)


class Downsample(Shortcut):
    """A `Shortcut` on NHWC: what changes stride and width in a stage whose layers cannot."""

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return super().forward(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class MBConv(Selective):
    """Pre-norm inverted bottleneck: norm, 1x1 up, depthwise, squeeze-excitation, 1x1 down, add (MaxViT, appendix A.1).

    Args:
        in_width, width: channels in and out.
        stride: of the depthwise convolution; 1 or 2.
        hidden: channels inside; `4 * width` by default.
        se_hidden: hidden channels of squeeze-excitation; 0 leaves it out; `width // 4` by default.

    Shapes: `(B, H, W, in_width)` to `(B, ceil(H / stride), ceil(W / stride), width)`.

    Example:
        >>> import torch
        >>> MBConv(32, 64, stride=2)(torch.randn(1, 15, 8, 32)).shape
        torch.Size([1, 8, 4, 64])
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        stride: int = 1,
        *,
        hidden: int | None = None,
        kernel_size: int = 3,
        se_hidden: int | None = None,
        act: str = "gelu_tanh",
        padding: Padding = "same",
        shortcut_pool: Literal["avg2", "avg3", "max2", "max3"] = "avg2",
        shortcut_conv: Literal["width", "stride"] = "width",
        norm: str = "batch_norm",
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.1,
        layer_scale: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.downsamples = stride > 1
        hidden = 4 * width if hidden is None else hidden
        se_hidden = max(1, width // 4) if se_hidden is None else se_hidden
        self.shortcut = Shortcut(in_width, width, stride, shortcut_pool, shortcut_conv)
        self.pre_norm = conv_norm(norm, in_width, norm_eps, norm_momentum)
        self.conv1 = nn.Conv2d(in_width, hidden, 1, bias=False)
        self.norm1 = conv_norm(norm, hidden, norm_eps, norm_momentum)
        self.conv2 = Conv2d(hidden, hidden, kernel_size, stride, padding, groups=hidden, bias=False)
        self.norm2 = conv_norm(norm, hidden, norm_eps, norm_momentum)
        self.act = ACTIVATIONS[act]()
        self.se = SqueezeExcite(hidden, se_hidden) if se_hidden else None
        self.conv3 = nn.Conv2d(hidden, width, 1)
        self.update = update(width, layer_scale, drop_path)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x = x_BHWC.permute(0, 3, 1, 2)
        layers = (self.pre_norm, self.conv1, self.norm1, self.act)
        if self.downsamples and gpu.serves_expanded(*layers, x):
            y = self.conv2(gpu.expanded(*layers, x))  # type: ignore[arg-type]
        else:
            y = self.part(self._filtered, self.part(self._expanded, x))
        y = self.part(self._projected, y)
        return self.shortcut(x).permute(0, 2, 3, 1) + self.update(y.permute(0, 2, 3, 1))

    def _expanded(self, x: Tensor) -> Tensor:
        return self.conv1(self.normed(self.pre_norm, gpu.IDENTITY, x))

    def _filtered(self, y: Tensor) -> Tensor:
        return self.conv2(self.normed(self.norm1, self.act, y))

    def _projected(self, y: Tensor) -> Tensor:
        if self.se is None:
            return self.conv3(self.normed(self.norm2, self.act, y))
        if type(self.se) is SqueezeExcite and gpu.serves_squeeze_excite(
            self.norm2, self.act, self.se, self.se.parts, self.conv3, y
        ):
            return gpu.squeeze_excite_conv(self.norm2, self.act, self.se.parts, self.conv3, y)  # type: ignore[arg-type]
        if gpu.serves_batch_norm(self.norm2, self.act, y):
            return self.conv3(self.se(gpu.batch_norm_act(self.norm2, self.act, y)))  # type: ignore[arg-type]
        return self.conv3(self.light(self._gated, y))

    def _gated(self, y: Tensor) -> Tensor:
        return self.se(self.act(self.norm2(y)))  # type: ignore[misc]


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: as much as `ceil(size / stride)` windows need, the odd pixel at the end."""
    missing = (-(-size // stride) - 1) * stride + kernel - size
    return max(missing, 0) // 2, max(missing, 0) - max(missing, 0) // 2


def _pool(name: str, stride: int) -> nn.Module:
    side = int(name[-1])
    if name.startswith("max"):
        return nn.MaxPool2d(side, stride, side // 2 if side % 2 else 0, ceil_mode=side % 2 == 0)
    if side % 2:
        return nn.AvgPool2d(side, stride, side // 2)
    return nn.AvgPool2d(side, stride, ceil_mode=True, count_include_pad=False)
