"""Specs: what they accept, what they refuse and how they say it, and how settings are inherited and overridden."""

from __future__ import annotations

import json
from functools import cache

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

import maxattn
from maxattn import MaxViTSpec
from maxattn.settings import LayerSettings, SpecError
from maxattn.spec import AttentionSpec, MBConvSpec, StageSpec
from maxattn.summary import Summary

STAGE = {"width": 64, "depth": 1}

# Parameters at 224, 384 and 512 pixels as published with the official weights.
PUBLISHED_PARAMS = {
    "maxvit_tiny_tf_224": 30_916_528,
    "maxvit_tiny_tf_384": 30_977_008,
    "maxvit_tiny_tf_512": 31_049_584,
    "maxvit_small_tf_224": 68_927_956,
    "maxvit_base_tf_224": 119_467_708,
    "maxvit_large_tf_224": 211_785_560,
    "maxvit_xlarge_tf_384": 475_323_472,
    "maxvit_t": 30_919_624,
}
# GFLOPs of the paper's table 1 and of timm's model cards count norms and activations too, so ours are a little less.
PUBLISHED_GFLOPS = {
    "maxvit_tiny_tf_224": 5.6,
    "maxvit_tiny_tf_384": 17.7,
    "maxvit_tiny_tf_512": 33.7,
    "maxvit_small_tf_224": 11.7,
    "maxvit_small_tf_384": 36.1,
    "maxvit_small_tf_512": 67.6,
    "maxvit_base_tf_384": 74.2,
    "maxvit_base_tf_512": 138.5,
    "maxvit_large_tf_224": 43.9,
    "maxvit_large_tf_384": 133.1,
    "maxvit_large_tf_512": 245.4,
    "maxvit_xlarge_tf_224": 97.8,
    "maxvit_xlarge_tf_384": 293.7,
    "maxvit_xlarge_tf_512": 535.2,
}


@cache
def preset_summary(name: str) -> Summary:
    return maxattn.load_spec(name).summary()


@pytest.mark.parametrize(("name", "params"), PUBLISHED_PARAMS.items())
def test_summary_counts_the_published_parameters(name: str, params: int) -> None:
    assert preset_summary(name).params == params


@pytest.mark.parametrize(("name", "gflops"), PUBLISHED_GFLOPS.items())
def test_summary_counts_the_published_flops_but_for_elementwise_work(name: str, gflops: float) -> None:
    counted = preset_summary(name).flops / 1e9
    assert 0.97 * gflops < counted < gflops + 0.05


def test_summary_rows_add_up_and_name_every_layer() -> None:
    spec = maxattn.load_spec("maxvit_tiny_tf_224")
    summary = spec.summary()
    assert sum(row.params for row in summary.rows) == summary.params
    assert sum(row.flops for row in summary.rows) == summary.flops
    assert len(summary.rows) == 2 + 3 * sum(stage.depth for stage in spec.stages)
    assert [row.kind for row in summary.rows[:4]] == ["stem", "mbconv", "block", "grid"]
    assert (summary.rows[-2].size, summary.rows[-2].width) == ((7, 7), 512)
    assert "30,916,528" in str(summary)


def test_summary_of_a_nano_network_equals_a_count_by_hand() -> None:
    spec = MaxViTSpec(
        img_size=4,
        in_chans=1,
        num_classes=3,
        head={"kind": "linear"},
        head_dim=2,
        stem={"width": 2, "stride": 1, "kernel_size": 1},
        stages=[{"width": 4, "depth": 1, "stride": 1, "window": 2, "layers": ["grid"]}],
    )
    pixels, tokens = 16, 4
    stem = pixels * (1 * 2 + 2 * 2)
    downsample = pixels * 2 * 4
    attention = pixels * (4 * 12 + 4 * 4) + 2 * pixels * tokens * 4
    mlp = 2 * pixels * 4 * 16
    assert spec.summary().flops == stem + downsample + attention + mlp + 4 * 3


