"""torchvision's names of `maxvit_t`."""

from __future__ import annotations

import math
import re

from torch import Tensor

from maxattn.weights.keymap import KeyMap, Source, State, renamed

_BLOCK = "blocks.{stage}.layers.{block}.layers"


def _mbconv(there: str) -> dict[str, Source]:
    return renamed(
        {
            "shortcut.conv": f"{there}.proj.1",
            "pre_norm": f"{there}.layers.pre_norm",
            "conv1": f"{there}.layers.conv_a.0",
            "norm1": f"{there}.layers.conv_a.1",
            "conv2": f"{there}.layers.conv_b.0",
            "norm2": f"{there}.layers.conv_b.1",
            "se.fc1": f"{there}.layers.squeeze_excitation.fc1",
            "se.fc2": f"{there}.layers.squeeze_excitation.fc2",
            "conv3": f"{there}.layers.conv_c",
        }
    )


def _attention(there: str) -> dict[str, Source]:
    modules = renamed(
        {
            "norm1": f"{there}.attn_layer.0",
            "attn.qkv": f"{there}.attn_layer.1.to_qkv",
            "attn.proj": f"{there}.attn_layer.1.merge",
            "norm2": f"{there}.mlp_layer.0",
            "mlp.fc1": f"{there}.mlp_layer.1",
            "mlp.fc2": f"{there}.mlp_layer.3",
        }
    )
    return modules | {"attn.rel_pos.table": Source((f"{there}.attn_layer.1.relative_position_bias_table",), _table)}


def _table(rows: Tensor) -> Tensor:
    """`((2 P - 1) ** 2, heads)` at query minus key, to `(heads, 2 P - 1, 2 P - 1)` at key minus query."""
    side = math.isqrt(rows.shape[0])
    return rows.unflatten(0, (side, side)).permute(2, 0, 1).flip(1, 2)


def _without_indices(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith(".relative_position_index")}


TORCHVISION = KeyMap(
    name="torchvision",
    marker=re.compile(r"blocks\.\d+\.layers\.\d+\.layers\."),
    tensors={
        "stem": renamed({"conv1": "stem.0.0", "norm": "stem.0.1", "conv2": "stem.1.0"}),
        "mbconv": _mbconv(f"{_BLOCK}.MBconv"),
        "block": _attention(f"{_BLOCK}.window_attention"),
        "grid": _attention(f"{_BLOCK}.grid_attention"),
        "head": renamed({"norm": "classifier.2", "pre_logits": "classifier.3", "fc": "classifier.5"}),
    },
    attn_scale="width",
    prepare=_without_indices,
)
