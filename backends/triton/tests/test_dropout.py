"""Dropout: one mask in all passes, of the rate that was asked for, governed by PyTorch's seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from nearness import assert_near
from torch import Tensor

import maxattn
from maxattn.ops.registry import registered
from maxattn_triton import Triton, configs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RATE, D = 0.4, 32


@pytest.fixture(autouse=True)
def backend() -> Iterator[None]:
    with registered(Triton()):
        yield


@pytest.fixture
def side_by_side(request: pytest.FixtureRequest) -> Iterator[None]:
    """So many windows side by side in the kernels of `tiles`."""
    launch = configs.Launch(32, 32, 4, 1, 4, sharing=request.param)
    with configs.forced("tiles.forward", launch), configs.forced("tiles.backward_queries", launch):
        yield


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def attend(qkv: Tensor, bias: Tensor | None) -> Tensor:
    torch.manual_seed(0)
    return maxattn.max_sa(qkv, "block", qkv.shape[1], bias, dropout_p=RATE, backend="triton")


def visible_mask(windows: Tensor) -> Tensor:
    """Which keys each query keeps, `(B, h, N, N)`, of images that are one window each.

    Logits are equal, and values one-hot: a channel of the output shows the weight of a key.
    """
    side, kept = windows.shape[1], []
    for keys in torch.arange(side**2).split(D):
        one_hot = torch.zeros_like(windows)
        one_hot[:, keys // side, keys % side, 2, :, keys - keys[0]] = 1
        kept.append(attend(one_hot, None).flatten(1, 2).transpose(1, 2)[..., : len(keys)] > 0)
    return torch.cat(kept, -1)


def explicit(windows: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """Attention with that mask, in PyTorch."""
    q, k, v = windows.flatten(1, 2).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / D**0.5 + bias).softmax(-1) * mask / (1 - RATE)
    return (weights.to(v.dtype) @ v).transpose(1, 2).unflatten(1, windows.shape[1:3])


def both_passes(function: Callable[..., Tensor], gradient: Tensor, *inputs: Tensor) -> list[Tensor]:
    leaves = [one.clone().requires_grad_() for one in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient.to(out.dtype))]


# The interpreter computes a second window side by side also where there is none, and NumPy warns; nothing is written.
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("window", "dtype", "side_by_side"),
    [(4, torch.float16, 1), (9, torch.float16, 1), (7, torch.float32, 1), (7, torch.float32, 2)],
    ids=["whole", "rows and columns", "tiles", "tiles, two windows side by side"],
    indirect=["side_by_side"],
)
@pytest.mark.usefixtures("side_by_side")
def test_outputs_and_gradients_are_those_of_one_mask(window: int, dtype: torch.dtype) -> None:
    windows, bias = normal(3, window, window, 3, 2, D, dtype=dtype), normal(2, window**2, window**2, dtype=dtype)
    gradient, mask = normal(3, window, window, 2, D, dtype=dtype), visible_mask(windows)
    assert abs(mask.double().mean() - (1 - RATE)) < 5 * (RATE * (1 - RATE) / mask.numel()) ** 0.5

    def plainly(windows: Tensor, bias: Tensor) -> Tensor:
        return explicit(windows, bias, mask)

    exact = both_passes(plainly, gradient, windows.double(), bias.double())
    plain = both_passes(plainly, gradient, windows, bias)
    for actual, same, wanted in zip(both_passes(attend, gradient, windows, bias), plain, exact, strict=True):
        assert_near(actual, same, wanted, dtype)


@pytest.mark.parametrize("window", [4, 12])
def test_the_mask_is_governed_by_manual_seed(window: int) -> None:
    qkv = normal(2, 12, 12, 3, 1, D, dtype=torch.float16)

    def dropped(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return maxattn.max_sa(qkv, "grid", window, dropout_p=RATE, backend="triton")

    first, again, other = dropped(0), dropped(0), dropped(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