def test_summary_follows_the_image_size() -> None:
    spec = maxattn.load_spec("maxvit_tiny_tf_224")
    assert spec.summary((224, 448)).params == spec.summary().params
    assert spec.summary((224, 448)).flops > 1.9 * spec.summary().flops


def test_summary_counts_only_tokens_inside_the_image() -> None:
    stage = {"width": 4, "depth": 1, "stride": 1, "window": 4, "layers": ["grid"], "mlp_ratio": 0}
    spec = MaxViTSpec(img_size=5, head_dim=2, stem={"width": 4, "stride": 1}, stages=[stage])
    pairs_along_a_side = 3**2 + 2**2  # a 4-token grid over 5 pixels: one group of 3 and one of 2
    attention = 25 * (4 * 12 + 4 * 4) + 2 * pairs_along_a_side**2 * 4
    assert spec.summary().rows[1].flops == attention


@pytest.mark.parametrize("name", maxattn.list_presets())
def test_presets_survive_yaml_and_json(name: str) -> None:
    spec = maxattn.load_spec(name)
    assert MaxViTSpec.parse(spec.to_yaml()) == spec
    assert MaxViTSpec.parse(spec.to_json()) == spec
    assert spec.name == name
    assert hash(spec) == hash(maxattn.load_spec(name))


def test_presets_are_named_as_in_timm_and_torchvision() -> None:
    sizes, pixels = ("tiny", "small", "base", "large", "xlarge"), (224, 384, 512)
    assert {f"maxvit_{size}_tf_{side}" for size in sizes for side in pixels} | {"maxvit_t"} <= set(
        maxattn.list_presets()
    )
    assert maxattn.list_presets("maxvit_base_tf_*") == [f"maxvit_base_tf_{side}" for side in pixels]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, ["stages", "required"]),
        ({"stages": []}, ["stages", "must not be empty"]),
        ({"stages": [{**STAGE, "windw": 3}]}, ["stages.0", "windw", "did you mean 'window'"]),
        ({"stages": [{**STAGE, "width": 0}]}, ["stages.0.width", "greater than 0", "got 0"]),
        ({"stages": [{**STAGE, "width": 65}]}, ["stages.0.layers.1", "head_dim 32", "65", "64 or 96"]),
        ({"stages": [{**STAGE, "window": 0}]}, ["stages.0.window", "positive", "got 0"]),
        ({"stages": [{**STAGE, "window": [7, 7, 7]}]}, ["stages.0.window", "two"]),
        ({"stages": [{**STAGE, "window": "img/0"}]}, ["stages.0.window", "img/K"]),
        ({"stages": [{**STAGE, "layers": ["mbcon"]}]}, ["stages.0.layers.0", "'mbcon'", "'mbconv', 'block' or 'grid'"]),
        ({"stages": [{**STAGE, "layers": ["mbconv", ["grid", "gird"]]}]}, ["stages.0.layers.1.1", "'gird'"]),
        ({"stages": [{**STAGE, "layers": [[]]}]}, ["stages.0.layers.0", "must not be empty"]),
        ({"stages": [{**STAGE, "layers": [{"kind": "block", "se_ratio": 1}]}]}, ["stages.0.layers.0", "se_ratio"]),
        ({"stages": [STAGE], "drop_path_rate": float("nan")}, ["drop_path_rate", "nan"]),
        ({"stages": [STAGE], "drop_path_rate": 1.0}, ["drop_path_rate", "less than 1", "got 1.0"]),
        ({"stages": [STAGE], "kernel_size": 4}, ["kernel_size", "odd", "4"]),
        ({"stages": [STAGE], "head": {"kind": "conv"}}, ["head", "'mlp'", "'linear'"]),
        ({"stages": [STAGE], "stem": {"width": 48}, "act": "gelo"}, ["act", "gelu_tanh", "gelo"]),
        ([STAGE], ["mapping", "list"]),
    ],
)
def test_an_invalid_spec_names_the_field_the_value_and_what_is_allowed(data: object, words: list[str]) -> None:
    with pytest.raises(SpecError) as error:
        MaxViTSpec.read(data)
    for word in words:
        assert word in str(error.value)
    assert "errors.pydantic.dev" not in str(error.value)


