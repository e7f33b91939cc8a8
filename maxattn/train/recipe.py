"""What `maxattn train` reads: one YAML file with a network's `spec` and the `recipe` to train it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from maxattn.presets import list_presets, load_spec
from maxattn.settings import Rate, Spec, not_empty
from maxattn.spec import MaxViTSpec


def _spec(value: Any) -> Any:
    """A spec's plain data; a preset's own `num_classes` is left out, since the images have theirs."""
    if isinstance(value, str):
        value = {"preset": value}
    if not isinstance(value, dict) or "preset" not in value:
        return value
    overrides = {name: one for name, one in value.items() if name != "preset"}
    data = load_spec(value["preset"]).override(**overrides).to_dict()
    if value["preset"] in list_presets() and "num_classes" not in overrides:
        data.pop("num_classes", None)
    return data


class Recipe(Spec):
    """How to train. Every field has a default.

    Example:
        >>> Recipe(epochs=3).batch_size
        64
    """

    epochs: PositiveInt = Field(20, description="Passes over the training images.")
    batch_size: PositiveInt = Field(64, description="Images a step; an epoch leaves out what does not fill one.")
    lr: PositiveFloat = Field(3e-3, description="Peak of the learning rate; from there it falls to 0 along a cosine.")
    warmup: Rate = Field(0.1, description="Share of the training in which the learning rate first grows linearly.")
    weight_decay: NonNegativeFloat = Field(0.05, description="AdamW's; biases, norms and position tables have none.")
    label_smoothing: Rate = Field(0.1, description="Share of the target that is spread over all classes.")
    clip_grad: PositiveFloat | None = Field(1.0, description="Largest norm of all gradients together; null: any.")
    shift: NonNegativeInt = Field(0, description="Move each image by up to so many pixels, its edge being repeated.")
    flip: bool = Field(False, description="Mirror half of the images left to right.")
    mean: Annotated[tuple[float, ...], AfterValidator(not_empty)] = Field(
        (0.5,), description="Of pixels between 0 and 1, subtracted: a list of one number, or of one a channel."
    )
    std: Annotated[tuple[PositiveFloat, ...], AfterValidator(not_empty)] = Field(
        (0.5,), description="Of pixels between 0 and 1, divided by: a list of one number, or of one a channel."
    )
    amp: Literal["none", "bf16"] = Field("none", description="Automatic mixed precision.")
    compile: bool = Field(
        False, description="Compile the network at the first step, on a GPU as CUDA graphs: minutes, then faster steps."
    )
    seed: NonNegativeInt = Field(0, description="Of the initial weights, the order of the images and what is random.")
    workers: NonNegativeInt = Field(4, description="Threads that read images, or processes if memory cannot hold them.")


class TrainConfig(Spec):
    """A network and the recipe to train it.

    `spec` is a preset's name, the path of a spec file, a spec written out, or a `preset` with fields to override, by
    plain or dotted name. A `num_classes` that is not written there follows the images.

    Example:
        >>> config = TrainConfig.read({"spec": {"preset": "nano", "in_chans": 1}, "recipe": {"epochs": 3}})
        >>> config.spec.in_chans, config.recipe.epochs
        (1, 3)
    """

    spec: Annotated[MaxViTSpec, BeforeValidator(_spec)]
    recipe: Recipe = Recipe()

    @model_validator(mode="after")
    def _values_for_channels(self) -> TrainConfig:
        for name, values in (("mean", self.recipe.mean), ("std", self.recipe.std)):
            if len(values) not in (1, self.spec.in_chans):
                allowed = " or ".join(dict.fromkeys(["1", f"in_chans = {self.spec.in_chans}"]))
                raise ValueError(f"recipe.{name}: there must be {allowed} values, not {len(values)}")
        return self

    def with_classes(self, number: int) -> TrainConfig:
        """The config for images of `number` classes.

        Raises:
            ValueError: if the spec was written for another number.
        """
        if "num_classes" in self.spec.model_fields_set and self.spec.num_classes != number:
            raise ValueError(
                f"the spec has num_classes {self.spec.num_classes} but there are {number} classes of images: set it to "
                f"{number}, or leave it out and it follows the images"
            )
        return self.model_copy(update={"spec": self.spec.override(num_classes=number)})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the recipe's defaults written out; `TrainConfig.read` reads it back."""
        return {"spec": self.spec.to_dict(), "recipe": self.recipe.filled().model_dump(mode="json")}

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, default_flow_style=None, width=100)


def load_config(path: str | Path) -> TrainConfig:
    """A config from a YAML or JSON file.

    Raises:
        FileNotFoundError: if there is no such file.
        SpecError: a ValueError with a line for each invalid field.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no config {path}; the least that works is a file with the line 'spec: nano'")
    return TrainConfig.parse(path.read_text(encoding="utf-8"), path)
