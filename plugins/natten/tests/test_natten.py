"""The adapter, with what NATTEN's documentation says of na2d in plain PyTorch; and reasons."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adapters
import pytest
import torch
from adapters import names_of_checks
from fresh_python import announce, hiding, python
from torch import Tensor

import maxattn
from maxattn.ops.contract import Problem, Reason
from maxattn.ops.registry import registered
from maxattn.testing import check_backend
from maxattn_natten import Natten, library
from maxattn_natten.library import Installed

PROJECT = Path(__file__).parents[1]
HOPPER = replace(adapters.HOPPER, axis="grid", height=56, width=56, bias=None, bias_requires_grad=False)
WITH_KERNELS = Installed("0.21.7+torch2120cu130", kernels=True)
LEFT_OUT = frozenset(["heads", "windows", "large_windows", "many_windows", "far_apart", "operators"])
"""Checks of sizes for which the definition below, which copies every neighbourhood, takes long; and of operators."""


def neighbours(size: int, kernel_size: int, stride: int, dilation: int) -> Tensor:
    """The pixels that each pixel of a row attends to, `(size, kernel_size)`.

    Of the pixels that are a multiple of `dilation` apart, every `stride` have one neighbourhood: `kernel_size` of them
    around the one in the middle, moved inside where it would reach over the edge.
    """
    assert kernel_size >= 2
    assert 1 <= stride <= kernel_size
    assert kernel_size * dilation <= size
    pixel = torch.arange(size)
    group, position = pixel % dilation, pixel // dilation
    members = (size - group + dilation - 1) // dilation
    leader = torch.minimum(position // stride * stride + stride // 2, members - 1)
    first = torch.minimum((leader - kernel_size // 2).clamp(min=0), members - kernel_size)
    return group[:, None] + (first[:, None] + torch.arange(kernel_size)) * dilation


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Tensor:
    """Neighborhood attention of `(B, H, W, heads, head_dim)` as natten.na2d documents it, scale None or 0 included."""
    _, H, W, _, d = query.shape
    assert d % 8 == 0
    scale = scale or d**-0.5
    rows, columns = map(neighbours, (H, W), kernel_size, stride, dilation)
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
    k, v = (x[:, rows[:, None, :, None], columns[None, :, None, :]].flatten(3, 4) for x in (k, v))
    weights = (torch.einsum("bhwnd,bhwknd->bhwnk", q, k) * scale).softmax(-1)
    return torch.einsum("bhwnk,bhwknd->bhwnd", weights, v).to(query.dtype)


class StandIn(Natten):
    """What is documented in place of NATTEN, on a CPU and in every dtype."""

    name = "stand_in"
    capabilities = replace(
        Natten.capabilities,
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
    )

    def missing(self) -> Reason | None:
        return None

    def na2d(
        self, q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int], dilation: tuple[int, int], scale: float
    ) -> Tensor:
        return na2d(q, k, v, window, window, dilation, scale)


@pytest.fixture(autouse=True)
def backend() -> Iterator[Natten]:
    with registered(Natten()) as backend:
        yield backend


def reasons(problem: Problem) -> tuple[Reason, ...]:
    (answer,) = (one for one in maxattn.explain(problem).candidates if one.name == "natten")
    return answer.reasons


@pytest.mark.parametrize("name", names_of_checks(StandIn(), "cpu", LEFT_OUT))
def test_conforms(name: str) -> None:
    (outcome,) = check_backend(StandIn(), examples=20, only=[name]).checks
    assert outcome.status == "passed", str(outcome)


def test_neighbourhoods_are_as_documented() -> None:
    assert neighbours(6, 3, stride=1, dilation=1)[:, 0].tolist() == [0, 0, 1, 2, 3, 3]
    assert neighbours(6, 3, stride=3, dilation=1)[:, 0].tolist() == [0, 0, 0, 3, 3, 3]
    assert neighbours(6, 2, stride=1, dilation=3).tolist() == [[0, 3], [1, 4], [2, 5]] * 2


@pytest.mark.parametrize(("axis", "dilation"), [("block", (1, 1)), ("grid", (2, 3))])
def test_natten_is_called_by_its_names(axis: Any, dilation: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[dict[str, Any]] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        called.append(options)
        return na2d(query, key, value, **options)

    monkeypatch.setitem(sys.modules, "natten", SimpleNamespace(na2d=spy))  # type: ignore[arg-type]
    qkv = torch.randn(2, 4, 9, 3, 1, 8, dtype=torch.float64)
    problem = replace(HOPPER, axis=axis, window=(2, 3), batch=2, height=4, width=9, heads=1, head_dim=8, scale=-0.5)
    out = Natten().attend(qkv, None, problem)
    assert called == [{"kernel_size": (2, 3), "stride": (2, 3), "dilation": dilation, "scale": 0.5}]
    torch.testing.assert_close(out, maxattn.max_sa(qkv, axis, (2, 3), scale=-0.5, backend="naive"))


def test_images_go_to_natten_as_many_at_a_time_as_a_launch_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        batches.append(query.shape[0])
        return value

    monkeypatch.setitem(sys.modules, "natten", SimpleNamespace(na2d=spy))  # type: ignore[arg-type]
    qkv = torch.zeros(1, 1, 1, 3, 1, 8).expand(300, 32, 32, 3, 1, 8)
    problem = replace(HOPPER, window=(2, 2), batch=300, height=32, width=32, heads=1, head_dim=8)
    Natten().attend(qkv, None, problem)
    assert batches == [255, 45]  # 255 * 16 * 16 windows are 65,280
    batches.clear()
    Natten().attend(qkv, None, replace(problem, axis="block"))
    assert batches == [300]


@pytest.mark.parametrize(
    ("there", "changed", "codes"),
    [
        pytest.param(Installed(None, False), {}, {"not_installed"}, id="not installed"),
        pytest.param(Installed("0.21.7", False), {}, {"not_installed"}, id="without its CUDA kernels"),
        pytest.param(Installed("0.17.5", True), {}, {"version"}, id="too old a version, without stride"),
        pytest.param(Installed("0.21.6+torch2110cu130", True), {}, {"version"}, id="too old a version"),
        pytest.param(WITH_KERNELS, {"compute_capability": (7, 5)}, {"too_old"}, id="GPU too old"),
        pytest.param(WITH_KERNELS, {"compute_capability": (13, 0)}, {"too_new"}, id="GPU too new"),
        pytest.param(WITH_KERNELS, {"compute_capability": None}, {"compute_capability"}, id="ROCm"),
        pytest.param(WITH_KERNELS, {"device": "cpu", "compute_capability": None}, {"device"}, id="cpu"),
        pytest.param(WITH_KERNELS, {"dtype": torch.float64}, {"dtype"}, id="fp64"),
        pytest.param(WITH_KERNELS, {"head_dim": 36}, {"head_dim"}, id="head dim no multiple of 8"),
        pytest.param(WITH_KERNELS, {"head_dim": 264}, {"head_dim"}, id="head dim too large"),
        pytest.param(WITH_KERNELS, {"bias": torch.bfloat16}, {"bias"}, id="bias"),
        pytest.param(
            WITH_KERNELS,
            {"bias": torch.bfloat16, "bias_requires_grad": True},
            {"bias", "bias_gradient"},
            id="gradient of a bias",
        ),
        pytest.param(WITH_KERNELS, {"dropout_p": 0.1}, {"dropout"}, id="dropout"),
        pytest.param(WITH_KERNELS, {"height": 57}, {"ragged"}, id="a height that the window does not divide"),
        pytest.param(WITH_KERNELS, {"window": (1, 7)}, {"window"}, id="a window one token high"),
        pytest.param(WITH_KERNELS, {"height": 7 * 256, "width": 7 * 128}, {"windows"}, id="too many windows"),
        pytest.param(WITH_KERNELS, {"compiling": True}, {"compile"}, id="compiling"),
        pytest.param(WITH_KERNELS, {"compiling": True, "exporting": True}, {"export"}, id="exporting"),
        pytest.param(WITH_KERNELS, {}, set(), id="able"),
        pytest.param(WITH_KERNELS, {"axis": "block", "height": 7 * 256, "width": 7 * 128}, set(), id="able, blocks"),
        pytest.param(Installed("", True), {}, set(), id="able, version not known"),
        pytest.param(WITH_KERNELS, {"deterministic": True, "dtype": torch.float32}, set(), id="able, deterministic"),
    ],
)
def test_what_it_cannot_serve_it_declines_with_a_reason(
    there: Installed, changed: dict[str, Any], codes: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "installed", lambda: there)
    assert {reason.code for reason in reasons(replace(HOPPER, **changed))} == codes


def test_what_to_install_is_told_in_a_line() -> None:
    told = str(library.missing(Installed("0.17.5", True)))
    assert told == "natten 0.17.5 is too old (pip install 'natten>=0.21.7')"
    told = str(library.missing(Installed(None, False)))
    assert told == "natten is not installed (pip install 'natten>=0.21.7')"


def test_it_is_not_chosen_before_sdpa_while_nobody_has_measured_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "installed", lambda: WITH_KERNELS)
    speeds = {one.name: one.relative_speed for one in maxattn.explain(HOPPER).candidates}
    assert 0 < speeds["natten"] < speeds["sdpa"]


@pytest.mark.parametrize("kernels", [True, False])
def test_what_is_installed_is_told_without_an_import(tmp_path: Path, kernels: bool) -> None:
    package, metadata = tmp_path / "natten", tmp_path / "natten-0.21.9.dist-info"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    if kernels:
        (package / "libnatten.abi3.so").touch()
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: NATTEN\nVersion: 0.21.9\n")
    program = "import maxattn_natten.library as library; print(*library.installed())"
    assert python(tmp_path, arguments=("-c", program)) == f"0.21.9 {kernels}\n"


def test_an_installed_plugin_without_natten_says_so(tmp_path: Path) -> None:
    announce(PROJECT, tmp_path)
    asked = ("--device", "cuda", "--compute-capability", "9.0", "--dtype", "bf16", "--no-bias", "--json")
    program = hiding(["natten"]) + "from maxattn.cli import main; main()"
    answer = json.loads(python(PROJECT / "src", tmp_path, arguments=("-c", program, "explain", *asked)))
    (told,) = (one for one in answer["candidates"] if one["name"] == "natten")
    assert [reason["code"] for reason in told["reasons"]] == ["not_installed"]


if torch.cuda.is_available() and library.missing(library.installed()) is None:

    @pytest.mark.parametrize("name", names_of_checks(Natten(), "cuda", LEFT_OUT))
    def test_conforms_by_natten_itself(name: str) -> None:
        (outcome,) = check_backend(Natten(), device="cuda", examples=50, only=[name]).checks
        assert outcome.status != "failed", str(outcome)


if find_spec("natten") is not None:

    @pytest.mark.filterwarnings("ignore")  # what it warns of, on a CPU
    @pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
    @pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3)])
    def test_natten_does_what_is_documented(stride: tuple[int, int], dilation: tuple[int, int]) -> None:
        import natten

        q, k, v = torch.randn(3, 2, 8, 13, 2, 16)
        options = {"kernel_size": (2, 3), "stride": stride, "dilation": dilation, "scale": 0.3}
        torch.testing.assert_close(natten.na2d(q, k, v, **options), na2d(q, k, v, **options))
