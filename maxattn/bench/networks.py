"""What measurements of whole networks share: which are compared, with which weights, and when outputs are right."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from maxattn.bench.compare import Candidate, NotMeasured
from maxattn.bench.peers import LIBRARIES, find_peers
from maxattn.bench.results import Case, Work
from maxattn.build import build
from maxattn.inference.gpu.costs import costs
from maxattn.nn import MaxViT
from maxattn.ops.contract import dtype_name
from maxattn.presets import load_spec
from maxattn.spec import MaxViTSpec, pair
from maxattn.weights import load_weights

Network = TypeVar("Network", bound=nn.Module)

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
UNITS = {float("inf"): 4, 2.0: 1}
"""Units of rounding that the conformance kit grants a result, in the largest value and in the 2-norm."""


@dataclass(frozen=True)
class Variant:
    """A network as it is measured: `plain` is ours with its weights, which says what is right for it."""

    name: str
    library: str
    layout: str
    network: nn.Module
    plain: MaxViT


def sized_spec(source: str | Path | MaxViTSpec, img_size: tuple[int, int] | None) -> MaxViTSpec:
    """A spec for images of `img_size`. Windows of the published networks follow it, as in timm; others stay.

    Example:
        >>> sized_spec("maxvit_tiny_tf_224", (384, 384)).window
        'img/32'
    """
    spec = load_spec(source)
    if img_size is None or img_size == pair(spec.img_size):
        return spec
    follows = {"window": "img/32"} if "_tf_" in (spec.name or "") else {}
    return spec.override(img_size=img_size, **follows)


def variants(spec: MaxViTSpec, *, peers: bool) -> tuple[list[Variant], dict[str, str]]:
    """Ours, and the peers' in both memory layouts; and why a peer is not there. No dropout, no stochastic depth.

    Ours has timm's weights where timm has the network. Another peer's weights are compared with ours of that spec.
    """
    found, reasons = find_peers(spec) if peers else ([], dict.fromkeys(LIBRARIES, "left out"))
    networks = [(peer, randomised(peer.create())) for peer in found]
    plain = randomised(build(spec, drop_path_rate=0.0))
    theirs: list[Variant] = []
    for peer, network in networks:
        same = plain if peer.spec.resolved() == spec.resolved() else build(peer.spec, drop_path_rate=0.0)
        load_weights(same, network.state_dict())
        theirs += [Variant(f"{peer.library}, {layout}", peer.library, layout, network, same) for layout in LAYOUTS]
    return [Variant("maxattn", "maxattn", "contiguous", plain, plain), *theirs], reasons


def missing(reasons: dict[str, str]) -> Iterator[Candidate]:
    """A candidate for each library that is not there, whose row says so; one that was left out has none."""
    for library, reason in reasons.items():
        if reason != "left out":
            yield Candidate(name=library, library=library, make=_raiser(reason))


def randomised(network: Network, seed: int = 0) -> Network:
    """Fill weights, biases, norms' statistics and position tables: nothing is trivial then, and activations stay sane.

    Example:
        >>> randomised(nn.BatchNorm2d(2)).running_var > 0.4
        tensor([True, True])
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(_values(name, torch.randn(tensor.shape, generator=generator, dtype=torch.float64)))
    return network


class Reference:
    """What a network of ours must compute: its logits of a batch's first and last image in fp64, and how far its own
    dtype is from them.

    A candidate's may be twice as far, and some units of rounding: the rule for backends, on the logits. Another
    library's may be four times as far, for it may hold more in fewer bits.
    """

    def __init__(self, plain: MaxViT, images: Tensor) -> None:
        self.batch = len(images)
        images = _ends(images)
        with torch.no_grad():
            self.exact = copy.deepcopy(plain).double()(images.double())
            coarse = plain(images).double() - self.exact
        self.coarse = {norm: _norm(coarse, norm) for norm in UNITS}
        self.eps = torch.finfo(images.dtype).eps

    def wrong(self, logits: Tensor, times: int = 2) -> str:
        """What is wrong with a batch's logits, allowed `times` the plain network's error; empty if nothing is."""
        if logits.shape != (self.batch, *self.exact.shape[1:]):
            return f"the shape is {tuple(logits.shape)}"
        error, over = _ends(logits).double() - self.exact, []
        for norm, units in UNITS.items():
            seen = _norm(error, norm)
            allowed = times * self.coarse[norm] + units * self.eps * _norm(self.exact, norm)
            if not seen <= allowed:
                over.append(f"error {seen:.3g} in the {norm:g}-norm, allowed {allowed:.3g}")
        return "; ".join(over)


