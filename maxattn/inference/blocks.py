"""Layers of folded parts. Where the kernels of a GPU serve, they fuse what lies between the parts; elsewhere they are
the layers that they are made from.
"""

# mypy: disable-error-code="operator,union-attr"
# Parts have the types of those whose places they have taken.

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from maxattn.inference import gpu
from maxattn.inference.fixed import take_over
from maxattn.inference.layers import FusedAvgPool2d
from maxattn.nn import AttentionLayer, MBConv, Stem
from maxattn.nn.gpu import unchanged
from maxattn.ops.max_sa import max_sa


class FusedStem(Stem):
    """A stem in two kernels, which read the image as it lies and add the biases."""

    def __init__(self, stem: Stem) -> None:
        take_over(self, stem)
        self.fuses = self.conv1.gpu_kernel == self.conv2.gpu_kernel == "convolution" and _folded(stem.norm, stem.act)

    def forward(self, x: Tensor) -> Tensor:
        if not (self.fuses and gpu.serves(x, self.conv1.weight)):
            return super().forward(x)
        return self.conv2(self.conv1(x)).permute(0, 2, 3, 1)


class FusedMBConv(MBConv):
    """An MBConv in three kernels and squeeze-and-excitation's small products.

    The depthwise one takes the mean over pixels along with it, and the last 1x1 the gate and the residual: what is
    widest is written twice and read twice.
    """

    def __init__(self, layer: MBConv) -> None:
        take_over(self, layer)
        kernels = [conv.gpu_kernel for conv in (self.conv1, self.conv2, self.conv3)]
        norms = (self.pre_norm, self.norm1, self.norm2, self.act)
        self.fuses = kernels == ["pointwise", "depthwise", "pointwise"] and _folded(*norms)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        if not (self.fuses and gpu.serves(x_BHWC, self.conv1.weight)):
            return super().forward(x_BHWC)
        y, mean = self.conv2.depthwise(self.conv1.pointwise(x_BHWC), pooled=self.se is not None)
        shortcut = self.shortcut(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.conv3.pointwise(y, None if mean is None else self._gate(mean), shortcut)

    def _gate(self, mean: Tensor) -> Tensor:
        """`(B, C)`: products of so few rows are cuBLAS's."""
        fc1, fc2 = self.se.fc1, self.se.fc2
        hidden = fc1.act(F.linear(mean, fc1.weight.flatten(1), fc1.bias))
        return F.linear(hidden, fc2.weight.flatten(1), fc2.bias).sigmoid()


class FusedAttentionLayer(AttentionLayer):
    """An attention layer in which norms are part of the product after them, and residuals of the one before."""

    def __init__(self, layer: AttentionLayer) -> None:
        take_over(self, layer)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        attn, mlp = self.attn, self.mlp
        as_they_are = all(unchanged(one) for one in (attn, mlp) if one is not None)
        if not as_they_are or not gpu.serves(x_BHWC, attn.proj.weight):
            return super().forward(x_BHWC)
        qkv_BHW3hd = attn.qkv.after_norm(self.norm1, x_BHWC).unflatten(-1, (3, attn.heads, -1))
        bias = None if attn.rel_pos is None else attn.rel_pos()
        out_BHWhd = max_sa(qkv_BHW3hd, attn.axis, attn.window, bias, attn.scale, 0.0, attn.backend)
        x_BHWC = attn.proj.added_to(x_BHWC, out_BHWhd.flatten(-2))
        if mlp is None:
            return x_BHWC
        return mlp.fc2.added_to_mlp(x_BHWC, self.norm2, mlp.fc1)


FUSED: dict[type[nn.Module], type[nn.Module]] = {
    Stem: FusedStem,
    MBConv: FusedMBConv,
    AttentionLayer: FusedAttentionLayer,
    nn.AvgPool2d: FusedAvgPool2d,
}


def _folded(*parts: nn.Module) -> bool:
    """Whether nothing is left of these."""
    return all(isinstance(part, nn.Identity) for part in parts)
