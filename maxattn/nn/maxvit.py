"""The network: stem, stages of blocks, head. Assembled by `maxattn.build`; NHWC inside, NCHW at its edges."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from maxattn.nn.attention import MaxAttention
from maxattn.nn.checkpointing import Checkpointing, Selective, recomputed
from maxattn.nn.head import Head
from maxattn.nn.init import init_weights
from maxattn.nn.rel_pos import RelPosTable

if TYPE_CHECKING:
    from maxattn.spec import MaxViTSpec


class Parallel(nn.Module):
    """Layers that see the same input; their updates are summed: `x + sum(layer(x) - x)`."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return sum((layer(x) for layer in self.layers), (1 - len(self.layers)) * x)


class Block(nn.Module):
    """Layers in sequence; `downsample`, if there is one, comes first."""

    def __init__(self, layers: Iterable[nn.Module], downsample: nn.Module | None = None) -> None:
        super().__init__()
        self.downsample = downsample
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.downsample is None else self.downsample(x)
        for layer in self.layers:
            x = layer(x)
        return x


class Stage(nn.Module):
    """Blocks at one resolution, the first of which changes width and resolution."""

    def __init__(self, blocks: Iterable[Block], checkpointing: Checkpointing = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.checkpointing = checkpointing
        for module in self.modules():
            if isinstance(module, Selective):
                module.selective = checkpointing == "selective"

    def forward(self, x: Tensor) -> Tensor:
        whole = self.checkpointing is True and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            x = recomputed(block, block, x) if whole else block(x)
        return x


class MaxViT(nn.Module):
    """A MaxViT network (Tu et al., ECCV 2022), made by `maxattn.build`; `spec` is what it was built from.

    `forward` takes images `(B, in_chans, H, W)` of any size and returns logits `(B, num_classes)`.

    Example:
        >>> import torch, maxattn
        >>> model = maxattn.build("nano", num_classes=7).eval()
        >>> model(torch.randn(2, 3, 40, 52)).shape
        torch.Size([2, 7])
        >>> [tuple(x.shape[1:]) for x in model.features(torch.randn(2, 3, 40, 52))]
        [(16, 20, 26), (24, 20, 26), (48, 10, 13)]
    """

    def __init__(self, stem: nn.Module, stages: Sequence[Stage], head: Head, spec: MaxViTSpec) -> None:
        super().__init__()
        self.spec = spec
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self._depths = [len(stage.blocks) for stage in stages]
        self.head = head
        init_weights(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self._last_map(x))

    def forward_features(self, x: Tensor) -> Tensor:
        """The last feature map `(B, C, H', W')` of images `(B, in_chans, H, W)`."""
        return self._last_map(x).permute(0, 3, 1, 2)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits of `forward_features`'s result, or what comes before the last Linear: `(B, C)`."""
        return self.head(features.permute(0, 2, 3, 1), pre_logits)

    def features(self, x: Tensor) -> list[Tensor]:
        """The feature maps after the stem and after each stage, `(B, C, H', W')`: strides 2 to 32 for the presets."""
        x = self._stem(x)
        maps = [x]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return [x_BHWC.permute(0, 3, 1, 2) for x_BHWC in maps]

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last Linear by a fresh one for `num_classes`; 0 leaves it out."""
        self.spec = self.spec.override(num_classes=num_classes)
        self.head.reset(num_classes)
        if self.head.fc is not None:
            init_weights(self.head.fc)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, window: int | tuple[int, int] | str | None = None
    ) -> None:
        """Size the windows for other images; any size may be fed without this.

        Windows given in the spec as `img/K` follow `img_size`, others stay unless `window` sets them all (it may be
        `img/K` too). Tables of relative positions are resized bilinearly, and are new parameters then: make the
        optimizer afterwards.
        """
        spec = self.spec if img_size is None else self.spec.override(img_size=img_size)
        spec = spec if window is None else spec.override_everywhere(window=window)
        for module, layer in zip(self.attentions(), spec.attention_layers(), strict=True):
            module.set_window(layer.window)  # type: ignore[arg-type]  # a pair, in a settled layer
        self.spec = spec

    def set_grad_checkpointing(self, enable: Checkpointing = True) -> None:
        """What training computes again in the backward pass instead of keeping it; gradients are the same.

        Args:
            enable: True: all but each block's input. "selective": norms, activations and gates, all that costs little.
                False: nothing. This is for the stem and every stage; the spec's `grad_checkpointing` says it of each.
        """
        self.spec = self.spec.override_everywhere(grad_checkpointing=enable)
        for module in self.modules():
            if isinstance(module, Stage):
                module.checkpointing = enable
            elif isinstance(module, Selective):
                module.selective = enable == "selective"

    def attentions(self) -> Iterator[MaxAttention]:
        """Every Max-SA module, in order."""
        return (module for module in self.modules() if isinstance(module, MaxAttention))

    def no_weight_decay(self) -> set[str]:
        """Names of the relative position tables; `param_groups` spares them, biases and norms."""
        return {f"{name}.table" for name, module in self.named_modules() if isinstance(module, RelPosTable)}

    def param_groups(
        self, lr: float = 1e-3, weight_decay: float = 0.05, layer_decay: float = 1.0
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: `params`, `lr` and `weight_decay`, and the `names` of the parameters.

        The learning rate falls by a factor `layer_decay` for each block away from the head (BEiT, section 3.1). No
        weight decay for biases, norms, layer scales and relative position tables.

        Example:
            >>> import torch, maxattn
            >>> groups = maxattn.build("nano").param_groups(lr=1e-3, layer_decay=0.8)
            >>> optimizer = torch.optim.AdamW(groups)
            >>> sorted({round(group["lr"], 6) for group in groups})
            [0.000512, 0.00064, 0.0008, 0.001]
        """
        spared, depth = self.no_weight_decay(), 1 + sum(self._depths)
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not parameter.requires_grad:
                continue
            layer, decayed = self._depth_of(name, depth), parameter.ndim > 1 and name not in spared
            settings = {"lr": lr * layer_decay ** (depth - layer), "weight_decay": weight_decay if decayed else 0.0}
            group = groups.setdefault((layer, decayed), {"params": [], "names": [], **settings})
            group["params"].append(parameter)
            group["names"].append(name)
        return list(groups.values())

    def _depth_of(self, name: str, depth: int) -> int:
        """0 for the stem, then 1 for the first block and so on; `depth` for the head."""
        part, *rest = name.split(".")
        if part != "stages":
            return 0 if part == "stem" else depth
        return 1 + sum(self._depths[: int(rest[0])]) + int(rest[2])

    def _stem(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] != self.spec.in_chans:
            raise ValueError(f"images must be (B, {self.spec.in_chans}, H, W), not {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"images must be of a floating point dtype, not {x.dtype}: scale and normalise them first")
        if torch.compiler.is_compiling():
            from maxattn.ops.tracing import exporting

            # Attention makes the sides constants of a compiled graph; as symbols until there they slow the compiler.
            if not exporting():
                _ = index(x.shape[2]), index(x.shape[3])
        return self.stem(x)

    def _last_map(self, x: Tensor) -> Tensor:
        """`(B, H', W', C)`."""
        x = self._stem(x)
        for stage in self.stages:
            x = stage(x)
        return x
