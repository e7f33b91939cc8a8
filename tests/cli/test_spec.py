"""`maxattn spec` and `maxattn summary`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import Result

import maxattn

Run = Callable[..., Result]

EVERYTHING = """
name: everything
img_size: [64, 96]
window: img/8
head_dim: 8
head: {kind: linear, dropout: 0.1}
stem: {width: 16}
stages:
- {width: 32, depth: 1, layers: [mbconv, block, {kind: grid, window: 3}]}
- {width: 32, depth: 2, window: [4, 2], layers: [[mbconv, {kind: block, rel_pos: log_mlp}], grid]}
"""


def test_list_gives_sizes_and_parameters(run: Run) -> None:
    listed = json.loads(run("spec", "list", "maxvit_t*", "--json").stdout)
    assert listed == [
        {"name": "maxvit_t", "img_size": [224, 224], "params": 30_919_624},
        {"name": "maxvit_tiny_tf_224", "img_size": [224, 224], "params": 30_916_528},
        {"name": "maxvit_tiny_tf_384", "img_size": [384, 384], "params": 30_977_008},
        {"name": "maxvit_tiny_tf_512", "img_size": [512, 512], "params": 31_049_584},
    ]


def test_list_prints_a_line_for_each_preset(run: Run) -> None:
    lines = [line.split() for line in run("spec", "list", "maxvit_t").stdout.splitlines()]
    assert lines == [["preset", "img_size", "params"], ["maxvit_t", "224x224", "30,919,624"]]


@pytest.mark.parametrize("name", ["nano", "maxvit_t", "maxvit_tiny_tf_224"])
def test_show_prints_what_reads_back_as_the_same_spec(name: str, run: Run) -> None:
    spec = maxattn.load_spec(name)
    assert maxattn.load_spec(yaml.safe_load(run("spec", "show", name).stdout)) == spec
    assert maxattn.load_spec(json.loads(run("spec", "show", name, "--json").stdout)) == spec


def test_show_resolved_writes_every_setting_of_the_same_network(run: Run) -> None:
    Path("everything.yaml").write_text(EVERYTHING, encoding="utf-8")
    spec = maxattn.load_spec("everything.yaml")
    told = yaml.safe_load(run("spec", "show", "everything.yaml", "--resolved").stdout)
    assert told["stages"][0]["layers"][1]["window"] == [8, 12]
    assert told["stages"][1]["layers"][0][1]["rel_pos"] == "log_mlp"
    for layer in told["stages"][0]["layers"]:
        assert {"act", "layer_scale", "drop_path"} < layer.keys()
    assert {"in_chans", "num_classes", "drop_path_rate", "padding"} < told.keys()
    assert maxattn.load_spec(told).resolved() == spec.resolved()
    assert maxattn.load_spec(told).summary() == spec.summary()


def test_set_takes_yaml_and_sizes_such_as_7x5(run: Run) -> None:
    assignments = [
        "num_classes=5",
        "stages.*.window=7x5",
        "head={kind: mlp, hidden: 9}",
        "name='7x5'",
        "qkv_bias=false",
    ]
    options = [word for assignment in assignments for word in ("--set", assignment)]
    spec = maxattn.load_spec(json.loads(run("spec", "show", "nano", *options, "--json").stdout))
    expected = {"stages.*.window": [7, 5], "head": {"kind": "mlp", "hidden": 9}}
    assert spec == maxattn.load_spec("nano").override(num_classes=5, name="7x5", qkv_bias=False, **expected)


def test_validate_passes_valid_files(run: Run) -> None:
    Path("one.yaml").write_text(EVERYTHING, encoding="utf-8")
    Path("two.json").write_text(maxattn.load_spec("nano").to_json(), encoding="utf-8")
    assert run("spec", "validate", "one.yaml", "two.json").stdout == "one.yaml: valid\ntwo.json: valid\n"


def test_validate_exits_with_1_and_names_file_and_field_of_every_error(run: Run) -> None:
    Path("good.yaml").write_text(EVERYTHING, encoding="utf-8")
    Path("bad.yaml").write_text("stages: [{width: 64, depth: 0, layers: [mbconv, blok]}]", encoding="utf-8")
    Path("cut.json").write_text('{"stages": [', encoding="utf-8")
    files = ["good.yaml", "bad.yaml", "cut.json", "missing.yaml"]
    result = run("spec", "validate", *files, exit_code=1)
    assert result.stdout == "good.yaml: valid\n"
    assert (
        "bad.yaml is invalid:\n  stages.0.depth: Input should be greater than 0, got 0\n  stages.0.layers.1: "
        in result.stderr
    )
    assert "cut.json is no YAML or JSON" in result.stderr
    assert "no spec file missing.yaml" in result.stderr
    told = json.loads(run("spec", "validate", *files, "--json", exit_code=1).stdout)
    assert [(one["file"], one["valid"]) for one in told] == [(file, file == "good.yaml") for file in files]
    assert "stages.0.depth" in told[1]["error"]


def test_summary_prints_a_row_for_each_layer_and_the_totals(run: Run) -> None:
    told = run("summary", "maxvit_tiny_tf_224").stdout
    assert told == f"{maxattn.load_spec('maxvit_tiny_tf_224').summary()}\n"
    rows = [line.split() for line in told.splitlines()]
    assert ["stages.2.blocks.4.layers.2", "grid", "14x14x256"] in [row[:3] for row in rows]
    assert rows[-1][:2] == ["total", "30,916,528"]


def test_summary_takes_a_file_a_size_and_fields(run: Run) -> None:
    Path("everything.yaml").write_text(EVERYTHING, encoding="utf-8")
    options = ["--img-size", "40x24", "--set", "stages.1.depth=3", "--json"]
    told = json.loads(run("summary", "everything.yaml", *options).stdout)
    spec = maxattn.load_spec("everything.yaml").override(**{"stages.1.depth": 3})
    assert told == json.loads(json.dumps(spec.summary((40, 24)).to_dict()))
    assert (told["img_size"], told["params"]) == ([40, 24], sum(p.numel() for p in maxattn.build(spec).parameters()))


@pytest.fixture
def schema(run: Run) -> dict[str, Any]:
    return json.loads(run("spec", "schema").stdout)


def accepts(schema: dict[str, Any], data: Any, root: dict[str, Any]) -> bool:
    """Whether `data` is valid under a JSON schema, by the keywords that decide about specs."""
    types = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    rules = {
        "$ref": lambda path: accepts(root["$defs"][path.removeprefix("#/$defs/")], data, root),
        "anyOf": lambda options: any(accepts(option, data, root) for option in options),
        "oneOf": lambda options: sum(accepts(option, data, root) for option in options) == 1,
        "const": lambda value: data == value,
        "enum": lambda values: data in values,
        "type": lambda name: (
            data is None
            if name == "null"
            else isinstance(data, types[name]) and isinstance(data, bool) == (name == "boolean")
        ),
        "pattern": lambda pattern: not isinstance(data, str) or re.search(pattern, data) is not None,
        "minimum": lambda least: not isinstance(data, (int, float)) or data >= least,
        "exclusiveMinimum": lambda below: not isinstance(data, (int, float)) or data > below,
        "exclusiveMaximum": lambda above: not isinstance(data, (int, float)) or data < above,
        "minItems": lambda least: not isinstance(data, list) or len(data) >= least,
        "maxItems": lambda most: not isinstance(data, list) or len(data) <= most,
        "items": lambda item: not isinstance(data, list) or all(accepts(item, one, root) for one in data),
        "prefixItems": lambda items: (
            not isinstance(data, list) or all(accepts(item, one, root) for item, one in zip(items, data, strict=False))
        ),
        "properties": lambda fields: (
            not isinstance(data, dict)
            or all(accepts(fields[name], value, root) for name, value in data.items() if name in fields)
        ),
        "additionalProperties": lambda _: not isinstance(data, dict) or data.keys() <= schema["properties"].keys(),
        "required": lambda names: not isinstance(data, dict) or data.keys() >= set(names),
    }
    unknown = schema.keys() - rules.keys() - {"$schema", "$defs", "title", "description", "default", "discriminator"}
    assert not unknown
    return all(rules[keyword](value) for keyword, value in schema.items() if keyword in rules)


def test_the_schema_accepts_every_preset_and_every_way_to_write_a_layer(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for name in maxattn.list_presets():
        assert accepts(schema, maxattn.load_spec(name).to_dict(), schema), name
    assert accepts(schema, yaml.safe_load(EVERYTHING), schema)
    assert accepts(schema, maxattn.MaxViTSpec.read(yaml.safe_load(EVERYTHING)).resolved().to_dict(), schema)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "no stages"},
        {"stages": [{"width": 64}]},
        {"stages": [{"width": 0, "depth": 1}]},
        {"stages": [{"width": 64, "depth": 1, "layers": ["blok"]}]},
        {"stages": [{"width": 64, "depth": 1, "layers": [{"window": 7}]}]},
        {"stages": [{"width": 64, "depth": 1, "layers": [{"kind": "block", "kernel_size": 3}]}]},
        {"stages": [{"width": 64, "depth": 1, "layers": [["block", ["grid"]]]}]},
        {"stages": [{"width": 64, "depth": 1, "window": [7, 5, 3]}]},
        {"stages": [{"width": 64, "depth": 1, "window": "img:32"}]},
        {"stages": [{"width": 64, "depth": 1}], "windw": 7},
        {"stages": [{"width": 64, "depth": 1}], "head": {"kind": "pyramid"}},
    ],
)
def test_the_schema_rejects_what_the_spec_rejects(wrong: dict[str, Any], schema: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="invalid"):
        maxattn.load_spec(wrong)
    assert not accepts(schema, wrong, schema)


def test_every_field_of_the_schema_has_a_description(schema: dict[str, Any]) -> None:
    undescribed = [
        f"{definition.get('title')}.{name}"
        for definition in (schema, *schema["$defs"].values())
        for name, field in definition.get("properties", {}).items()
        if "description" not in field and "$ref" not in field and name not in ("kind", "stem", "head")
    ]
    assert undescribed == []
