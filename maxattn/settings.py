"""What a layer can be set to, and the base of all specs."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import ErrorDetails

RELATIVE_WINDOW = r"^img/[1-9]\d*$"


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError(f"must be odd, not {value}")
    return value


def _size(value: Any, relative: bool) -> Any:
    sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value,)
    if all(type(side) is int and side > 0 for side in sides):
        return value
    if relative and isinstance(value, str) and re.fullmatch(RELATIVE_WINDOW, value):
        return value
    raise ValueError("must be a positive int, or two for height and width" + (", or 'img/K'" if relative else ""))


def not_empty(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if not value:
        raise ValueError("must not be empty")
    return value


Activation = Literal["gelu_tanh", "gelu", "silu", "relu"]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
OddInt = Annotated[PositiveInt, AfterValidator(_odd)]
Pair = tuple[PositiveInt, PositiveInt]
RelativeWindow = Annotated[str, Field(pattern=RELATIVE_WINDOW)]
Window = Annotated[PositiveInt | Pair | RelativeWindow, BeforeValidator(lambda value: _size(value, relative=True))]
Size = Annotated[PositiveInt | Pair, BeforeValidator(lambda value: _size(value, relative=False))]


class SpecError(ValueError):
    """An invalid spec: a line for each wrong field, with the value and what is allowed."""


class Spec(BaseModel):
    """Base of all specs: immutable, hashable, no unknown fields, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_serializer(mode="wrap")
    def _only_what_is_set(self, handler: SerializerFunctionWrapHandler) -> Any:
        return {name: value for name, value in handler(self).items() if name in self.model_fields_set}

    def filled(self) -> Self:
        """The same with every field of its own set, to what it is."""
        return self.model_copy(update={name: getattr(self, name) for name in type(self).model_fields})

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name in data.keys() - cls.model_fields.keys():
                near = get_close_matches(str(name), cls.model_fields, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ValueError(f"there is no field {name!r}; {hint}fields: {', '.join(cls.model_fields)}")
        return data

    @classmethod
    def read(cls, data: Any, source: str | Path = "spec") -> Self:
        """Validated plain data; `source` names it in errors.

        Raises:
            SpecError: a ValueError with a line for each invalid field.

        Example:
            >>> import maxattn
            >>> maxattn.MaxViTSpec.read({"stages": [{"width": 64, "depth": 0}]})
            Traceback (most recent call last):
            maxattn.settings.SpecError: spec is invalid:
              stages.0.depth: Input should be greater than 0, got 0
        """
        if not isinstance(data, dict):
            raise SpecError(f"{source} is invalid: it must be a mapping of fields, not {type(data).__name__}")
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise SpecError("\n".join([f"{source} is invalid:", *map(_line, error.errors())])) from None

    @classmethod
    def parse(cls, text: str, source: str | Path = "spec") -> Self:
        """As `read`, from YAML or JSON text."""
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise SpecError(f"{source} is no YAML or JSON: {error}") from None
        return cls.read(data, source)


class CommonSettings(Spec):
    """Settings of every layer."""

    act: Activation = Field("gelu_tanh", description="Activation; `gelu_tanh` is GELU's tanh approximation.")
    layer_scale: NonNegativeFloat = Field(0.0, description="Initial value of a learned scale per channel; 0: none.")
    drop_path: Rate | None = Field(
        None, description="Stochastic depth rate; by default it grows linearly to the model's `drop_path_rate`."
    )

    def __eq__(self, other: object) -> bool:
        """Of one kind, and set alike: what is not set is looked up elsewhere."""
        return type(self) is type(other) and self.model_dump_json() == other.model_dump_json()

    def __hash__(self) -> int:
        return hash(self.model_dump_json())


class ConvSettings(CommonSettings):
    """Settings of `mbconv` layers (MaxViT paper, section 3.1 and appendix A.1)."""

    expansion: PositiveFloat = Field(4.0, description="Width inside, as a multiple of the width `expand_from`.")
    expand_from: Literal["output", "input"] = Field("output", description="The width that `expansion` multiplies.")
    kernel_size: OddInt = Field(3, description="Side of the depthwise convolution's kernel; odd.")
    se_ratio: NonNegativeFloat = Field(0.25, description="Squeeze-excitation's width over the output's; 0: none.")
    padding: Literal["same", "symmetric"] = Field(
        "same", description="`same`: TensorFlow's, asymmetric where a stride meets an even size; `symmetric`: k // 2."
    )
    shortcut_pool: Literal["avg2", "avg3", "max2", "max3"] = Field(
        "avg2", description="Pooling of the shortcut where the layer has a stride, and its side."
    )
    shortcut_conv: Literal["width", "stride"] = Field(
        "width", description="1x1 convolution on the shortcut if the width changes, or also whenever there is a stride."
    )
    conv_norm: Literal["batch_norm", "group_norm", "layer_norm"] = Field("batch_norm", description="Norm layer.")
    conv_norm_eps: PositiveFloat = Field(1e-3, description="The norm's epsilon.")
    batch_norm_momentum: Rate = Field(0.1, description="Weight of the new batch in the running statistics.")


class AttentionSettings(CommonSettings):
    """Settings of `block` and `grid` layers (MaxViT paper, section 3.2)."""

    window: Window = Field(7, description="Tokens of a group: P, [P_h, P_w], or `img/K` for img_size / K.")
    head_dim: PositiveInt = Field(32, description="Channels of a head; must divide the width.")
    rel_pos: Literal["table", "log_mlp", "none"] = Field(
        "table", description="Relative position bias: a learned table, an MLP of log-spaced offsets, or none."
    )
    rel_pos_hidden: PositiveInt = Field(512, description="Hidden width of the `log_mlp`.")
    attn_scale: Literal["head_dim", "width"] | PositiveFloat = Field(
        "head_dim", description="Factor on q k^T: head_dim ** -0.5, width ** -0.5 or a number."
    )
    qkv_bias: bool = Field(True, description="Whether the projection to q, k and v has a bias.")
    mlp_ratio: NonNegativeFloat = Field(4.0, description="Hidden width of the MLP over the layer's; 0: no MLP.")
    attn_norm: Literal["layer_norm", "rms_norm"] = Field("layer_norm", description="Norm layer.")
    attn_norm_eps: PositiveFloat = Field(1e-5, description="The norm's epsilon.")
    attn_drop: Rate = Field(0.0, description="Dropout of attention weights.")
    proj_drop: Rate = Field(0.0, description="Dropout after the attention's projection and in the MLP.")


class LayerSettings(ConvSettings, AttentionSettings):
    """Every setting a layer can have; a stage and the model hold them for the layers below."""


_UNION_TAG = re.compile(r"conv|attention|parallel|linear|mlp|(literal|constrained|tuple|float|int|str)\b.*")


def _line(error: ErrorDetails) -> str:
    """`  field: what is allowed, got value`; unions' tags are no part of the field's name."""
    field = ".".join(str(part) for part in error["loc"] if not _UNION_TAG.fullmatch(str(part)))
    message = error["msg"].removeprefix("Value error, ")
    seen = "" if isinstance(error["input"], dict) else f", got {error['input']!r}"
    return f"  {field}: {message}{seen}" if field else f"  {message}{seen}"
