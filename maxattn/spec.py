"""Specs: a whole network as frozen, validated data.

A setting is looked up at the layer, then at its stage, then at the model: what the layer sets wins, what nobody sets
has the default. So one line at the top changes every layer, and one line at a layer changes just that one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    NonNegativeInt,
    PositiveInt,
    SerializerFunctionWrapHandler,
    Tag,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from maxattn.settings import (
    AttentionSettings,
    CommonSettings,
    ConvSettings,
    LayerSettings,
    OddInt,
    Rate,
    Size,
    Spec,
    not_empty,
)

if TYPE_CHECKING:
    from maxattn.summary import Summary

Checkpointing = Literal[False, True, "selective"]


class _Layer(CommonSettings):
    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> Any:
        data = {"kind": self.kind, **self._only_what_is_set(handler)}  # type: ignore[attr-defined]
        return data if len(data) > 1 else data["kind"]

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        long = handler.resolve_ref_schema(handler(core))
        kind = {key: value for key, value in long["properties"]["kind"].items() if key in ("const", "enum")}
        return {"anyOf": [kind, {**long, "required": ["kind"]}]}


class MBConvSpec(_Layer, ConvSettings):
    """Inverted bottleneck with depthwise convolution and squeeze-excitation."""

    kind: Literal["mbconv"] = "mbconv"


class AttentionSpec(_Layer, AttentionSettings):
    """Max-SA over one axis, then an MLP."""

    kind: Literal["block", "grid"]


def _layer_tag(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "parallel"
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", value)
    return {"mbconv": "conv", "block": "attention", "grid": "attention"}.get(kind, "") if isinstance(kind, str) else ""


def _discriminator(allowed: str) -> Discriminator:
    return Discriminator(_layer_tag, custom_error_type="layer_kind", custom_error_message=allowed)


def _expand_name(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


SingleLayer = Annotated[
    Annotated[MBConvSpec, BeforeValidator(_expand_name), Tag("conv")]
    | Annotated[AttentionSpec, BeforeValidator(_expand_name), Tag("attention")],
    _discriminator("a layer is 'mbconv', 'block' or 'grid', or a mapping with that as its 'kind'"),
]
Layer = Annotated[
    Annotated[MBConvSpec, BeforeValidator(_expand_name), Tag("conv")]
    | Annotated[AttentionSpec, BeforeValidator(_expand_name), Tag("attention")]
    | Annotated[tuple[SingleLayer, ...], AfterValidator(not_empty), Tag("parallel")],
    _discriminator(
        "a layer is 'mbconv', 'block' or 'grid', a mapping with that as its 'kind', or a list of layers run in parallel"
    ),
]
DEFAULT_LAYERS = (MBConvSpec(kind="mbconv"), AttentionSpec(kind="block"), AttentionSpec(kind="grid"))


class StageSpec(LayerSettings):
    """`depth` blocks, each the sequence `layers`; a nested list runs in parallel, the updates being summed.

    The first block changes the width and applies the stride: in its first `mbconv` outside a parallel list, or, if
    there is none, by the shortcut's pooling and a 1x1 convolution before it.
    """

    width: PositiveInt = Field(description="Channels.")
    depth: PositiveInt = Field(description="Blocks.")
    stride: Literal[1, 2] = Field(2, description="Of the first block.")
    grad_checkpointing: Checkpointing = Field(
        False, description="What training computes again to save memory: selective: norms, activations; true: all."
    )
    layers: Annotated[tuple[Layer, ...], AfterValidator(not_empty)] = Field(
        DEFAULT_LAYERS, description="The layers of each block."
    )

    def flat_layers(self) -> Iterator[tuple[int, MBConvSpec | AttentionSpec]]:
        """The layers of a block with their position, those in parallel at the same position."""
        for index, layer in enumerate(self.layers):
            for one in layer if isinstance(layer, tuple) else (layer,):
                yield index, one

    def downsampling_layer(self) -> int | None:
        """The position of the layer that applies the stride and the change of width; None: none can."""
        return next((index for index, layer in enumerate(self.layers) if isinstance(layer, MBConvSpec)), None)


class StemSpec(Spec):
    """Two convolutions before the first stage: strided, norm, activation; then one with a bias and nothing after."""

    width: PositiveInt = Field(64, description="Channels.")
    kernel_size: OddInt = Field(3, description="Side of both kernels; odd.")
    stride: Literal[1, 2] = Field(2, description="Of the first convolution.")
    first_bias: bool = Field(True, description="Whether the first convolution has a bias.")


class MLPHeadSpec(Spec):
    """Pool, LayerNorm, Linear, tanh, Linear."""

    kind: Literal["mlp"] = "mlp"
    hidden: PositiveInt | None = Field(None, description="Hidden width; the last stage's by default.")
    dropout: Rate = Field(0.0, description="Before the last Linear.")
    bias: bool = Field(True, description="Whether the last Linear has a bias.")


class LinearHeadSpec(Spec):
    """Pool, LayerNorm, Linear."""

    kind: Literal["linear"] = "linear"
    dropout: Rate = Field(0.0, description="Before the Linear.")
    bias: bool = Field(True, description="Whether the Linear has a bias.")


HeadSpec = Annotated[MLPHeadSpec | LinearHeadSpec, Discriminator("kind")]


class MaxViTSpec(LayerSettings):
    """A MaxViT network. Only `stages` is required.

    Raises:
        ValueError: for an invalid field, naming it, the value and what is allowed.

    Example:
        >>> spec = MaxViTSpec(
        ...     stages=[
        ...         {"width": 64, "depth": 2},
        ...         {"width": 128, "depth": 2, "window": [7, 5], "layers": ["mbconv", ["block", "grid"]]},
        ...     ]
        ... )
        >>> spec.resolved().stages[1].layers[1][0].window
        (7, 5)
    """

    name: str = Field("maxvit", description="Free text.")
    img_size: Size = Field(224, description="Pixels, N or [H, W]; any size may be fed, this one sizes `img/K` windows.")
    in_chans: PositiveInt = Field(3, description="Channels of the input.")
    num_classes: NonNegativeInt = Field(1000, description="Outputs; 0: the pooled features, no classifier.")
    stem: StemSpec = StemSpec()
    stages: Annotated[tuple[StageSpec, ...], AfterValidator(not_empty)] = Field(description="From the image on.")
    head: HeadSpec = MLPHeadSpec()
    drop_path_rate: Rate = Field(0.0, description="Stochastic depth of the last block; it grows linearly from 0.")
    grad_checkpointing: Checkpointing = Field(False, description="Of every stage that does not say otherwise.")
    backend: str | None = Field(None, description="Backend of every Max-SA: a name or a comma list; None: chosen.")

    @model_validator(mode="after")
    def _heads_divide(self) -> MaxViTSpec:
        width_before = self.stem.width
        for number, stage in enumerate(self.resolved().stages):
            carrier = stage.downsampling_layer()
            for index, layer in stage.flat_layers():
                before = carrier is not None and index < carrier
                for width in {width_before if before else stage.width, stage.width}:
                    if isinstance(layer, AttentionSpec) and width % layer.head_dim:
                        raise ValueError(
                            f"stages.{number}.layers.{index}: head_dim {layer.head_dim} does not divide the width "
                            f"{width} there; allowed: a head_dim that divides {width}, or a width such as "
                            f"{' or '.join(map(str, _multiples_near(width, layer.head_dim)))}"
                        )
            width_before = stage.width
        return self

    def resolved(self) -> MaxViTSpec:
        """The same network with every layer's every setting written out, and windows as `(P_h, P_w)`."""
        height, width = pair(self.img_size)
        stages = []
        for stage in self.stages:
            layers = [
                tuple(_settle(one, stage, self) for one in layer)
                if isinstance(layer, tuple)
                else _settle(layer, stage, self)
                for layer in stage.layers
            ]
            fields = [*LayerSettings.model_fields, "grad_checkpointing"]
            settings = {field: _lookup(field, stage, self) for field in fields}
            stages.append(stage.model_copy(update={**settings, "layers": tuple(layers)}).filled())
        nested = {"stem": self.stem.filled(), "stages": tuple(stages), "head": self.head.filled()}
        return self.model_copy(update={**nested, "img_size": (height, width)}).filled()

    def override(self, **fields: Any) -> MaxViTSpec:
        """A copy with fields replaced, by plain or dotted name: `stages.0.depth`; `stages.*.window` sets each stage's.

        Raises:
            ValueError: for an unknown field or an invalid value.

        Example:
            >>> spec = MaxViTSpec(stages=[{"width": 32, "depth": 1}])
            >>> spec.override(num_classes=10, **{"stages.0.depth": 3}).stages[0].depth
            3
        """
        data = self.to_dict()
        if any(".layers" in path for path in fields):
            for stage, written in zip(self.stages, data["stages"], strict=True):
                written["layers"] = stage.model_dump(mode="json", include={"layers"}).get(
                    "layers", [layer.kind for layer in DEFAULT_LAYERS]
                )
        for path, value in fields.items():
            _assign(data, path.split("."), value, path)
        return MaxViTSpec.read(data)

    def override_everywhere(self, **settings: Any) -> MaxViTSpec:
        """As `override` for settings of layers, and what stages and layers set themselves gives way.

        Example:
            >>> spec = MaxViTSpec(stages=[{"width": 32, "depth": 1, "window": 7}])
            >>> spec.override_everywhere(window=5).resolved().stages[0].layers[1].window
            (5, 5)
        """
        data = self.override(**settings).to_dict()
        for stage in data["stages"]:
            for holder in _holders(stage):
                for name in settings:
                    holder.pop(name, None)
        return MaxViTSpec.read(data)

    def attention_layers(self) -> list[AttentionSpec]:
        """The settled attention layers of every block, in the order of the network's modules."""
        return [
            layer
            for stage in self.resolved().stages
            for _ in range(stage.depth)
            for _, layer in stage.flat_layers()
            if isinstance(layer, AttentionSpec)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what was set, nothing else; `MaxViTSpec.model_validate` reads it back."""
        data = self.model_dump(mode="json")
        settings = LayerSettings.model_fields.keys()
        return dict(
            sorted(data.items(), key=lambda item: 2 if item[0] in ("stem", "stages", "head") else item[0] in settings)
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=100)

    def summary(self, img_size: int | tuple[int, int] | None = None) -> Summary:
        """Parameters and FLOPs, and a row a layer, without allocating any weight.

        Example:
            >>> import maxattn
            >>> maxattn.load_spec("maxvit_tiny_tf_224").summary().params
            30916528
        """
        from maxattn.summary import summarize

        return summarize(self, img_size)


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """An int or a pair as a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _settle(layer: MBConvSpec | AttentionSpec, stage: StageSpec, model: MaxViTSpec) -> MBConvSpec | AttentionSpec:
    settings = {field: _lookup(field, layer, stage, model) for field in type(layer).model_fields.keys() - {"kind"}}
    if "window" in settings:
        settings["window"] = _window(settings["window"], pair(model.img_size))
    return layer.model_copy(update=settings)


def _multiples_near(width: int, divisor: int) -> list[int]:
    below = width // divisor * divisor
    return [multiple for multiple in (below, below + divisor) if multiple > 0]


def _lookup(field: str, *specs: Spec) -> Any:
    """The field of the first spec that sets it, else of the last."""
    return getattr(next((spec for spec in specs if field in spec.model_fields_set), specs[-1]), field)


def _window(window: int | tuple[int, int] | str, img_size: tuple[int, int]) -> tuple[int, int]:
    if isinstance(window, str):
        divisor = int(window.removeprefix("img/"))
        return max(1, img_size[0] // divisor), max(1, img_size[1] // divisor)
    return pair(window)


def _holders(data: Any) -> Iterator[dict[str, Any]]:
    """Every mapping that can hold settings in a stage's plain data: the stage and its layers, nested ones too."""
    if isinstance(data, dict):
        yield data
        yield from _holders(data.get("layers"))
    elif isinstance(data, list):
        for one in data:
            yield from _holders(one)


def _assign(data: Any, path: list[str], value: Any, whole: str) -> None:
    key, *rest = path
    if isinstance(data, list):
        if key == "*":
            for index in range(len(data)):
                _assign(data, [str(index), *rest], value, whole)
            return
        if not re.fullmatch(r"-?\d+", key) or not -len(data) <= int(key) < len(data):
            raise ValueError(f"override {whole!r}: {key!r} is no index; allowed: 0 to {len(data) - 1}, or *")
        position = int(key)
        if rest and isinstance(data[position], str):
            data[position] = {"kind": data[position]}
        if rest:
            _assign(data[position], rest, value, whole)
        else:
            data[position] = _plain(value)
    elif isinstance(data, dict):
        if rest:
            _assign(data.setdefault(key, {}), rest, value, whole)
        else:
            data[key] = _plain(value)
    else:
        raise ValueError(f"override {whole!r}: {data!r} has no fields, so no {key!r}")


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Spec) else value
