"""timm's names of the `maxvit_*_tf` networks, which are the official weights."""

from __future__ import annotations

import re

from maxattn.weights.keymap import KeyMap, Source, State, renamed

_BLOCK = "stages.{stage}.blocks.{block}"


def _mbconv(there: str) -> dict[str, Source]:
    return renamed(
        {
            "shortcut.conv": f"{there}.shortcut.expand",
            "pre_norm": f"{there}.pre_norm",
            "conv1": f"{there}.conv1_1x1",
            "norm1": f"{there}.norm1",
            "conv2": f"{there}.conv2_kxk",
            "norm2": f"{there}.norm2",
            "se.fc1": f"{there}.se.fc1",
            "se.fc2": f"{there}.se.fc2",
            "conv3": f"{there}.conv3_1x1",
        }
    )


def _attention(there: str) -> dict[str, Source]:
    same = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    table = {"attn.rel_pos.table": Source((f"{there}.attn.rel_pos.relative_position_bias_table",))}
    return renamed({module: f"{there}.{module}" for module in same}) | table


def _only_tf(state: State) -> State:
    # Of timm's configurations only the `_tf` ones have biases in the stem.
    if "stem.conv1.bias" not in state:
        raise ValueError(
            "of timm's networks the maxvit_*_tf_* can be loaded; these weights are of another (they have no "
            "stem.conv1.bias), which packs q, k and v in another order and has other convolutions and norms"
        )
    return state


TIMM = KeyMap(
    name="timm",
    marker=re.compile(r"stages\.\d+\.blocks\.\d+\.(conv|attn_block|attn_grid)\."),
    tensors={
        "stem": renamed({"conv1": "stem.conv1", "norm": "stem.norm1", "conv2": "stem.conv2"}),
        "mbconv": _mbconv(f"{_BLOCK}.conv"),
        "block": _attention(f"{_BLOCK}.attn_block"),
        "grid": _attention(f"{_BLOCK}.attn_grid"),
        "head": renamed({"norm": "head.norm", "pre_logits": "head.pre_logits.fc", "fc": "head.fc"}),
    },
    attn_scale="head_dim",
    prepare=_only_tf,
)