def images_of(spec: MaxViTSpec, batch: int, dtype: torch.dtype, device: str) -> Tensor:
    """Random images `(batch, in_chans, H, W)`."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, spec.in_chans, *pair(spec.img_size), generator=generator).to(device, dtype)


def laid_out(network: nn.Module, images: Tensor, layout: str) -> tuple[nn.Module, Tensor]:
    """A copy of the network on the device and in the dtype of the images, and the images; both in a memory layout."""
    memory_format = LAYOUTS[layout]
    copied = copy.deepcopy(network).to(images)
    return copied.to(memory_format=memory_format), images.to(memory_format=memory_format)  # type: ignore[call-overload]


def compiled(
    network: nn.Module, device: str, *, training: bool = False, recorded: bool = False
) -> Callable[[Tensor], Tensor]:
    """By `torch.compile` for one shape: for inference with frozen weights on the CPU and a CUDA graph on a GPU, as
    `maxattn.optimize_for_inference` does; in training CUDA graphs only if `recorded`."""
    mode = "reduce-overhead" if recorded or not (training or device == "cpu") else None
    function: Callable[[Tensor], Tensor] = torch.compile(network, dynamic=False, mode=mode)
    return function if training or device != "cpu" else _frozen_at_first(function)


def case_facts(spec: MaxViTSpec, batch: int, dtype: torch.dtype) -> Case:
    height, width = pair(spec.img_size)
    size: str | int = height if height == width else f"{height}x{width}"
    return {
        "network": spec.name or "unnamed",
        "img_size": size,
        "batch": batch,
        "dtype": dtype_name(dtype),
    }


def work_of(spec: MaxViTSpec, batch: int, dtype: torch.dtype, seconds: Mapping[str, float] | None = None) -> list[Work]:
    """By kind of layer, what the network made for inference on a GPU moves and computes at least.

    `seconds` are those that each kind takes, if they are known.

    Example:
        >>> [work.kind for work in work_of(load_spec("nano"), 1, torch.bfloat16)][:3]
        ['stem', 'expansion', 'depthwise']
    """
    with torch.device("meta"):
        network = build(spec)
    case, totals = case_facts(spec, batch, dtype), dict[str, Work]()
    for cost in costs(network, batch, pair(spec.img_size), dtype.itemsize):
        nothing = Work(case=case, kind=cost.kind, bytes=0, flops=0, seconds=(seconds or {}).get(cost.kind))
        so_far = totals.get(cost.kind, nothing)
        totals[cost.kind] = replace(so_far, bytes=so_far.bytes + cost.bytes, flops=so_far.flops + cost.flops)
    return list(totals.values())


def specs_of(sources: Sequence[str | Path | MaxViTSpec], img_size: tuple[int, int] | None) -> list[MaxViTSpec]:
    return [sized_spec(source, img_size) for source in sources]


def _ends(batch: Tensor) -> Tensor:
    """The first and the last of a batch."""
    return batch if len(batch) == 1 else batch[[0, -1]]


def _frozen_at_first(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    from torch._inductor import config

    fresh = True

    def call(x: Tensor) -> Tensor:
        nonlocal fresh
        if not fresh:
            return function(x)
        fresh = False
        with config.patch(freezing=True):
            return function(x)

    return call


def _values(name: str, normal: Tensor) -> Tensor:
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return normal.abs() + 0.5
    if leaf in ("table", "relative_position_bias_table"):
        return normal
    if normal.ndim > 1:
        return normal / normal[0].numel() ** 0.5
    return 1 + 0.2 * normal if leaf == "weight" else 0.2 * normal


def _norm(x: Tensor, norm: float) -> float:
    return torch.linalg.vector_norm(x, norm).item()


def _raiser(reason: str) -> Callable[[], Callable[[], object]]:
    def make() -> Callable[[], object]:
        raise NotMeasured(reason)

    return make
