"""A plain network's modules made into those for inference, in place: its leaves first, then the layers of them."""

# mypy: disable-error-code="assignment"
# Modules take the places of others that are called alike.

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maxattn.inference.blocks import FUSED
from maxattn.inference.fixed import FIXED_NORMS, Fixed
from maxattn.inference.fold import Affine, Weights, split
from maxattn.inference.layers import FusedConv2d, FusedLinear
from maxattn.nn import AttentionLayer, Head, MaxViT, MBConv, RelPosLogMLP, RelPosTable, Shortcut, SqueezeExcite, Stem
from maxattn.nn.basic import LayerScale


class GatheredBias(Fixed):
    """The relative position bias of one window, gathered: `forward()` gives `(heads, N, N)`.

    Its rows start at multiples of 8 values, as fused kernels read them.
    """

    def __init__(self, rel_pos: RelPosTable | RelPosLogMLP) -> None:
        super().__init__()
        bias_hNN = rel_pos().detach()
        self.tokens = bias_hNN.shape[-1]
        self.bias: Tensor
        self.register_buffer("bias", F.pad(bias_hNN, (0, -self.tokens % 8)))

    def forward(self) -> Tensor:
        return self.bias[..., : self.tokens]


def convert(model: MaxViT) -> None:
    """Fold norms and layer scales into weights, and activations into what they follow; gather biases; drop dropout."""
    for module in list(model.modules()):
        if isinstance(module, Stem):
            _stem(module)
        elif isinstance(module, MBConv):
            _mbconv(module)
        elif isinstance(module, SqueezeExcite):
            module.fc1 = _conv(module.fc1, module.act)
            module.act = nn.Identity()
            module.fc2 = _conv(module.fc2)
        elif isinstance(module, Shortcut):
            module.conv = None if module.conv is None else _conv(module.conv)
        elif isinstance(module, AttentionLayer):
            _attention_layer(module)
        elif isinstance(module, Head):
            module.pre_logits = None if module.pre_logits is None else _linear(module.pre_logits)
            module.drop = nn.Identity()
            module.fc = None if module.fc is None else _linear(module.fc)
    successors = FUSED | FIXED_NORMS
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if type(part) in successors:
                setattr(module, name, successors[type(part)](part))


def _stem(stem: Stem) -> None:
    stem.conv1, stem.norm, stem.act = _conv_norm_act(stem.conv1, _weights(stem.conv1), stem.norm, stem.act)
    stem.conv2 = _conv(stem.conv2)


def _mbconv(layer: MBConv) -> None:
    layer.pre_norm, affine = split(layer.pre_norm)
    weights, act = _weights(layer.conv1).after(affine), layer.act
    layer.conv1, layer.norm1, layer.act = _conv_norm_act(layer.conv1, weights, layer.norm1, act)
    layer.conv2, layer.norm2, layer.act = _conv_norm_act(layer.conv2, _weights(layer.conv2), layer.norm2, act)
    layer.conv3 = FusedConv2d(layer.conv3, _scaled(_weights(layer.conv3), layer.update))
    layer.update = nn.Sequential()


def _attention_layer(layer: AttentionLayer) -> None:
    attention = layer.attn
    layer.norm1, affine = split(layer.norm1)
    attention.qkv = FusedLinear(_weights(attention.qkv).after(affine))
    attention.rel_pos = None if attention.rel_pos is None else GatheredBias(attention.rel_pos)
    attention.attn_drop = 0.0
    attention.proj = FusedLinear(_scaled(_weights(attention.proj), layer.update1))
    attention.proj_drop = nn.Identity()
    layer.update1 = nn.Sequential()
    if layer.mlp is None or layer.norm2 is None:
        return
    layer.norm2, affine = split(layer.norm2)
    layer.mlp.fc1 = FusedLinear(_weights(layer.mlp.fc1).after(affine), layer.mlp.act)
    layer.mlp.act = nn.Identity()
    layer.mlp.drop = nn.Dropout(0.0)
    layer.mlp.fc2 = FusedLinear(_scaled(_weights(layer.mlp.fc2), layer.update2))
    layer.update2 = nn.Sequential()


def _conv_norm_act(
    conv: nn.Conv2d, weights: Weights, norm: nn.Module, act: nn.Module
) -> tuple[FusedConv2d, nn.Module, nn.Module]:
    """Only a batch norm can be folded into the convolution before it; others stay, and so does what follows them."""
    if not isinstance(norm, nn.BatchNorm2d):
        return FusedConv2d(conv, weights), norm, act
    nothing, affine = split(norm)
    return FusedConv2d(conv, weights.before(affine), act), nothing, nn.Identity()


def _conv(conv: nn.Conv2d, act: nn.Module | None = None) -> FusedConv2d:
    return FusedConv2d(conv, _weights(conv), act)


def _linear(linear: nn.Linear) -> FusedLinear:
    return FusedLinear(_weights(linear))


def _weights(module: nn.Conv2d | nn.Linear) -> Weights:
    return Weights(module.weight.detach(), None if module.bias is None else module.bias.detach())


def _scaled(weights: Weights, update: nn.Sequential | None) -> Weights:
    """With the layer scale of a residual's `update`, if there is one, in them."""
    for module in update or ():
        if isinstance(module, LayerScale):
            scale = module.scale.detach().double()
            weights = weights.before(Affine(scale, torch.zeros_like(scale)))
    return weights