def test_an_attention_layer_before_the_downsampling_must_divide_the_width_there() -> None:
    stages = [{"width": 64, "depth": 1, "layers": ["block", "mbconv"]}]
    with pytest.raises(SpecError, match="head_dim 32 does not divide the width 48"):
        MaxViTSpec.read({"stem": {"width": 48}, "stages": stages})


def test_errors_of_a_directly_built_spec_are_value_errors_too() -> None:
    with pytest.raises(ValueError, match=r"stages\.0\.depth"):
        MaxViTSpec(stages=[{"width": 64, "depth": -1}])


def test_specs_are_frozen() -> None:
    spec = maxattn.load_spec("nano")
    with pytest.raises(ValueError, match="frozen"):
        spec.num_classes = 3


def test_an_unknown_preset_gets_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"maxvit_tinny_tf_224.*did you mean maxvit_tiny_tf_224"):
        maxattn.build("maxvit_tinny_tf_224")


def test_a_missing_or_broken_spec_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        maxattn.load_spec("absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("stages: [")
    with pytest.raises(SpecError, match=r"broken\.yaml is no YAML"):
        maxattn.load_spec(broken)


def test_a_spec_is_read_from_yaml_and_json_files(tmp_path) -> None:
    spec = maxattn.load_spec("nano")
    for name, text in (("a.yaml", spec.to_yaml()), ("a.json", spec.to_json())):
        path = tmp_path / name
        path.write_text(text)
        assert maxattn.load_spec(path) == maxattn.load_spec(str(path)) == spec


def test_a_layer_overrides_its_stage_which_overrides_the_model() -> None:
    spec = MaxViTSpec(
        window=7,
        act="silu",
        stages=[
            STAGE,
            {**STAGE, "window": 5, "layers": ["mbconv", {"kind": "block", "window": [3, 4]}, "grid"]},
        ],
    ).resolved()
    assert [layer.window for layer in spec.stages[0].layers[1:]] == [(7, 7), (7, 7)]
    assert [layer.window for layer in spec.stages[1].layers[1:]] == [(3, 4), (5, 5)]
    assert {layer.act for stage in spec.stages for layer in stage.layers} == {"silu"}


def test_a_value_equal_to_the_default_still_overrides_when_it_is_written() -> None:
    spec = MaxViTSpec(mlp_ratio=2.0, stages=[{**STAGE, "mlp_ratio": 4.0}, STAGE]).resolved()
    assert [stage.layers[1].mlp_ratio for stage in spec.stages] == [4.0, 2.0]


def test_relative_windows_follow_the_image() -> None:
    spec = MaxViTSpec(img_size=[224, 320], window="img/32", stages=[STAGE])
    assert spec.resolved().stages[0].layers[1].window == (7, 10)
    assert spec.override(img_size=448).resolved().stages[0].layers[1].window == (14, 14)
    assert spec.override(img_size=16).resolved().stages[0].layers[1].window == (1, 1)


def test_overrides_reach_fields_by_plain_dotted_and_starred_names() -> None:
    spec = maxattn.load_spec("maxvit_tiny_tf_224")
    assert spec.override(num_classes=21_843).num_classes == 21_843
    assert spec.override(**{"stem.width": 32}).stem.width == 32
    assert spec.override(**{"stages.2.depth": 9}).stages[2].depth == 9
    assert spec.override(**{"stages.-1.depth": 9}).stages[3].depth == 9
    assert {stage.window for stage in spec.override(**{"stages.*.window": 5}).stages} == {5}
    grid = spec.override(**{"stages.1.layers.2.window": 3}).resolved().stages
    assert [stage.layers[2].window for stage in grid[:2]] == [(7, 7), (3, 3)]
    swapped = spec.override(**{"stages.*.layers": ["mbconv", "grid", "block"]})
    assert [layer.kind for layer in swapped.stages[3].layers] == ["mbconv", "grid", "block"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("num_clases", "did you mean 'num_classes'"),
        ("stages.9.depth", "'9' is no index; allowed: 0 to 3"),
        ("stages.x.depth", "'x' is no index"),
        ("num_classes.x", "num_classes: Input should be a valid integer"),
        ("name.x", "has no fields"),
    ],
)
def test_an_override_of_nothing_says_what_there_is(path: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        maxattn.load_spec("maxvit_tiny_tf_224").override(**{path: 3})


def test_the_json_schema_describes_every_setting() -> None:
    schema = MaxViTSpec.model_json_schema()
    assert schema["required"] == ["stages"]
    assert set(LayerSettings.model_fields) <= set(schema["properties"])
    assert all("description" in schema["properties"][name] for name in LayerSettings.model_fields)
    assert schema["$defs"]["MBConvSpec"]["anyOf"][0] == {"const": "mbconv"}
    json.dumps(schema)


layers = st.recursive(
    st.sampled_from(["mbconv", "block", "grid"])
    | st.builds(
        lambda w: {"kind": "grid", "window": w}, st.integers(1, 9) | st.tuples(st.integers(1, 5), st.integers(1, 5))
    )
    | st.builds(lambda e: {"kind": "mbconv", "expansion": e}, st.sampled_from([1.0, 2.0, 6.0])),
    lambda inner: st.lists(inner, min_size=1, max_size=2),
    max_leaves=2,
).filter(lambda layer: not (isinstance(layer, list) and any(isinstance(one, list) for one in layer)))
stages = st.lists(
    st.fixed_dictionaries(
        {
            "width": st.sampled_from([32, 64]),
            "depth": st.integers(1, 2),
            "layers": st.lists(layers, min_size=1, max_size=3),
        },
        optional={
            "window": st.integers(1, 5),
            "stride": st.sampled_from([1, 2]),
            "act": st.sampled_from(["silu", "relu"]),
        },
    ),
    min_size=1,
    max_size=2,
)


@given(stages)
def test_any_order_of_layers_survives_a_round_trip_through_yaml(stages: list[dict]) -> None:
    spec = MaxViTSpec.read({"stages": stages})
    again = MaxViTSpec.parse(spec.to_yaml())
    assert again == spec
    assert again.resolved() == spec.resolved()
    assert again.to_dict() == spec.to_dict() == yaml.safe_load(spec.to_yaml())


def test_shorthand_layers_are_written_back_as_shorthand() -> None:
    stage = StageSpec(width=32, depth=1, layers=["mbconv", {"kind": "grid", "window": 3}, ["block", "grid"]])
    assert stage.model_dump(mode="json")["layers"] == [
        "mbconv",
        {"kind": "grid", "window": 3},
        ["block", "grid"],
    ]
    assert isinstance(stage.layers[0], MBConvSpec)
    assert isinstance(stage.layers[2][0], AttentionSpec)


def test_specs_that_build_different_networks_are_different() -> None:
    plain = MaxViTSpec(window=5, stages=[STAGE])
    pinned = MaxViTSpec(window=5, stages=[{**STAGE, "window": 7}])
    assert plain != pinned
    assert len({plain, pinned, MaxViTSpec(window=5, stages=[STAGE])}) == 2


@pytest.mark.parametrize("name", maxattn.list_presets())
def test_pydantics_own_round_trips_keep_the_network(name: str) -> None:
    spec = maxattn.load_spec(name)
    for again in (MaxViTSpec.model_validate_json(spec.model_dump_json()), MaxViTSpec.model_validate(spec.model_dump())):
        assert again == spec
        assert again.resolved() == spec.resolved()


def test_tiny_ratios_still_give_layers_of_some_width() -> None:
    model = maxattn.build({"expansion": 0.001, "mlp_ratio": 0.001, "stages": [{"width": 32, "depth": 1}]})
    assert model.stages[0].blocks[0].layers[0].conv1.out_channels == 1
    assert model.stages[0].blocks[0].layers[1].mlp.fc1.out_features == 1
