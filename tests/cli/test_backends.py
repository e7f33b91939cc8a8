"""`maxattn backends` and `maxattn explain`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import Result

import maxattn
from maxattn.ops.naive import Naive
from maxattn.ops.registry import registered

Run = Callable[..., Result]


class Recorder(Naive):
    """Notes the problems it solves."""

    name = "recorder"

    def __init__(self) -> None:
        self.problems: list[maxattn.Problem] = []

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: maxattn.Problem) -> Tensor:
        self.problems.append(problem)
        return super().attend(qkv, bias, problem)


class Limited(Naive):
    name = "limited"
    capabilities = maxattn.Capabilities(
        devices=frozenset({"cuda"}), dtypes=frozenset({torch.bfloat16}), compute_capability=((8, 0), (9, 0)), bias=False
    )


def plain(problem: maxattn.Problem) -> dict[str, Any]:
    """A problem as JSON gives it back."""
    values = {name: getattr(problem, name) for name in maxattn.Problem.__dataclass_fields__}
    values = {name: str(v).removeprefix("torch.") if isinstance(v, torch.dtype) else v for name, v in values.items()}
    return json.loads(json.dumps(values))


def test_backends_lists_what_each_states(run: Run) -> None:
    listed = {backend["name"]: backend for backend in json.loads(run("backends", "--json").stdout)}
    assert sorted(listed) == maxattn.list_backends()
    naive = listed["naive"]
    assert naive["distribution"] == "maxattn"
    assert naive["capabilities"]["dtypes"] == ["bfloat16", "float16", "float32", "float64"]
    assert naive["capabilities"]["double_backward"] is True
    assert naive["capabilities"]["devices"] is None


def test_backends_prints_a_column_for_each(run: Run) -> None:
    lines = run("backends").stdout.splitlines()
    assert lines[0].split() == ["backend", *maxattn.list_backends()]
    rows = {line.split("  ")[0]: line for line in lines}
    assert rows["double backward"].split()[2:4] == ["yes", "no"]
    assert {"devices", "dtypes", "tokens of a window", "dropout", "torch.compile"} <= rows.keys()


def test_explain_answers_as_the_python_function_does(run: Run) -> None:
    told = json.loads(run("explain", "--device", "cpu", "--json").stdout)
    expected = maxattn.explain(
        maxattn.Problem(
            axis="block",
            window=(7, 7),
            batch=1,
            height=56,
            width=56,
            heads=2,
            head_dim=32,
            bias=torch.float32,
        )
    )
    assert told["problem"] == plain(expected.problem)
    assert (told["backend"], told["asked_by"], told["kernel"]) == (expected.backend, "automatic", expected.kernel)
    assert [candidate["name"] for candidate in told["candidates"]] == [one.name for one in expected.candidates]


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ("--axis grid", {"axis": "grid"}),
        ("--window 7", {"window": [7, 7]}),
        ("--window 7x5", {"window": [7, 5]}),
        ("--size 56x40", {"height": 56, "width": 40}),
        ("--batch 3 --heads 4 --head-dim 16", {"batch": 3, "heads": 4, "head_dim": 16}),
        ("--dtype bf16", {"dtype": "bfloat16", "bias": "bfloat16"}),
        ("--dtype bf16 --bias-dtype float32", {"dtype": "bfloat16", "bias": "float32"}),
        ("--no-bias --train", {"bias": None, "requires_grad": True, "bias_requires_grad": False}),
        ("--train", {"requires_grad": True, "bias_requires_grad": True}),
        ("--eval", {"requires_grad": False, "bias_requires_grad": False}),
        ("--device cuda --compute-capability 9.0", {"device": "cuda", "compute_capability": [9, 0]}),
        ("--compute-capability 8.6", {"device": "cuda", "compute_capability": [8, 6]}),
        ("--device cpu", {"device": "cpu", "compute_capability": None}),
        ("--dropout 0.5 --deterministic", {"dropout_p": 0.5, "deterministic": True}),
        ("--compiling", {"compiling": True, "exporting": False}),
        ("--exporting", {"compiling": True, "exporting": True}),
    ],
)
def test_explains_options_reach_the_problem(options: str, facts: dict[str, Any], run: Run) -> None:
    problem = json.loads(run("explain", "--json", *options.split()).stdout)["problem"]
    assert {name: problem[name] for name in facts} == facts


def test_explain_gives_every_reason_in_full(run: Run) -> None:
    with registered(Limited()):
        told = run("explain", "--device", "cpu", "--dtype", "float16").stdout
    assert "-> sdpa" in told
    assert (
        "   limited  no support for cpu (devices: cuda); no support for torch.float16 (dtypes: bfloat16); "
        "a relative position bias is not supported\n" in told
    )


def test_explain_exits_with_1_if_no_backend_that_was_asked_for_is_able(run: Run) -> None:
    with registered(Limited()):
        options = ("--device", "cuda", "--compute-capability", "10.0", "--dtype", "bf16", "--no-bias", "--json")
        told = json.loads(run("explain", *options, "--backend", "limited", exit_code=1).stdout)
    assert (told["backend"], told["asked_by"], told["asked_for"]) == (None, "backend argument", ["limited"])
    (limited,) = (candidate for candidate in told["candidates"] if candidate["name"] == "limited")
    assert limited["reasons"] == [
        {"code": "too_new", "message": "compute capability 10.0 is too new", "hint": "up to 9.0"}
    ]


def test_explain_tells_the_names_near_an_unknown_backend(run: Run) -> None:
    told = run("explain", "--backend", "sdpaa", exit_code=1).stdout
    assert "no backend is named 'sdpaa' (did you mean 'sdpa'? known: naive, sdpa)" in told


def test_explain_tells_who_asked(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAXATTN_BACKEND", "naive")
    assert "-> naive, MAXATTN_BACKEND: naive" in run("explain").stdout
    assert ", backend argument: sdpa" in run("explain", "--backend", "sdpa").stdout


def test_explain_of_a_network_tells_the_problems_that_its_training_poses(run: Run) -> None:
    """The spec has all that a problem depends on: dropout, scale, windows by stage, layers in parallel, no bias."""
    spec = maxattn.MaxViTSpec(
        name="mixed",
        head_dim=8,
        attn_drop=0.25,
        attn_scale=0.5,
        stem={"width": 8, "stride": 1},
        stages=[
            {"width": 16, "depth": 2, "window": [3, 2], "layers": ["grid", "mbconv", ["block", "grid"]]},
            {"width": 32, "depth": 1, "rel_pos": "none", "layers": ["block", {"kind": "grid", "attn_drop": 0}]},
        ],
    )
    Path("mixed.yaml").write_text(spec.to_yaml(), encoding="utf-8")
    options = ("--img-size", "24x20", "--batch", "2", "--device", "cpu", "--train", "--json")
    told = json.loads(run("explain", "--spec", "mixed.yaml", *options).stdout)

    model, recorder = maxattn.build(spec).train(), Recorder()
    with registered(recorder), maxattn.use_backend("recorder"):
        model(torch.randn(2, 3, 24, 20))
    layers = [name.removesuffix(".attn") for name, module in model.named_modules() if hasattr(module, "attn_drop")]
    expected: dict[maxattn.Problem, list[str]] = {}
    for layer, problem in zip(layers, recorder.problems, strict=True):
        expected.setdefault(problem, []).append(layer)
    assert [(one["layers"], one["explanation"]["problem"]) for one in told] == [
        (names, plain(problem)) for problem, names in expected.items()
    ]


def test_explain_of_a_network_in_eval_has_no_dropout_and_no_gradient(run: Run) -> None:
    spec = maxattn.load_spec("nano").override(attn_drop=0.5)
    Path("drops.yaml").write_text(spec.to_yaml(), encoding="utf-8")
    problems = [
        one["explanation"]["problem"] for one in json.loads(run("explain", "--spec", "drops.yaml", "--json").stdout)
    ]
    assert {(problem["dropout_p"], problem["requires_grad"], problem["batch"]) for problem in problems} == {
        (0, False, 1)
    }


def test_explain_of_a_network_asks_for_its_backend_unless_told_another(run: Run) -> None:
    spec = maxattn.load_spec("nano").override(backend="naive")
    Path("naive.yaml").write_text(spec.to_yaml(), encoding="utf-8")
    for options, backend in (((), "naive"), (("--backend", "sdpa"), "sdpa")):
        told = json.loads(run("explain", "--spec", "naive.yaml", "--json", *options).stdout)
        assert {one["explanation"]["backend"] for one in told} == {backend}


def test_explain_of_a_network_names_the_layers_in_text(run: Run) -> None:
    told = run("explain", "--spec", "maxvit_tiny_tf_224", "--device", "cpu").stdout
    assert "2 layers: stages.0.blocks.0.layers.1, stages.0.blocks.1.layers.1\nblock 7x7, image 1x56x56" in told
    assert told.count("-> sdpa") == 8


def test_explain_of_a_network_without_attention_says_so(run: Run) -> None:
    Path("plain.yaml").write_text("stages: [{width: 32, depth: 1, layers: [mbconv]}]", encoding="utf-8")
    assert run("explain", "--spec", "plain.yaml").stdout == "the network has no attention layers\n"
    assert json.loads(run("explain", "--spec", "plain.yaml", "--json").stdout) == []
