"""`load_weights`: weights of any known naming into a model, all of them or none."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maxattn.inference.network import PLAIN, InferenceMaxViT
from maxattn.nn import MaxAttention, MaxViT
from maxattn.ops import rel_pos
from maxattn.weights.files import OPTIMIZED, SPEC, Weights, read_weights
from maxattn.weights.keymap import KeyMap, Source, State
from maxattn.weights.report import LoadReport, listed
from maxattn.weights.tensorflow import TENSORFLOW
from maxattn.weights.timm import TIMM
from maxattn.weights.torchvision import TORCHVISION

OURS = re.compile(r"stages\.\d+\.blocks\.\d+\.(layers|downsample)\.")
FOREIGN = (TIMM, TORCHVISION, TENSORFLOW)
CLASSIFIER = "head.fc.weight"


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Any], *, strict: bool = True) -> LoadReport:
    """Copy weights into a model that `maxattn.build` made; in maxattn's, timm's, torchvision's or TensorFlow's naming.

    Tables of relative positions for another window are resized bilinearly. Where the weights were trained with
    another attention scale than the model's, as torchvision's were, the ratio is multiplied into q.

    Args:
        model: also compiled, or wrapped for data parallelism. Its parameters keep their dtype and device.
        source: the path of a `.safetensors` file or of a state dict saved by `torch.save`; or a state dict, also nested
            in a checkpoint, also of arrays: `{name: reader.get_tensor(name) for name in
            reader.get_variable_to_shape_map()}` of an official TensorFlow checkpoint.
        strict: whether every tensor of the model, and every one of the weights, must find its counterpart. Otherwise
            the rest is left as it is, and reported.

    Returns:
        What was loaded, resized and left.

    Raises:
        ValueError: for weights that do not fit, or a file that holds none or is refused; the model is then unchanged.
        OSError: for a file that cannot be read.
        TypeError: for a model or a source of another type, or a model made for inference.

    Example:
        >>> import maxattn
        >>> model, larger = maxattn.build("nano", window=4), maxattn.build("nano", window=8)
        >>> report = maxattn.load_weights(larger, model.state_dict())
        >>> report.naming, set(report.resized.values())
        ('maxattn', {((4, 4), (8, 8))})
    """
    network = unwrap(model)
    if isinstance(network, InferenceMaxViT):
        raise TypeError(f"the weights of a network made for inference are folded: {PLAIN}")
    weights = read_weights(source)
    if OPTIMIZED in weights.metadata:
        raise ValueError(f"{weights.source} holds a network made for inference, its weights folded: maxattn.open_model")
    return fit(network, weights, strict)


def fit(model: MaxViT, weights: Weights, strict: bool = True) -> LoadReport:
    """As `load_weights`, of weights that have been read."""
    targets = model.state_dict(keep_vars=True)
    if any(tensor.is_meta for tensor in targets.values()):
        raise ValueError("the model is on the meta device and has no memory for weights: model.to_empty(device=...)")
    values, report = _match(model, targets, weights)
    if not values or (strict and report.problems()):
        raise ValueError(_complaint(model, weights, report))
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)
    return report


def unwrap(model: nn.Module) -> MaxViT:
    """The network below `torch.compile` and data-parallel wrappers.

    Raises:
        TypeError: if there is no `MaxViT` there.
    """
    inner: Any = model
    while not isinstance(inner, MaxViT):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
        if inner is None:
            raise TypeError(f"the model must be one that maxattn.build made, not {type(model).__name__}")
    return inner


def _match(model: MaxViT, targets: Mapping[str, Tensor], weights: Weights) -> tuple[State, LoadReport]:
    """The values of the model's tensors, and what will have happened once they are copied."""
    keymap = _detect(weights)
    state = weights.tensors if keymap is None else _prepared(keymap, weights)
    sources = {name: Source((name,)) for name in targets} if keymap is None else keymap.sources(model)
    factors = _scale_factors(model, keymap)
    values: State = {}
    resized: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {}
    missing: list[str] = []
    mismatched: dict[str, str] = {}
    for name, target in targets.items():
        source = sources[name]
        parts = source.parts(state)
        if not parts:
            missing.append(name)
            continue
        value = _converted(source, parts)
        if value is not None and name.endswith("rel_pos.table") and _differ_in_window(value, target):
            resized[name] = (_window(value), _window(target))
            value = rel_pos.resize(value.double(), _window(target))
        if value is None or value.shape != target.shape or value.is_floating_point() != target.is_floating_point():
            seen = parts if value is None else [value]
            mismatched[name] = f"{' and '.join(map(_facts, seen))}, the model's {_facts(target)}"
            continue
        values[name] = _fold(value, factors[name]) if name in factors else value
    used = {name for source in sources.values() for name in source.names}
    report = LoadReport(
        source=weights.source,
        naming=keymap.name if keymap else "maxattn",
        loaded=tuple(values),
        resized=resized,
        folded={name: factor for name, factor in factors.items() if name in values},
        # PyTorch counts batches for a cumulative average, which no network here takes.
        missing=tuple(name for name in missing if not name.endswith("num_batches_tracked")),
        unexpected=tuple(name for name in state if name not in used),
        mismatched=mismatched,
        ignored=weights.ignored + len(weights.tensors) - len(state),
        num_classes=_num_classes(keymap, state),
    )
    return values, report


