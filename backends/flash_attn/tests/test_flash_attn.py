"""Which generation of flash-attn serves which problem, what is declined and why, and how each is called."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapters import HOPPER
from fresh_python import announce, hiding, python
from torch import Tensor

import maxattn
from maxattn.ops.contract import Problem, Reason
from maxattn.ops.registry import registered
from maxattn_flash_attn import FlashAttn, generations
from maxattn_flash_attn.backend import CAPABILITIES
from maxattn_flash_attn.generations import FOUR, THREE, TWO, Generation

PROJECT = Path(__file__).parents[1]
NO_GRADIENT: dict[str, Any] = {"requires_grad": False, "bias_requires_grad": False}
NO_BIAS: dict[str, Any] = {"bias": None, "bias_requires_grad": False}
ALL = {2: "2.8.4", 3: "3.0.0", 4: "4.0.0b36"}
COMPILER = "4.8.1"
"""Of flash-attn 4."""


@pytest.fixture(autouse=True)
def backend() -> Iterator[FlashAttn]:
    with registered(FlashAttn()) as backend:
        yield backend


def have(versions: dict[int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that these versions of flash-attn are installed."""
    monkeypatch.setattr(generations, "installed", lambda: tuple(versions.items()))
    monkeypatch.setattr(generations, "installed_version", lambda distribution: COMPILER)


def reasons(problem: Problem) -> tuple[Reason, ...]:
    (answer,) = (one for one in maxattn.explain(problem).candidates if one.name == "flash_attn")
    return answer.reasons


@pytest.mark.parametrize(
    ("versions", "changed", "code"),
    [
        pytest.param({}, {}, "not_installed", id="nothing installed"),
        pytest.param({3: "", 4: ""}, {"compute_capability": (8, 0)}, "not_installed", id="only for newer GPUs"),
        pytest.param({3: ""}, {"compute_capability": (10, 0)}, "not_installed", id="only for older GPUs"),
        pytest.param({2: "2.6.3"}, {}, "version", id="too old a version"),
        pytest.param({3: ""}, {"dropout_p": 0.1}, "dropout", id="dropout in 3"),
        pytest.param({4: ""}, {"dropout_p": 0.1, "compute_capability": (10, 0)}, "dropout", id="dropout in 4"),
        pytest.param(
            {2: ""},
            {"dropout_p": 0.1, "head_dim": 200, "compute_capability": (8, 9)} | NO_BIAS,
            "dropout",
            id="dropout, a large head dim and little shared memory",
        ),
        pytest.param(
            {3: ""},
            {"deterministic": True, "head_dim": 200} | NO_BIAS,
            "deterministic",
            id="determinism, large head dim",
        ),
        pytest.param(
            {4: ""}, {"deterministic": True, "compute_capability": (12, 0)}, "deterministic", id="determinism, sm120"
        ),
        pytest.param({3: ""}, {"compiling": True}, "compile", id="compiling 3"),
        pytest.param({4: ""}, {"compiling": True, "compute_capability": (10, 0)}, "compile", id="compiling 4"),
        pytest.param(ALL, {"window": (15, 15)}, "window", id="too large a window for its bias"),
        pytest.param({4: ""}, {"window": (10, 10), "compute_capability": (12, 0)}, "window", id="the same on sm120"),
        pytest.param(
            {4: ""}, {"head_dim": 136, "compute_capability": (12, 0)} | NO_BIAS, "head_dim", id="no kernel so wide"
        ),
        pytest.param(ALL, {"scale": -1e-7}, "scale", id="a scale too small for a bias beside it"),
        pytest.param(ALL, {"head_dim": 36}, "head_dim", id="head dim no multiple of 8"),
        pytest.param(ALL, {"head_dim": 264}, "head_dim", id="head dim too large"),
        pytest.param(ALL, {"dtype": torch.float32}, "dtype", id="fp32"),
        pytest.param(ALL, {"device": "cpu", "compute_capability": None}, "device", id="cpu"),
        pytest.param(ALL, {"compute_capability": (7, 5)}, "too_old", id="GPU too old"),
        pytest.param(ALL, {"compute_capability": (13, 0)}, "too_new", id="GPU too new"),
        pytest.param(ALL, {"compute_capability": None}, "compute_capability", id="ROCm"),
        pytest.param(ALL, {"compiling": True, "exporting": True}, "export", id="export"),
    ],
)
def test_what_it_cannot_serve_it_declines_with_a_reason(
    versions: dict[int, str], changed: dict[str, Any], code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(versions, monkeypatch)
    found = reasons(replace(HOPPER, **changed))
    assert {reason.code for reason in found} == {code}


@pytest.mark.parametrize(("version", "declined"), [("4.6.3", True), ("4.8.1", False), ("", False)])
def test_gradients_by_4_on_9x_take_a_compiler_with_which_they_were_seen_to_return(
    version: str, declined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    have({4: ""}, monkeypatch)
    monkeypatch.setattr(generations, "installed_version", lambda distribution: version)
    assert [reason.code for reason in reasons(HOPPER)] == ["backward"] * declined
    assert not reasons(replace(HOPPER, **NO_GRADIENT))
    assert not reasons(replace(HOPPER, compute_capability=(10, 0)))


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 0)])
@pytest.mark.parametrize("channels", [8, 40, 72, 104, 120])
def test_4_gets_head_dims_for_which_its_kernels_agree(channels: int, capability: tuple[int, int]) -> None:
    dim = FOUR.head_dim(channels, capability)
    assert dim is not None
    assert dim % 32 == 0
    assert 0 <= dim - channels < 32


