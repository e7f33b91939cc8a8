"""The kernels against their references: within twice the error that plain PyTorch has in the same dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from maxattn.inference.gpu import launches, ops, reference
from maxattn.inference.layers import FusedAvgPool2d
from maxattn.ops.devices import on_device_of
from maxattn.testing.budget import UNITS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # of NumPy, interpreting
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
ACTIVATIONS = list(reference.ACTIVATIONS)


@pytest.fixture(autouse=True)
def fresh_memory_is_not_a_number(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills it
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def in_fp64(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def assert_within_budget(actual: Tensor, same: Tensor, exact: Tensor) -> None:
    """At most twice the error of `same`, and some roundings of the result."""
    assert actual.shape == exact.shape
    assert actual.is_contiguous()
    for order, units in ((float("inf"), UNITS["max"]), (2.0, UNITS["2-norm"])):
        allowed = 2 * torch.linalg.vector_norm(same.double() - exact, order)
        allowed += units * torch.finfo(same.dtype).eps * torch.linalg.vector_norm(exact, order)
        assert torch.linalg.vector_norm(actual.double() - exact, order) <= allowed


def test_each_launch_is_on_the_device_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Tensor] = []
    monkeypatch.setattr(ops, "on_device_of", lambda tensor: [entered.append(tensor), on_device_of(tensor)][1])
    launched: list[int] = []
    launch = ops.launch
    monkeypatch.setattr(ops, "launch", lambda *given: [launched.append(len(entered)), launch(*given)][1])
    x, weight = normal(1, 2, 2, 16, dtype=torch.float16), normal(16, 16, dtype=torch.float16)
    ops.pointwise(x, weight, None, "none", None, None)
    ops.narrow(x, weight, None, "none", "none", 0.0)
    ops.norm(x, "layer_norm", 1e-5)
    ops.mlp(x, weight, None, weight, None, "none", "none", 0.0)
    ops.pool(x, 2, 2, 0, False)
    ops.depthwise(x, normal(3, 3, 16, dtype=torch.float16), None, "none", 1, [1, 1, 1, 1], False)
    ops.convolution(x.permute(0, 3, 1, 2), weight[:, None, None], None, "none", 1, [0, 0, 0, 0])
    assert launched == [1, 2, 3, 4, 5, 6, 7]
    assert {tensor.device for tensor in entered} == {x.device}


class TestPointwise:
    @staticmethod
    def check(**arguments: Any) -> None:
        exact = reference.pointwise(**in_fp64(arguments))
        given = {"bias": None, "act": "none", "gate": None, "residual": None} | arguments
        assert_within_budget(ops.pointwise(**given), reference.pointwise(**arguments), exact)

    @DTYPES
    @pytest.mark.parametrize("size", [(1, 1, 1), (2, 5, 7), (3, 13, 11), (3, 7, 7)], ids=str)
    @pytest.mark.parametrize("widths", [(24, 40), (64, 64), (72, 136), (96, 200), (1, 1)], ids=str)
    def test_gate_and_residual_of_any_size(
        self, size: tuple[int, ...], widths: tuple[int, int], dtype: torch.dtype
    ) -> None:
        K, N = widths
        self.check(
            x=normal(*size, K, dtype=dtype),
            weight=normal(N, K, dtype=dtype) / K**0.5,
            bias=normal(N, dtype=dtype),
            gate=normal(size[0], K, dtype=dtype).sigmoid(),
            residual=normal(*size, N, dtype=dtype, seed=1),
        )

    @DTYPES
    @pytest.mark.parametrize("act", ACTIVATIONS)
    @pytest.mark.parametrize("biased", [False, True])
    def test_every_activation(self, act: str, biased: bool, dtype: torch.dtype) -> None:
        x = torch.linspace(-12, 12, 40 * 32, device=DEVICE).view(1, 5, 8, 32).to(dtype)
        bias = normal(32, dtype=dtype) if biased else None
        self.check(x=x, weight=torch.eye(32, device=DEVICE, dtype=dtype), bias=bias, act=act)

    @pytest.mark.parametrize("act", ACTIVATIONS)
    def test_what_is_not_a_number_stays_so(self, act: str) -> None:
        x = normal(1, 2, 3, 32, dtype=torch.float16)
        x[0, 1, 2, 5] = torch.nan
        out = ops.pointwise(x, torch.eye(32, device=DEVICE, dtype=x.dtype), None, act, None, None)
        assert out.isnan().any(-1).flatten().tolist() == [False] * 5 + [True]

    def test_many_rows_are_cut_otherwise(self) -> None:
        few, many = (launches.pointwise(rows, 256, 64, False) for rows in (64, 10**6))
        assert few != many
        x, weight = normal(1, 97, 90, 16, dtype=torch.float16), normal(16, 16, dtype=torch.float16)
        assert launches.pointwise(97 * 90, 16, 16, False).rows == many.rows
        self.check(x=x, weight=weight, residual=x)

    def test_is_an_operator(self) -> None:
        x, weight = normal(2, 3, 3, 16, dtype=torch.float16), normal(8, 16, dtype=torch.float16)
        opcheck(ops.pointwise, (x, weight, None, "gelu", None, None))
        opcheck(ops.pointwise, (x, weight, weight[:, 0], "none", normal(2, 16, dtype=torch.float16), x[..., :8]))


DEVIATIONS = pytest.mark.parametrize("deviations", [0.0, 10.0, 300.0])
NORMS = pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])


class TestNorm:
    @DTYPES
    @NORMS
    @DEVIATIONS
    @pytest.mark.parametrize("size", [(2, 5, 7, 24), (1, 3, 3, 512), (3, 7), (1, 1, 9, 1000), (1, 1)], ids=str)
    def test_of_any_width(self, size: tuple[int, ...], deviations: float, norm: str, dtype: torch.dtype) -> None:
        x = (normal(*size, dtype=dtype) + deviations) * 3
        same, exact = (reference.norm(each, norm, 1e-5) for each in (x, x.double()))
        assert_within_budget(ops.norm(x, norm, 1e-5), same, exact)

    def test_is_an_operator(self) -> None:
        opcheck(ops.norm, (normal(2, 3, 3, 16, dtype=torch.float16), "layer_norm", 1e-5))


class TestNarrow:
    @staticmethod
    def check(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> None:
        given = (x, weight, bias)
        exact = reference.narrow(*(None if each is None else each.double() for each in given), *rest)
        assert_within_budget(ops.narrow(*given, *rest), reference.narrow(*given, *rest), exact)

    @DTYPES
    @NORMS
    @DEVIATIONS
    @pytest.mark.parametrize("widths", [(24, 40), (64, 192), (128, 16), (7, 5)], ids=str)
    def test_norm_within(self, widths: tuple[int, int], deviations: float, norm: str, dtype: torch.dtype) -> None:
        C, N = widths
        x = (normal(2, 5, 7, C, dtype=dtype) + deviations) * 3
        weight, bias = normal(N, C, dtype=dtype) / C**0.5, normal(N, dtype=dtype)
        self.check(x, weight, bias, "gelu_tanh", norm, 1e-5)

    @DTYPES
    @pytest.mark.parametrize("size", [(1, 1, 1), (3, 13, 11)], ids=str)
    def test_without_norm_and_bias(self, size: tuple[int, ...], dtype: torch.dtype) -> None:
        x, weight = normal(*size, 48, dtype=dtype), normal(136, 48, dtype=dtype) / 7
        self.check(x, weight, None, "silu", "none", 0.0)

    @DTYPES
    def test_norm_of_equal_channels_is_nothing(self, dtype: torch.dtype) -> None:
        x, weight = torch.full((1, 3, 3, 48), 77.0, device=DEVICE, dtype=dtype), normal(32, 48, dtype=dtype)
        self.check(x, weight, None, "none", "layer_norm", 1e-5)

    def test_is_an_operator(self) -> None:
        x, weight = normal(2, 3, 3, 16, dtype=torch.float16), normal(8, 16, dtype=torch.float16)
        opcheck(ops.narrow, (x, weight, weight[:, 0], "gelu", "layer_norm", 1e-5))


class TestMLP:
    @DTYPES
    @pytest.mark.parametrize("norm", ["none", "layer_norm", "rms_norm"])
    @pytest.mark.parametrize("widths", [(16, 64), (24, 100), (96, 128), (128, 24), (5, 7)], ids=str)
    @pytest.mark.parametrize("size", [(1, 1, 1), (2, 9, 13)], ids=str)
    def test_any_size(self, size: tuple[int, ...], widths: tuple[int, int], norm: str, dtype: torch.dtype) -> None:
        C, hidden = widths
        arguments = {
            "x": normal(*size, C, dtype=dtype) * 3 + 10,
            "weight1": normal(hidden, C, dtype=dtype) / C**0.5,
            "bias1": normal(hidden, dtype=dtype) if norm == "none" else None,
            "weight2": normal(C, hidden, dtype=dtype, seed=1) / hidden**0.5,
            "bias2": normal(C, dtype=dtype) if norm != "none" else None,
            "act": "gelu",
            "norm_kind": norm,
            "eps": 1e-5,
        }
        same, exact = reference.mlp(**arguments), reference.mlp(**in_fp64(arguments))
        assert_within_budget(ops.mlp(*arguments.values()), same, exact)

    def test_is_an_operator(self) -> None:
        x, weight = normal(2, 3, 3, 16, dtype=torch.float16), normal(32, 16, dtype=torch.float16)
        opcheck(ops.mlp, (x, weight, weight[:, 0], weight.t(), None, "silu", "layer_norm", 1e-5))


class TestDepthwise:
    @DTYPES
    @pytest.mark.parametrize(
        ("stride", "padding"),
        [(1, (1, 1, 1, 1)), (2, (1, 1, 1, 1)), (2, (0, 1, 1, 1)), (2, (1, 1, 0, 1))],
        ids=str,
    )
    @pytest.mark.parametrize(
        "size", [(1, 9, 13, 72), (2, 8, 18, 24), (1, 2, 2, 64), (1, 19, 6, 8), (1, 5, 7, 130), (1, 7, 10, 128)], ids=str
    )
    def test_any_size_and_padding(
        self, size: tuple[int, ...], stride: int, padding: tuple[int, int, int, int], dtype: torch.dtype
    ) -> None:
        arguments = {
            "x": normal(*size, dtype=dtype),
            "weight": normal(3, 3, size[-1], dtype=dtype) / 3,
            "bias": normal(size[-1], dtype=dtype),
            "act": "gelu_tanh",
        }
        y, means = ops.depthwise(*arguments.values(), stride, list(padding), True)
        same = reference.depthwise(**arguments, stride=stride, padding=padding)
        exact = reference.depthwise(**in_fp64(arguments), stride=stride, padding=padding)
        assert_within_budget(y, same[0], exact[0])
        assert means.dtype == torch.float32
        assert_within_budget(means.sum(1).to(dtype), same[1], exact[1])

    @pytest.mark.parametrize("act", ACTIVATIONS)
    def test_every_activation_without_bias_and_mean(self, act: str) -> None:
        x, weight = normal(1, 5, 5, 16, dtype=torch.float16) * 4, normal(3, 3, 16, dtype=torch.float16)
        y, means = ops.depthwise(x, weight, None, act, 1, [1, 1, 1, 1], False)
        exact, _ = reference.depthwise(x.double(), weight.double(), act=act)
        assert_within_budget(y, reference.depthwise(x, weight, act=act)[0], exact)
        assert means.numel() == 0

    def test_the_mean_is_the_same_bit_by_bit_in_every_run(self) -> None:
        x, weight = normal(1, 17, 3, 16, dtype=torch.float16), normal(3, 3, 16, dtype=torch.float16)
        first, second = (ops.depthwise(x, weight, None, "silu", 1, [1, 1, 1, 1], True)[1] for _ in range(2))
        assert first.shape[1] > 1
        assert first.equal(second)

    def test_is_an_operator(self) -> None:
        x, weight = normal(2, 5, 6, 16, dtype=torch.float16), normal(3, 3, 16, dtype=torch.float16)
        opcheck(ops.depthwise, (x, weight, weight[0, 0], "silu", 2, [0, 1, 0, 1], True))


class TestConvolution:
    @DTYPES
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize(
        ("channels", "width", "kernel", "stride", "padding"),
        [
            (3, 24, 3, 2, (0, 1, 0, 1)),
            (1, 16, 5, 2, (2, 2, 1, 2)),
            (16, 40, 3, 1, (1, 1, 1, 1)),
            (20, 16, 3, 1, (1, 1, 1, 1)),
            (64, 72, 3, 1, (1, 1, 1, 1)),
            (128, 16, 3, 1, (1, 1, 1, 1)),
        ],
    )
    def test_any_kernel_and_layout(
        self,
        channels: int,
        width: int,
        kernel: int,
        stride: int,
        padding: tuple[int, int, int, int],
        layout: torch.memory_format,
        dtype: torch.dtype,
    ) -> None:
        arguments = {
            "x": normal(2, channels, 9, 14, dtype=dtype).contiguous(memory_format=layout),
            "weight": normal(width, kernel, kernel, channels, dtype=dtype) / (kernel * channels**0.5),
            "bias": normal(width, dtype=dtype),
            "act": "gelu",
            "stride": stride,
        }
        y = ops.convolution(*arguments.values(), list(padding))
        exact = reference.convolution(**in_fp64(arguments), padding=padding)
        assert_within_budget(y, reference.convolution(**arguments, padding=padding), exact)

    def test_offsets_within_an_image_need_64_bits(self) -> None:
        far = 1 << 30  # elements from channel to channel
        memory = torch.from_numpy(np.zeros(2 * far + 16, np.float16)).to(DEVICE)  # no memory where nothing is written
        x, weight = memory.as_strided((1, 3, 4, 4), (0, far, 4, 1)), normal(16, 1, 1, 3, dtype=torch.float16)
        x.copy_(normal(1, 3, 4, 4, dtype=torch.float16))
        apart = ops.convolution(x, weight, None, "none", 1, [0, 0, 0, 0])
        assert apart.equal(ops.convolution(x.contiguous(), weight, None, "none", 1, [0, 0, 0, 0]))

    def test_is_an_operator(self) -> None:
        x, weight = normal(2, 3, 7, 6, dtype=torch.float16), normal(8, 3, 3, 3, dtype=torch.float16)
        opcheck(ops.convolution, (x, weight, None, "relu", 2, [0, 1, 0, 1]))


class TestPool:
    @DTYPES
    @pytest.mark.parametrize(("kernel", "padding", "padded"), [(2, 0, False), (3, 1, True)], ids=str)
    @pytest.mark.parametrize("size", [(2, 8, 6, 24), (1, 7, 9, 130), (3, 1, 1, 16)], ids=str)
    def test_any_size(self, size: tuple[int, ...], kernel: int, padding: int, padded: bool, dtype: torch.dtype) -> None:
        x, given = normal(*size, dtype=dtype), (kernel, 2, padding, padded)
        same, exact = (reference.pool(each, *given) for each in (x, x.double()))
        assert_within_budget(ops.pool(x, *given), same, exact)

    @pytest.mark.parametrize(
        "given",
        [
            (2, 2, 0, True, False),
            (3, 2, 1, False, True),
            (2, 2),
            (2, 2, 0, True, False, 3),
            ((2, 2), (2, 2), (0, 0), True, False),
            (3, 1, 1),
        ],
        ids=str,
    )
    def test_a_layer_is_what_it_was_made_from(self, given: tuple[Any, ...]) -> None:
        layer, x = nn.AvgPool2d(*given), normal(2, 24, 7, 9, dtype=torch.float16)
        x = x.to(memory_format=torch.channels_last)
        pooled = (each.permute(0, 2, 3, 1) for each in (FusedAvgPool2d(layer)(x), layer(x), layer(x.double())))
        assert_within_budget(*pooled)

    def test_is_an_operator(self) -> None:
        opcheck(ops.pool, (normal(2, 5, 6, 16, dtype=torch.float16), 2, 2, 0, False))
