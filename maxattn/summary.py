"""Parameters and FLOPs of a spec, counted on the meta device: no weight is allocated."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from maxattn.build import build
from maxattn.nn import AttentionLayer, Block, MaxViT, MBConv
from maxattn.ops.dispatch import use_backend
from maxattn.spec import MaxViTSpec, pair


@dataclass(frozen=True)
class Row:
    """One layer: its name in the model, what it is, its output's size in pixels and width, parameters and FLOPs."""

    name: str
    kind: str
    size: tuple[int, int]
    width: int
    params: int
    flops: int


@dataclass(frozen=True)
class Summary:
    """What a network costs. FLOPs as papers count them: one multiply-add of a product of matrices is one."""

    name: str
    img_size: tuple[int, int]
    params: int
    flops: int
    rows: tuple[Row, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        cells = [("layer", "kind", "output", "params", "MFLOPs")]
        cells += [
            (
                row.name,
                row.kind,
                f"{row.size[0]}x{row.size[1]}x{row.width}",
                f"{row.params:,}",
                f"{row.flops / 1e6:,.1f}",
            )
            for row in self.rows
        ]
        cells.append(("total", "", "", f"{self.params:,}", f"{self.flops / 1e6:,.1f}"))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        size = f"{self.img_size[0]}x{self.img_size[1]}"
        title = f"{self.name} at {size}: {self.params:,} parameters, {self.flops / 1e9:.2f} GFLOPs"
        lines = (
            "  ".join(
                cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
            for line in cells
        )
        return "\n".join([title, *lines])


def summarize(spec: MaxViTSpec, img_size: int | tuple[int, int] | None = None) -> Summary:
    """As `MaxViTSpec.summary`."""
    height, width = pair(spec.img_size if img_size is None else img_size)
    with torch.device("meta"):
        model = build(spec, backend=None).eval()
        image = torch.empty(1, spec.in_chans, height, width)
    rows: list[Row] = []
    with use_backend("sdpa"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        for name, module in _layers(model):
            _watch(name, module, counter, rows)
        model(image)
    params = sum(parameter.numel() for parameter in model.parameters())
    return Summary(spec.name, (height, width), params, counter.get_total_flops() // 2, tuple(rows))


def _layers(model: MaxViT) -> list[tuple[str, nn.Module]]:
    """The stem, each layer of each block, what downsamples before them, and the head."""
    found: list[tuple[str, nn.Module]] = [("stem", model.stem)]
    for name, block in model.named_modules():
        if isinstance(block, Block):
            parts = [("downsample", block.downsample)] if block.downsample is not None else []
            parts += [(f"layers.{index}", layer) for index, layer in enumerate(block.layers)]
            found += [(f"{name}.{part}", module) for part, module in parts if module is not None]
    return [*found, ("head", model.head)]


def _watch(name: str, module: nn.Module, counter: FlopCounterMode, rows: list[Row]) -> None:
    """Have a row written when `module` has run."""
    before = 0

    def start(*_: Any) -> None:
        nonlocal before
        before = counter.get_total_flops()

    def stop(module: nn.Module, _: Any, output: Tensor) -> None:
        size = (output.shape[1], output.shape[2]) if output.ndim == 4 else (1, 1)
        params = sum(parameter.numel() for parameter in module.parameters())
        flops = (counter.get_total_flops() - before) // 2
        rows.append(Row(name, _kind(module), size, output.shape[-1], params, flops))

    module.register_forward_pre_hook(start)
    module.register_forward_hook(stop)


def _kind(module: nn.Module) -> str:
    if isinstance(module, AttentionLayer):
        return module.attn.axis
    return "mbconv" if isinstance(module, MBConv) else type(module).__name__.lower()