@pytest.mark.parametrize(
    ("versions", "changed", "kernel"),
    [
        ((2, 3, 4), {}, "flash-attn 4, head dim 160, the bias in two terms"),
        ((2, 3), {}, "flash-attn 3, head dim 136, the bias in two terms"),
        ((2, 4), {}, "flash-attn 4, head dim 160, the bias in two terms"),
        ((2,), {}, "flash-attn 2, head dim 136, the bias in two terms"),
        ((4,), {}, "flash-attn 4, head dim 160, the bias in two terms"),
        ((2, 3, 4), NO_BIAS, "flash-attn 4, head dim 32"),
        ((2, 3, 4), {"dropout_p": 0.1}, "flash-attn 2, head dim 136, the bias in two terms"),
        ((2, 3, 4), {"compiling": True}, "flash-attn 2, head dim 136, the bias in two terms"),
        ((2, 3, 4), {"window": (12, 12)}, "flash-attn 4, head dim 192, the bias in one term"),
        ((2, 3), {"head_dim": 96, "deterministic": True}, "flash-attn 3, head dim 152, the bias in one term"),
        ((2, 3), {"head_dim": 200, "deterministic": True} | NO_BIAS, "flash-attn 2, head dim 200"),
        ((2, 3, 4), {"compute_capability": (8, 6)}, "flash-attn 2, head dim 136, the bias in two terms"),
        ((2, 3, 4), {"compute_capability": (10, 0)}, "flash-attn 4, head dim 256, the bias in two terms"),
        ((2, 4), {"compute_capability": (10, 0), "window": (4, 4)}, "flash-attn 4, head dim 64, the bias in two terms"),
        (
            (2, 4),
            {"compute_capability": (10, 0), "deterministic": True},
            "flash-attn 4, head dim 96, the bias in one term",
        ),
        ((2, 4), {"compute_capability": (10, 0), "head_dim": 160} | NO_BIAS, "flash-attn 4, head dim 256"),
        ((2,), {"compute_capability": (10, 0)}, "flash-attn 2, head dim 136, the bias in two terms"),
        ((2, 4), {"compute_capability": (12, 0)}, "flash-attn 2, head dim 136, the bias in two terms"),
        ((4,), {"compute_capability": (12, 0)}, "flash-attn 4, head dim 96, the bias in one term"),
    ],
)
def test_the_gpu_and_the_problem_decide_the_generation(
    versions: tuple[int, ...], changed: dict[str, Any], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    have({number: ALL[number] for number in versions}, monkeypatch)
    explanation = maxattn.explain(replace(HOPPER, **changed), backend="flash_attn")
    assert explanation.backend == "flash_attn"
    assert explanation.kernel == kernel


def test_a_window_too_large_is_told_the_largest_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    have(ALL, monkeypatch)
    assert {reason.hint for reason in reasons(replace(HOPPER, window=(15, 15)))} == {
        "windows of up to 224 tokens, or no bias"
    }


def test_it_is_not_chosen_before_sdpa_while_nobody_has_measured_it(monkeypatch: pytest.MonkeyPatch) -> None:
    have(ALL, monkeypatch)
    assert maxattn.explain(HOPPER).backend == "sdpa"
    have({4: ""}, monkeypatch)
    assert maxattn.explain(HOPPER).backend == "sdpa"
    assert maxattn.explain(replace(HOPPER, compute_capability=(10, 0), **NO_BIAS)).backend == "sdpa"


def test_4_is_chosen_before_sdpa_where_it_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    have({4: ""}, monkeypatch)
    for side, passes, chosen in ((7, {}, "flash_attn"), (7, NO_GRADIENT, "sdpa"), (12, NO_GRADIENT, "flash_attn")):
        problem = replace(HOPPER, window=(side, side), **NO_BIAS | passes)
        assert maxattn.explain(problem).backend == chosen


@pytest.mark.parametrize(("versions", "declared"), [(ALL, True), ({3: "", 4: ""}, False), ({}, True)])
def test_what_only_one_generation_has_is_declared_where_that_may_be(
    versions: dict[int, str], declared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(versions, monkeypatch)
    capabilities = FlashAttn().capabilities
    assert (capabilities.dropout, capabilities.compile) == (declared, declared)


def attention(qkv: Tensor, scale: float) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)


def of_two(qkv: Tensor, dropout_p: float = 0.0, softmax_scale: Any = None, *, deterministic: bool = False) -> Tensor:
    return attention(qkv, softmax_scale)


def of_three(qkv: Tensor, softmax_scale: Any = None, causal: bool = False, *, deterministic: bool = False) -> Any:
    return attention(qkv, softmax_scale)


def of_older_three(qkv: Tensor, softmax_scale: Any = None, *, deterministic: bool = False) -> Any:
    return attention(qkv, softmax_scale), None


def of_four(q: Tensor, k: Tensor, v: Tensor, qv: None = None, *, softmax_scale: Any, deterministic: bool) -> Any:
    return attention(torch.stack([q, k, v], 2), softmax_scale), None


@pytest.mark.parametrize(
    ("generation", "module", "name", "function"),
    [
        (TWO, "flash_attn", "flash_attn_qkvpacked_func", of_two),
        (THREE, "flash_attn_interface", "flash_attn_qkvpacked_func", of_three),
        (THREE, "flash_attn_interface", "flash_attn_qkvpacked_func", of_older_three),
        (FOUR, "flash_attn.cute", "flash_attn_func", of_four),
    ],
    ids=["2", "3", "3, which gave the log-sum-exp too", "4"],
)
def test_each_generation_is_called_by_its_own_signature(
    generation: Generation, module: str, name: str, function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OnCpu(FlashAttn):
        name = "on_cpu"
        capabilities = replace(CAPABILITIES, devices=frozenset({"cpu"}), dtypes=frozenset({torch.float64}))

        def generations(self, problem: Problem) -> list[Generation]:
            return [generation]

    have({generation.number: ALL[generation.number]}, monkeypatch)
    library = ModuleType(module)
    setattr(library, name, function)
    monkeypatch.setitem(sys.modules, module, library)
    qkv, bias = torch.randn(2, 9, 7, 3, 2, 16).double(), torch.randn(2, 12, 12)
    with registered(OnCpu()):
        out = maxattn.max_sa(qkv, "grid", (4, 3), bias, backend="on_cpu")
    torch.testing.assert_close(out, maxattn.max_sa(qkv, "grid", (4, 3), bias, backend="naive"))


MODULES = {one.module.split(".")[0] for one in (TWO, THREE, FOUR)}
OF_TWO = ("flash_attn/__init__.py", "flash_attn/cute/__init__.py", "flash_attn_2_cuda.py")


@pytest.mark.parametrize(
    ("files", "versions", "told"),
    [
        pytest.param(OF_TWO, {"flash-attn": "2.8.3"}, ((2, "2.8.3"),), id="2, which holds an early flash_attn.cute"),
        pytest.param(
            OF_TWO, {"flash-attn": "2.8.3", "flash-attn-4": "4.0.0b36"}, ((2, "2.8.3"), (4, "4.0.0b36")), id="2, 4"
        ),
        pytest.param(OF_TWO[1:2], {"flash-attn-4": "4.0.0b36"}, ((4, "4.0.0b36"),), id="4, in a namespace package"),
        pytest.param(("flash_attn_interface.py",), {}, ((3, ""),), id="3, of a version that is not known"),
    ],
)
def test_what_is_installed_is_told_without_an_import(
    files: tuple[str, ...], versions: dict[str, str], told: Any, tmp_path: Path
) -> None:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise RuntimeError('imported')\n")
    for name, version in versions.items():
        metadata = tmp_path / f"{name.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    modules = MODULES - {file.split("/")[0].removesuffix(".py") for file in files}
    program = "import maxattn_flash_attn.generations as generations; print(generations.installed())"
    program = hiding(modules, {one.distribution for one in (TWO, THREE, FOUR)} - set(versions)) + program
    assert python(tmp_path, arguments=("-c", program)) == f"{told}\n"


def test_an_installed_plugin_without_flash_attn_says_so(tmp_path: Path) -> None:
    announce(PROJECT, tmp_path)
    asked = ("--device", "cuda", "--compute-capability", "9.0", "--dtype", "bf16", "--json")
    program = hiding(MODULES) + "from maxattn.cli import main; main()"
    answer = json.loads(python(PROJECT / "src", tmp_path, arguments=("-c", program, "explain", *asked)))
    assert answer["backend"] == "sdpa"
    (told,) = (one for one in answer["candidates"] if one["name"] == "flash_attn")
    assert [reason["code"] for reason in told["reasons"]] == ["not_installed"]
