"""`build(spec)`: the only road from a spec to modules."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from maxattn.nn import AttentionLayer, Block, Downsample, Head, MaxAttention, MaxViT, MBConv, Parallel, Stage, Stem
from maxattn.nn.basic import conv_norm

if TYPE_CHECKING:
    from maxattn.spec import AttentionSpec, MaxViTSpec, MBConvSpec, StageSpec


def build(spec: str | Path | dict[str, Any] | MaxViTSpec, **overrides: Any) -> MaxViT:
    """A network from a preset's name, a `MaxViTSpec`, plain data, or the path of a YAML or JSON file.

    `overrides` are spec fields by plain or dotted name, as in `MaxViTSpec.override`. The weights are the paper's
    random initialisation; `maxattn.load_weights` loads others.

    Raises:
        ValueError: for an unknown preset or an invalid field, naming what would work.
        FileNotFoundError: for a path with a spec's suffix that is no file.

    Example:
        >>> import maxattn
        >>> model = maxattn.build("nano", num_classes=5, window=7, **{"stages.0.depth": 2})
        >>> model.spec.num_classes, len(model.stages[0].blocks)
        (5, 2)
    """
    from maxattn.presets import load_spec

    spec = load_spec(spec)
    spec = spec.override(**overrides) if overrides else spec
    full = spec.resolved()
    stem = Stem(
        full.in_chans,
        full.stem.width,
        conv_norm(full.conv_norm, full.stem.width, full.conv_norm_eps, full.batch_norm_momentum),
        kernel_size=full.stem.kernel_size,
        stride=full.stem.stride,
        first_bias=full.stem.first_bias,
        act=full.act,
        padding=full.padding,
    )
    stem.selective = full.grad_checkpointing == "selective"
    rates = _drop_path_rates(full)
    widths = [full.stem.width, *(stage.width for stage in full.stages)]
    stages = [_stage(stage, widths[number], rates[number], full.backend) for number, stage in enumerate(full.stages)]
    hidden = (full.head.hidden or widths[-1]) if full.head.kind == "mlp" else None
    head = Head(
        widths[-1],
        full.num_classes,
        hidden=hidden,
        dropout=full.head.dropout,
        bias=full.head.bias,
        norm_eps=full.attn_norm_eps,
    )
    return MaxViT(stem, stages, head, spec)


def _drop_path_rates(spec: MaxViTSpec) -> list[list[float]]:
    """A rate for each block of each stage, growing linearly from 0 to `drop_path_rate`."""
    last = max(1, sum(stage.depth for stage in spec.stages) - 1)
    blocks = count()
    return [[spec.drop_path_rate * next(blocks) / last for _ in range(stage.depth)] for stage in spec.stages]


def _stage(stage: StageSpec, in_width: int, rates: list[float], backend: str | None) -> Stage:
    carrier = stage.downsampling_layer()
    blocks = []
    for number, rate in enumerate(rates):
        changes = number == 0 and (stage.stride > 1 or in_width != stage.width)
        downsample = None
        if changes and carrier is None:
            downsample = Downsample(in_width, stage.width, stage.stride, stage.shortcut_pool, stage.shortcut_conv)
        width = in_width if changes and carrier is not None else stage.width
        layers: list[nn.Module] = []
        for index, layer in enumerate(stage.layers):
            if isinstance(layer, tuple):
                layers.append(Parallel(_layer(one, width, width, 1, rate, backend) for one in layer))
            elif changes and index == carrier:
                layers.append(_layer(layer, width, stage.width, stage.stride, rate, backend))
                width = stage.width
            else:
                layers.append(_layer(layer, width, width, 1, rate, backend))
        blocks.append(Block(layers, downsample))
    return Stage(blocks, stage.grad_checkpointing)


def _layer(
    layer: MBConvSpec | AttentionSpec, in_width: int, width: int, stride: int, rate: float, backend: str | None
) -> nn.Module:
    drop_path = rate if layer.drop_path is None else layer.drop_path
    if layer.kind == "mbconv":
        return MBConv(
            in_width,
            width,
            stride,
            hidden=max(1, int((width if layer.expand_from == "output" else in_width) * layer.expansion)),
            kernel_size=layer.kernel_size,
            se_hidden=max(1, int(width * layer.se_ratio)) if layer.se_ratio else 0,
            act=layer.act,
            padding=layer.padding,
            shortcut_pool=layer.shortcut_pool,
            shortcut_conv=layer.shortcut_conv,
            norm=layer.conv_norm,
            norm_eps=layer.conv_norm_eps,
            norm_momentum=layer.batch_norm_momentum,
            layer_scale=layer.layer_scale,
            drop_path=drop_path,
        )
    attention = MaxAttention(
        width,
        layer.kind,
        layer.window,  # type: ignore[arg-type]  # a pair, in a resolved spec
        head_dim=layer.head_dim,
        rel_pos=layer.rel_pos,
        rel_pos_hidden=layer.rel_pos_hidden,
        scale=layer.attn_scale,
        qkv_bias=layer.qkv_bias,
        attn_drop=layer.attn_drop,
        proj_drop=layer.proj_drop,
        backend=backend,
    )
    return AttentionLayer(
        attention,
        mlp_ratio=layer.mlp_ratio,
        act=layer.act,
        norm=layer.attn_norm,
        norm_eps=layer.attn_norm_eps,
        layer_scale=layer.layer_scale,
        drop_path=drop_path,
        proj_drop=layer.proj_drop,
    )
