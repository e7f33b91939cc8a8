"""`save_weights` and `open_model`: a model as one file, its spec inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maxattn.build import build
from maxattn.inference import InferenceMaxViT
from maxattn.nn import MaxViT
from maxattn.spec import MaxViTSpec
from maxattn.weights.files import EXTRA, OPTIMIZED, SPEC, VERSION, Weights, read_weights, replacing
from maxattn.weights.load import fit, unwrap


def save_weights(model: nn.Module, path: str | Path, extra: Mapping[str, Any] | None = None) -> None:
    """Write a model that `maxattn.build` made to a `.safetensors` file, its spec and `extra` in the metadata.

    The file appears whole or not at all; what was there is replaced.

    Args:
        model: also compiled, or wrapped for data parallelism; of any dtype, on any device with memory. One made by
            `maxattn.optimize_for_inference` is saved as it is, and opens as such.
        path: a name that ends in `.safetensors`, in a folder that exists.
        extra: what else `open_model` shall return, as JSON can hold it: names of classes, preprocessing.

    Raises:
        ValueError: for another suffix, or a model on the meta device.
        TypeError: for a model of another type, or `extra` that is no JSON.
        OSError: if the file cannot be written.

    Example:
        >>> import maxattn, tempfile
        >>> path = Path(tempfile.mkdtemp()) / "nano.safetensors"
        >>> maxattn.save_weights(maxattn.build("nano"), path, extra={"classes": list("0123456789")})
        >>> model, extra = maxattn.open_model(path)
        >>> model.spec.name, extra["classes"][3]
        ('nano', '3')
    """
    from safetensors.torch import save_file

    from maxattn import __version__

    path, network = Path(path), unwrap(model)
    if path.suffix != ".safetensors":
        raise ValueError(f"weights are written as safetensors: name the file {path.stem}.safetensors, not {path.name}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to; create it first")
    state = network.state_dict()
    if any(tensor.is_meta for tensor in state.values()):
        raise ValueError("the model is on the meta device: it has no weights to save")
    metadata = {SPEC: network.spec.to_json(), VERSION: __version__}
    if isinstance(network, InferenceMaxViT):
        metadata[OPTIMIZED] = "true"
    if extra is not None:
        try:
            metadata[EXTRA] = json.dumps(dict(extra))
        except (TypeError, ValueError) as error:
            raise TypeError(f"extra must be what JSON can hold: {error}") from error
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def open_model(path: str | Path, **overrides: Any) -> tuple[MaxViT, dict[str, Any]]:
    """The model in a file of `save_weights`, in eval mode and in the dtypes it had, and the `extra` saved with it.

    `overrides` are spec fields, as for `maxattn.build`. Tables of relative positions are resized for another window;
    for another `num_classes` the classifier is a fresh one. A file of a network made for inference takes none.

    Raises:
        ValueError: for a file of another kind, or overrides with which its weights do not fit.
        OSError: if it cannot be read.

    Example:
        See `save_weights`.
    """
    weights = read_weights(path)
    if SPEC not in weights.metadata:
        raise ValueError(
            f"{path} has no spec inside, as files of maxattn.save_weights have: build the model its weights are of, "
            f"then maxattn.load_weights(model, {str(path)!r})"
        )
    spec = MaxViTSpec.parse(weights.metadata[SPEC], f"the spec in {path}, of maxattn {weights.metadata.get(VERSION)},")
    if OPTIMIZED in weights.metadata:
        return _open_optimized(spec, weights, overrides), json.loads(weights.metadata.get(EXTRA, "{}"))
    num_classes = overrides.pop("num_classes", spec.num_classes)
    model = build(spec, **overrides)
    _take_dtypes(model, weights)
    fit(model, weights)
    if num_classes != spec.num_classes:
        model.reset_classifier(num_classes)
    return model.eval(), json.loads(weights.metadata.get(EXTRA, "{}"))


def _open_optimized(spec: MaxViTSpec, weights: Weights, overrides: dict[str, Any]) -> MaxViT:
    if overrides:
        raise ValueError(
            f"{weights.source} holds a network made for inference, which takes no overrides, not "
            f"{', '.join(overrides)}: open the plain model's file with them, then maxattn.optimize_for_inference(model)"
        )
    with torch.device("meta"):
        model = InferenceMaxViT(build(spec))
    try:
        model.load_state_dict(weights.tensors, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{weights.source} does not hold what its spec says: {error}") from error
    return model


def _take_dtypes(model: MaxViT, weights: Weights) -> None:
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in weights.tensors:
            tensor.data = tensor.data.to(weights.tensors[name].dtype)
