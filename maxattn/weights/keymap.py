"""Key maps: which tensors of another library's weights make each tensor of a model here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from maxattn.nn import MaxViT
from maxattn.spec import StageSpec

LAYERS = ("mbconv", "block", "grid")
LEAVES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_IN_LAYER = re.compile(r"stages\.(\d+)\.blocks\.(\d+)\.layers\.(\d+)\.(.+)")

State = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """The names of what one tensor is made of, and what makes it; no names: there is nothing to make it of."""

    names: tuple[str, ...] = ()
    convert: Callable[..., Tensor] = lambda tensor: tensor

    def parts(self, state: State) -> list[Tensor]:
        """What the tensor is made of; nothing if any of it is missing."""
        return [state[name] for name in self.names] if state.keys() >= set(self.names) else []


def renamed(modules: Mapping[str, str]) -> dict[str, Source]:
    """The tensors of modules that have other names there, from ours to theirs, but the same tensors in them."""
    return {f"{ours}.{leaf}": Source((f"{theirs}.{leaf}",)) for ours, theirs in modules.items() for leaf in LEAVES}


@dataclass(frozen=True)
class KeyMap:
    """How another library names the tensors of a MaxViT whose blocks are `mbconv, block, grid`.

    Attributes:
        name: of the naming, for reports.
        marker: a pattern that names of such weights begin with, and no name of other weights does.
        tensors: for "stem", "head" and each kind of layer, our name of a tensor below it and its source there, whose
            names may hold `{stage}` and `{block}`.
        attn_scale: the power -0.5 of what the attention's weights were trained to be scaled by.
        prepare: the weights as `tensors` names them, without what is known to be of no use; or a ValueError that says
            why they cannot be loaded.
    """

    name: str
    marker: re.Pattern[str]
    tensors: Mapping[str, Mapping[str, Source]]
    attn_scale: Literal["head_dim", "width"]
    prepare: Callable[[State], State] = field(default=lambda state: state)

    def sources(self, model: MaxViT) -> dict[str, Source]:
        """The source of each tensor of the model.

        Raises:
            ValueError: if a stage's layers are others than `mbconv, block, grid`.
        """
        for number, stage in enumerate(model.spec.stages):
            if _kinds(stage) != list(LAYERS):
                raise ValueError(
                    f"weights in {self.name}'s naming are of blocks of the layers {', '.join(LAYERS)}, in that order; "
                    f"stage {number} of the model has {_kinds(stage)}: load weights in maxattn's own naming, or "
                    "build the model with the layers in that order"
                )
        return {name: self.source(name) for name in model.state_dict()}

    def source(self, name: str) -> Source:
        """The source of the tensor that we call `name`."""
        match = _IN_LAYER.fullmatch(name)
        part, tensor = (LAYERS[int(match[3])], match[4]) if match else name.split(".", 1)
        stage, block = (int(match[1]), int(match[2])) if match else (0, 0)
        source = self.tensors[part].get(tensor, Source())
        return Source(tuple(one.format(stage=stage, block=block) for one in source.names), source.convert)


def _kinds(stage: StageSpec) -> list[str | list[str]]:
    return [[one.kind for one in layer] if isinstance(layer, tuple) else layer.kind for layer in stage.layers]
