"""The adapter, with PyTorch's attention where xFormers would be called and as strict about its inputs; and reasons."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from adapters import HOPPER, names_of_checks
from fresh_python import announce, hiding, python
from torch import Tensor

import maxattn
from maxattn.ops.contract import Problem, Reason
from maxattn.ops.registry import registered
from maxattn.testing import check_backend
from maxattn_xformers import Xformers, library
from maxattn_xformers.library import Installed

PROJECT = Path(__file__).parents[1]
OWN_KERNELS = Installed("0.0.35", needs_mslk=False, mslk=False)


LEFT_OUT = frozenset(["bitwise", "far_apart", "operators"])
"""Checks of determinism in training, which is declined; of gigabytes; and of own operators, of which there are none."""


class Kernel(torch.autograd.Function):
    """Nothing, but for a backward pass that is as strict as xFormers' about the gradient it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        require_aligned(grad)
        return grad


def require_aligned(x: Tensor) -> None:
    assert x.stride(-1) == 1
    assert all(step * x.element_size() % 16 == 0 for step in (x.storage_offset(), *x.stride()[:-1]))


class StandIn(Xformers):
    """PyTorch's attention on a CPU, in every dtype, refusing what xFormers and its kernel refuse."""

    name = "stand_in"
    capabilities = replace(
        Xformers.capabilities,
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
    )

    def missing(self) -> Reason | None:
        return None

    def memory_efficient_attention(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout_p: float, scale: float
    ) -> Tensor:
        windows, tokens, heads, head_dim = q.shape
        assert 0 < windows <= 65_535
        assert head_dim % 8 == 0
        assert scale > 0
        for x in (q, k, v):
            require_aligned(x)
        if bias is not None:
            assert bias.shape == (windows, heads, tokens, tokens)
            assert bias.dtype == q.dtype
            assert q.requires_grad or not bias.requires_grad
            require_aligned(bias)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return Kernel.apply(F.scaled_dot_product_attention(q, k, v, bias, dropout_p, scale=scale).transpose(1, 2))


@pytest.fixture(autouse=True)
def backend() -> Iterator[Xformers]:
    with registered(Xformers()) as backend:
        yield backend


def reasons(problem: Problem) -> tuple[Reason, ...]:
    (answer,) = (one for one in maxattn.explain(problem).candidates if one.name == "xformers")
    return answer.reasons


@pytest.mark.parametrize("name", names_of_checks(StandIn(), "cpu", LEFT_OUT))
def test_conforms(name: str) -> None:
    (outcome,) = check_backend(StandIn(), examples=10, only=[name]).checks
    assert outcome.status == "passed", str(outcome)


@pytest.mark.parametrize(
    ("there", "changed", "codes"),
    [
        pytest.param(Installed(None, False, False), {}, {"not_installed"}, id="nothing installed"),
        pytest.param(Installed("0.0.36", True, False), {}, {"not_installed"}, id="without mslk, which it needs"),
        pytest.param(Installed("0.0.33.post2", False, False), {}, {"version"}, id="too old a version"),
        pytest.param(Installed("0.0.35", False, False, "libcudart.so.12"), {}, {"version"}, id="for another CUDA"),
        pytest.param(OWN_KERNELS._replace(clash=True), {}, {"version"}, id="beside flash-attn 4 alone"),
        pytest.param(Installed(None, False, True, clash=True), {}, {"version"}, id="mslk beside flash-attn 4 alone"),
        pytest.param(OWN_KERNELS, {"requires_grad": False}, {"bias_gradient"}, id="a gradient of the bias alone"),
        pytest.param(OWN_KERNELS, {"deterministic": True}, {"deterministic"}, id="determinism"),
        pytest.param(OWN_KERNELS, {"compute_capability": (10, 0)}, {"too_new"}, id="GPU too new"),
        pytest.param(OWN_KERNELS, {"compute_capability": (7, 5)}, {"too_old"}, id="GPU too old"),
        pytest.param(OWN_KERNELS, {"compute_capability": None}, {"compute_capability"}, id="ROCm"),
        pytest.param(OWN_KERNELS, {"device": "cpu", "compute_capability": None}, {"device"}, id="cpu"),
        pytest.param(OWN_KERNELS, {"dtype": torch.float32}, {"dtype"}, id="fp32"),
        pytest.param(OWN_KERNELS, {"head_dim": 36}, {"head_dim"}, id="head dim no multiple of 8"),
        pytest.param(OWN_KERNELS, {"head_dim": 264}, {"head_dim"}, id="head dim too large"),
        pytest.param(OWN_KERNELS, {"compiling": True}, {"compile"}, id="compiling"),
        pytest.param(OWN_KERNELS, {"compiling": True, "exporting": True}, {"export"}, id="exporting"),
        pytest.param(OWN_KERNELS, {}, set(), id="able"),
        pytest.param(Installed("", False, False), {}, set(), id="able, version not known"),
        pytest.param(Installed("0.0.36", True, True), {}, set(), id="able, by mslk"),
        pytest.param(Installed(None, False, True), {}, set(), id="able, by mslk alone"),
        pytest.param(OWN_KERNELS, {"deterministic": True, "requires_grad": False, "bias": None}, set(), id="forward"),
    ],
)
def test_what_it_cannot_serve_it_declines_with_a_reason(
    there: Installed, changed: dict[str, Any], codes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "installed", lambda: there)
    problem = replace(HOPPER, **changed)
    if problem.bias is None:
        problem = replace(problem, bias_requires_grad=False)
    assert {reason.code for reason in reasons(problem)} == codes


