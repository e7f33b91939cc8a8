"""The stem: two convolutions from the image to the first feature map."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from maxattn.nn.basic import ACTIVATIONS
from maxattn.nn.checkpointing import Selective
from maxattn.nn.conv import Conv2d, Padding


class Stem(Selective):
    """Convolution, norm, activation, convolution: image `(B, in_chans, H, W)` to NHWC of `ceil(size / stride)`."""

    def __init__(
        self,
        in_chans: int,
        width: int,
        norm: nn.Module,
        *,
        kernel_size: int = 3,
        stride: int = 2,
        first_bias: bool = True,
        act: str = "gelu_tanh",
        padding: Padding = "same",
    ) -> None:
        super().__init__()
        self.conv1 = Conv2d(in_chans, width, kernel_size, stride, padding, bias=first_bias)
        self.norm = norm
        self.act = ACTIVATIONS[act]()
        self.conv2 = Conv2d(width, width, kernel_size, 1, padding)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x.contiguous(memory_format=torch.channels_last))
        return self.part(self._second, y).permute(0, 2, 3, 1)

    def _second(self, y: Tensor) -> Tensor:
        return self.conv2(self.normed(self.norm, self.act, y))