def _detect(weights: Weights) -> KeyMap | None:
    """The key map of the weights' naming; None for our own."""
    if any(OURS.match(name) for name in weights.tensors):
        return None
    for keymap in FOREIGN:
        if any(keymap.marker.match(name) for name in weights.tensors):
            return keymap
    raise ValueError(
        f"{weights.source} holds no MaxViT in a naming that is known: maxattn's, timm's, torchvision's or the official "
        f"TensorFlow code's; its {len(weights.tensors)} tensors are {listed(weights.tensors)}"
    )


def _prepared(keymap: KeyMap, weights: Weights) -> State:
    try:
        return keymap.prepare(weights.tensors)
    except ValueError as error:
        raise ValueError(f"{weights.source}: {error}") from None


def _converted(source: Source, parts: list[Tensor]) -> Tensor | None:
    """What is made of the parts; None if their shapes do not allow it."""
    try:
        return source.convert(*parts)
    except (RuntimeError, IndexError):
        return None


def _scale_factors(model: MaxViT, keymap: KeyMap | None) -> dict[str, float]:
    """What q is to be multiplied by, where the weights were trained with another attention scale."""
    factors: dict[str, float] = {}
    for path, module in model.named_modules():
        if keymap is not None and isinstance(module, MaxAttention):
            width = module.proj.out_features
            scale = (width if keymap.attn_scale == "width" else width // module.heads) ** -0.5
            if scale != module.scale:
                factors |= {f"{path}.qkv.{leaf}": scale / module.scale for leaf, _ in module.qkv.named_parameters()}
    return factors


def _fold(qkv: Tensor, factor: float) -> Tensor:
    q, k, v = qkv.double().chunk(3)
    return torch.cat([q * factor, k, v])


def _differ_in_window(table: Tensor, target: Tensor) -> bool:
    """Whether both are tables of as many heads, of different odd sizes."""
    odd = table.ndim == 3 and all(side % 2 for side in table.shape[1:])
    return odd and table.shape[0] == target.shape[0] and table.shape != target.shape


def _window(table: Tensor) -> tuple[int, int]:
    return (table.shape[1] + 1) // 2, (table.shape[2] + 1) // 2


def _num_classes(keymap: KeyMap | None, state: State) -> int | None:
    """Of the weights' classifier; None if they have none."""
    source = Source((CLASSIFIER,)) if keymap is None else keymap.source(CLASSIFIER)
    parts = source.parts(state)
    weight = _converted(source, parts) if parts else None
    return None if weight is None else len(weight)


def _facts(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else f" {tensor.dtype}")


def _complaint(model: MaxViT, weights: Weights, report: LoadReport) -> str:
    lines = [f"{report.source}, in {report.naming}'s naming, does not fit the model; nothing was loaded"]
    classes, fits = report.num_classes, model.spec.num_classes
    if classes is not None and classes != fits:
        lines.append(
            f"the classifier is of {classes} classes, the model's of {fits}: build with num_classes={classes}, or "
            f"{'keep the fresh one' if fits else 'leave it out'} with strict=False"
        )
    lines += report.problems()
    what_fits = ", or load what fits with strict=False" if report.loaded else ""
    lines.append(f"build the model that the weights are of{what_fits}")
    if SPEC in weights.metadata:
        lines.append(f"maxattn.open_model({weights.source!r}) would build it")
    return "\n  ".join(lines)