@pytest.mark.parametrize(
    ("there", "module"),
    [
        (OWN_KERNELS, "xformers.ops.fmha"),
        (Installed("0.0.36", True, True), "xformers.ops.fmha"),
        (Installed(None, False, True), "mslk.attention.fmha"),
    ],
)
def test_the_kernel_that_takes_a_bias_is_asked_for_where_it_lives(
    there: Installed, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None, *, op: str
    ) -> tuple[Any, ...]:
        return query, attn_bias, p, scale, op

    fmha = SimpleNamespace(memory_efficient_attention=attention, MemoryEfficientAttentionCutlassOp="cutlass")
    monkeypatch.setattr(library, "installed", lambda: there)
    monkeypatch.setitem(sys.modules, module, fmha)  # type: ignore[arg-type]
    x, bias = torch.zeros(1, 4, 1, 8), torch.zeros(1, 1, 4, 4)
    assert library.memory_efficient_attention(x, x, x, bias, 0.1, 0.5) == (x, bias, 0.1, 0.5, "cutlass")


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        pytest.param({}, "xformers", id="49 tokens, training"),
        pytest.param({"requires_grad": False, "bias_requires_grad": False}, "xformers", id="49 tokens"),
        pytest.param({"requires_grad": False, "bias_requires_grad": False, "window": (12, 12)}, "sdpa", id="144"),
        pytest.param({"bias": None, "bias_requires_grad": False}, "xformers", id="49 tokens, no bias, training"),
        pytest.param(
            {"bias": None, "bias_requires_grad": False, "window": (12, 12)}, "sdpa", id="144, no bias, training"
        ),
    ],
)
def test_it_is_chosen_before_sdpa_where_it_was_measured_to_be_faster(
    changes: dict[str, Any], first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "installed", lambda: OWN_KERNELS)
    assert maxattn.explain(replace(HOPPER, **changes)).backend == first


@pytest.mark.parametrize(("requires", "needs"), [("numpy", False), ("mslk", True), ("mslk>=1.1.1", True)])
def test_what_is_installed_is_told_without_an_import(tmp_path: Path, requires: str, needs: bool) -> None:
    for package in ("xformers", "mslk"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    metadata = tmp_path / "xformers-0.0.36.dist-info"
    metadata.mkdir()
    text = f"Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.36\nRequires-Dist: {requires}\n"
    (metadata / "METADATA").write_text(text)
    program = "import maxattn_xformers.library as library; print(*library.installed()[:3])"
    assert python(tmp_path, arguments=("-c", program)) == f"0.0.36 {needs} True\n"


@pytest.mark.parametrize(
    ("files", "clash"),
    [
        pytest.param((), False, id="no flash-attn"),
        pytest.param(("cute/__init__.py",), True, id="4"),
        pytest.param(("__init__.py", "flash_attn_interface.py", "cute/__init__.py"), False, id="2 and 4"),
    ],
)
def test_flash_attn_4_alone_is_known_to_stop_xformers(files: tuple[str, ...], clash: bool, tmp_path: Path) -> None:
    for file in ("xformers/__init__.py", *(f"flash_attn/{file}" for file in files)):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("raise RuntimeError('imported')\n")
    program = hiding([] if files else ["flash_attn"])
    program += "import maxattn_xformers.library as library; print(library.installed().clash)"
    assert python(tmp_path, arguments=("-c", program)) == f"{clash}\n"


def test_an_installed_plugin_without_xformers_says_so(tmp_path: Path) -> None:
    announce(PROJECT, tmp_path)
    asked = ("--device", "cuda", "--compute-capability", "9.0", "--dtype", "bf16", "--json")
    program = hiding(["xformers", "mslk"]) + "from maxattn.cli import main; main()"
    answer = json.loads(python(PROJECT / "src", tmp_path, arguments=("-c", program, "explain", *asked)))
    assert answer["backend"] == "sdpa"
    (told,) = (one for one in answer["candidates"] if one["name"] == "xformers")
    assert [reason["code"] for reason in told["reasons"]] == ["not_installed"]


if torch.cuda.is_available() and library.missing(library.installed()) is None:

    @pytest.mark.parametrize("name", names_of_checks(Xformers(), "cuda", LEFT_OUT))
    def test_conforms_by_xformers_itself(name: str) -> None:
        (outcome,) = check_backend(Xformers(), device="cuda", examples=50, only=[name]).checks
        assert outcome.status != "failed", str(outcome)


@pytest.mark.parametrize(
    ("built_for", "cuda", "lacks"),
    [
        pytest.param(1208, "12.6", None, id="the same CUDA"),
        pytest.param(101, "13.0", "libcudart.so.1", id="another, which is not here"),
        pytest.param(None, "13.0", None, id="without CUDA"),
        pytest.param(1208, None, None, id="PyTorch without CUDA"),
    ],
)
def test_a_build_for_a_cuda_that_is_not_here_is_known_without_an_import(
    built_for: int | None, cuda: str | None, lacks: str | None, tmp_path: Path
) -> None:
    (tmp_path / "cpp_lib.json").write_text(json.dumps({"version": {"cuda": built_for}}))
    assert library.missing_cuda(tmp_path / "__init__.py", cuda) == lacks
    assert library.missing_cuda(tmp_path / "elsewhere" / "__init__.py", cuda) is None
