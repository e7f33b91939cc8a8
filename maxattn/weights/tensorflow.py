"""The official TensorFlow variables' names (github.com/google-research/maxvit), and their layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from maxattn.weights.keymap import KeyMap, Source, State

_SUFFIX = re.compile(r"(:\d+|/\.ATTRIBUTES/VARIABLE_VALUE)$")
_AVERAGED = "/ExponentialMovingAverage"
_TRAINING = re.compile(r"(^|/)(global_step|save_counter)$|/(Adam|Adam_1|adam_m|adam_v|Momentum)$")


def _conv(kernel_HWIO: Tensor) -> Tensor:
    return kernel_HWIO.permute(3, 2, 0, 1)


def _depthwise(kernel_HWC1: Tensor) -> Tensor:
    return kernel_HWC1.permute(2, 3, 0, 1)


def _dense(weight_IO: Tensor) -> Tensor:
    return weight_IO.t()


def _qkv_weight(*weights_Chd: Tensor) -> Tensor:
    return torch.cat([weight.flatten(1).t() for weight in weights_Chd])


def _qkv_bias(*biases_hd: Tensor) -> Tensor:
    return torch.cat([bias.flatten() for bias in biases_hd])


def _proj_weight(weight_hdC: Tensor) -> Tensor:
    return weight_hdC.flatten(0, 1).t()


def _convs(modules: Mapping[str, str]) -> dict[str, Source]:
    kernels = {f"{ours}.weight": Source((f"{theirs}/kernel",), _conv) for ours, theirs in modules.items()}
    return kernels | {f"{ours}.bias": Source((f"{theirs}/bias",)) for ours, theirs in modules.items()}


def _denses(modules: Mapping[str, str]) -> dict[str, Source]:
    weights = {f"{ours}.weight": Source((f"{theirs}/weight",), _dense) for ours, theirs in modules.items()}
    return weights | {f"{ours}.bias": Source((f"{theirs}/bias",)) for ours, theirs in modules.items()}


def _norms(modules: Mapping[str, str]) -> dict[str, Source]:
    leaves = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
    return {
        f"{ours}.{leaf}": Source((f"{theirs}/{leaves[leaf]}",)) for ours, theirs in modules.items() for leaf in leaves
    }


def _mbconv(there: str) -> dict[str, Source]:
    convs = {
        "shortcut.conv": f"{there}/shortcut_conv",
        "conv1": f"{there}/expand_conv",
        "se.fc1": f"{there}/se/reduce_conv2d",
        "se.fc2": f"{there}/se/expand_conv2d",
        "conv3": f"{there}/shrink_conv",
    }
    norms = {
        "pre_norm": f"{there}/pre_norm",
        "norm1": f"{there}/expand_norm",
        "norm2": f"{there}/depthwise_norm",
    }
    depthwise = {"conv2.weight": Source((f"{there}/depthwise_conv/depthwise_kernel",), _depthwise)}
    return _convs(convs) | _norms(norms) | depthwise


def _attention(block: str, suffix: str) -> dict[str, Source]:
    attention, ffn = f"{block}/attention{suffix}", f"{block}/ffn{suffix}"
    return {
        **_norms({"norm1": f"{block}/attn_layer_norm{suffix}", "norm2": f"{block}/ffn_layer_norm{suffix}"}),
        **_denses({"mlp.fc1": f"{ffn}/expand_dense", "mlp.fc2": f"{ffn}/shrink_dense"}),
        "attn.qkv.weight": Source(tuple(f"{attention}/{one}/weight" for one in "qkv"), _qkv_weight),
        "attn.qkv.bias": Source(tuple(f"{attention}/{one}/bias" for one in "qkv"), _qkv_bias),
        "attn.proj.weight": Source((f"{attention}/o/weight",), _proj_weight),
        "attn.proj.bias": Source((f"{attention}/o/bias",)),
        "attn.rel_pos.table": Source((f"{attention}/relative_bias",)),
    }


def _variables(state: State) -> State:
    """Without the names' scope and suffixes and what only training needs; averaged weights where there are any."""
    plain = {_SUFFIX.sub("", name).removeprefix("maxvit/"): tensor for name, tensor in state.items()}
    plain = {name: tensor for name, tensor in plain.items() if not _TRAINING.search(name)}
    averaged = {name.removesuffix(_AVERAGED): tensor for name, tensor in plain.items() if name.endswith(_AVERAGED)}
    return {name: tensor for name, tensor in plain.items() if not name.endswith(_AVERAGED)} | averaged


_BLOCK = "block_{stage:02}_{block:02}"
TENSORFLOW = KeyMap(
    name="tensorflow",
    marker=re.compile(r"(.*/)?block_\d\d_\d\d/"),
    tensors={
        "stem": _convs({"conv1": "stem/conv_0", "conv2": "stem/conv_1"}) | _norms({"norm": "stem/norm_0"}),
        "mbconv": _mbconv(f"{_BLOCK}/mbconv"),
        "block": _attention(_BLOCK, ""),
        "grid": _attention(_BLOCK, "_1"),
        "head": _norms({"norm": "final_layer_norm"})
        | _denses({"pre_logits": "cls_head/inner_dense", "fc": "cls_head/logit_dense"}),
    },
    attn_scale="head_dim",
    prepare=_variables,
)
