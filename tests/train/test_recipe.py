"""What `maxattn train` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import maxattn
from maxattn.train import Recipe, TrainConfig, load_config

STAGES = [{"width": 32, "depth": 1}]


def read(spec: Any, **recipe: Any) -> TrainConfig:
    return TrainConfig.read({"spec": spec, "recipe": recipe})


def test_a_spec_is_a_preset_a_preset_with_overrides_a_file_or_written_out(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("stages: [{width: 32, depth: 1}]\n", encoding="utf-8")
    assert read("maxvit_tiny_tf_224").spec == maxattn.load_spec("maxvit_tiny_tf_224")
    overridden = read({"preset": "nano", "in_chans": 1, "stages.0.depth": 2}).spec
    assert (overridden.in_chans, overridden.stages[0].depth) == (1, 2)
    assert read(str(file)).spec == read({"preset": str(file)}).spec == read({"stages": STAGES}).spec


@pytest.mark.parametrize("spec", ["nano", {"preset": "nano"}, {"stages": STAGES}])
def test_the_number_of_classes_follows_the_images_where_the_config_does_not_set_it(spec: Any) -> None:
    assert read(spec).with_classes(7).spec.num_classes == 7


@pytest.mark.parametrize("spec", [{"preset": "nano", "num_classes": 5}, {"stages": STAGES, "num_classes": 5}])
def test_a_number_of_classes_that_the_images_do_not_have_is_an_error(spec: Any, tmp_path: Path) -> None:
    assert read(spec).with_classes(5).spec.num_classes == 5
    with pytest.raises(ValueError, match="num_classes 5 but there are 7 classes"):
        read(spec).with_classes(7)
    file = tmp_path / "spec.yaml"
    file.write_text(read(spec).spec.to_yaml(), encoding="utf-8")
    with pytest.raises(ValueError, match="num_classes 5 but there are 7 classes"):
        read(str(file)).with_classes(7)


def test_plain_data_reads_back_as_the_same_config() -> None:
    config = read({"preset": "nano", "in_chans": 1}, epochs=3, mean=[0.1], std=[0.3], clip_grad=None)
    assert TrainConfig.parse(config.to_yaml()) == config
    assert TrainConfig.read({"spec": "nano"}).recipe == Recipe()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "spec: Field required"),
        ([], "must be a mapping of fields, not list"),
        ({"spec": "nano", "recipes": {}}, "there is no field 'recipes'; did you mean 'recipe'"),
        ({"spec": "nano", "recipe": {"epoch": 3}}, "recipe: there is no field 'epoch'; did you mean 'epochs'"),
        ({"spec": "nano", "recipe": {"epochs": 0}}, "recipe.epochs: Input should be greater than 0, got 0"),
        ({"spec": "nano", "recipe": {"lr": float("nan")}}, "recipe.lr: .*finite"),
        ({"spec": "nano", "recipe": {"warmup": 1.0}}, "recipe.warmup: .*less than 1"),
        ({"spec": "nano", "recipe": {"amp": "fp16"}}, "recipe.amp: Input should be 'none' or 'bf16', got 'fp16'"),
        ({"spec": "nano", "recipe": {"mean": []}}, "recipe.mean: must not be empty"),
        ({"spec": "nano", "recipe": {"std": [0.5, 0.5]}}, "recipe.std: there must be 1 or in_chans = 3 values, not 2"),
        ({"spec": "nano", "recipe": {"std": [0.0]}}, r"recipe.std.0: Input should be greater than 0"),
        ({"spec": "nanoo"}, "there is no preset 'nanoo'; did you mean nano"),
        ({"spec": {"preset": "nano", "in_chan": 1}}, "there is no field 'in_chan'; did you mean 'in_chans'"),
        ({"spec": {"stages": [{"width": 0, "depth": 1}]}}, "spec.stages.0.width: Input should be greater than 0"),
    ],
)
def test_an_error_names_the_field(data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.read(data)


def test_a_file_that_is_missing_or_no_yaml_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(FileNotFoundError, match=r"there is no config .*config\.yaml; .*'spec: nano'"):
        load_config(path)
    path.write_text("spec: nano\nrecipe: {epochs: [}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.yaml is no YAML"):
        load_config(path)
    path.write_text("spec: nano\nrecipe: {epochs: -1}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.yaml is invalid:\n  recipe.epochs: "):
        load_config(path)
