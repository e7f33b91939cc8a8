"""`maxattn bench model` and `train`: the same weights in all, outputs checked, and peers that are not there say so."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import maxattn
from maxattn import MaxViTSpec
from maxattn.bench import Result, Row, model, peers, train
from maxattn.bench.attention import attention_backends, attention_problems
from maxattn.bench.compare import Span, compare, silent
from maxattn.bench.networks import (
    Reference,
    Variant,
    case_facts,
    compiled,
    images_of,
    randomised,
    sized_spec,
    variants,
    work_of,
)
from maxattn.bench.timing import Effort, wall_clock
from maxattn.inference.gpu.costs import costs
from maxattn.ops.contract import Problem
from maxattn.ops.naive import Naive
from maxattn.ops.registry import registered

TWO_ROUNDS = Effort(least=2, most=2, sample=0)
SMALL = MaxViTSpec(name="small", img_size=32, num_classes=5, window=4, stages=[{"width": 32, "depth": 1}])


@pytest.fixture
def without_timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "timm", None)
    peers._library.cache_clear()
    yield
    peers._library.cache_clear()


def told(rows: tuple[Row, ...]) -> dict[str, tuple[bool, str]]:
    return {row.candidate: (row.time is not None, row.note) for row in rows}


def test_only_training_has_a_mode_of_its_own_for_cuda_graphs() -> None:
    with pytest.raises(ValueError, match="there are eager and compiled"):
        model.measure([SMALL], modes=["recorded"])


def test_ours_is_measured_plain_and_optimised_eager_and_compiled() -> None:
    result = model.measure([SMALL], batches=[1], effort=TWO_ROUNDS, peers=False)
    assert told(result.rows) == {
        f"maxattn {kind}, {mode}": (True, "") for kind in ("plain", "optimized") for mode in ("eager", "compiled")
    }
    for row in result.rows:
        assert row.case == {"network": "small", "img_size": 32, "batch": 1, "dtype": "float32"}
        assert row.mib is not None
        assert row.mib > 0
        assert row.attention == "sdpa"
    assert result.settings["flops_per_second"] > 1e8
    assert result.work == tuple(work_of(SMALL, 1, torch.float32))


@pytest.mark.parametrize("measure", [model.measure, train.measure], ids=["model", "train"])
def test_a_result_is_kept_after_each_case_and_finished_at_the_end(measure: Any) -> None:
    kept: list[Result] = []
    result = measure([SMALL], batches=[1, 2], modes=["eager"], peers=False, effort=TWO_ROUNDS, keep=kept.append)
    assert [(one.finished, len({row.case["batch"] for row in one.rows})) for one in kept] == [
        (False, 1),
        (False, 2),
        (True, 2),
    ]
    assert kept[-1] is result
    assert result.checked


@pytest.mark.parametrize("measure", [model.measure, train.measure], ids=["model", "train"])
def test_convolutions_are_tuned_for_all_while_they_are_measured(measure: Any) -> None:
    seen: dict[str, bool] = {}

    def show(share: float, what: str) -> None:
        seen[what] = torch.backends.cudnn.benchmark

    measure([SMALL], batches=[2], modes=["eager"], peers=False, effort=TWO_ROUNDS, show=show)
    assert seen.pop("small: weights") is False
    assert set(seen.values()) == {True}
    assert "timing" in seen
    assert not torch.backends.cudnn.benchmark


class Noting(Naive):
    name = "noting"

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        self.problems.append(problem)
        return super().attend(qkv, bias, problem)


class TestAttention:
    spec = maxattn.load_spec("nano")

    @pytest.mark.parametrize(
        ("dtype", "training"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
    )
    def test_the_problems_told_are_those_that_the_network_has(self, dtype: torch.dtype, training: bool) -> None:
        network = maxattn.build(self.spec).train(training)
        images = images_of(self.spec, 2, torch.float32, "cpu")
        if not training:
            network, images = network.to(dtype), images.to(dtype)
        autocast = torch.autocast("cpu", dtype, enabled=training)
        with registered(Noting()) as noting, maxattn.use_backend("noting"), torch.set_grad_enabled(training), autocast:
            network(images)
        told = attention_problems(self.spec, 2, dtype, "cpu", training=training)
        assert isinstance(noting, Noting)
        assert [problem for problem, _ in told] == noting.problems

    def test_who_is_asked_for_is_who_computes_it(self) -> None:
        problems = attention_problems(self.spec, 1, torch.float32, "cpu")
        with maxattn.use_backend("naive"):
            assert attention_backends(problems) == "naive"
        mixed = self.spec.override(backend="naive")
        assert attention_backends(attention_problems(mixed, 1, torch.float32, "cpu")) == "naive"


def test_the_work_of_a_network_is_that_of_its_kernels_by_kind() -> None:
    spec = maxattn.load_spec("nano")
    kernels = costs(maxattn.build(spec), 4, (28, 28), itemsize=2)
    work = work_of(spec, 4, torch.bfloat16)
    assert {one.kind: (one.bytes, one.flops) for one in work} == {
        kind: (
            sum(kernel.bytes for kernel in kernels if kernel.kind == kind),
            sum(kernel.flops for kernel in kernels if kernel.kind == kind),
        )
        for kind in {kernel.kind for kernel in kernels}
    }
    assert all(one.case == case_facts(spec, 4, torch.bfloat16) for one in work)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_timm_computes_the_same_in_both_layouts_at_any_size(dtype: torch.dtype) -> None:
    result = model.measure(
        ["maxvit_tiny_tf_224"], batches=[2], img_size=(64, 64), dtype=dtype, modes=["eager"], effort=TWO_ROUNDS
    )
    assert told(result.rows) == {
        "maxattn plain, eager": (True, ""),
        "maxattn optimized, eager": (True, ""),
        "timm, contiguous, eager": (True, ""),
        "timm, channels-last, eager": (True, ""),
        "torchvision": (False, "maxvit_t takes images of 224 pixels alone"),
    }


@pytest.mark.parametrize("size", [None, (64, 64)], ids=["published", "resized"])
def test_ours_is_what_is_measured_with_timms_weights(size: tuple[int, int] | None) -> None:
    spec = sized_spec("maxvit_tiny_tf_224", size)
    timm = peers.find_peers(spec)[0][0]
    assert timm.library == "timm"
    assert timm.spec.resolved() == spec.resolved()


def test_torchvision_computes_what_ours_of_its_details_does() -> None:
    found, reasons = peers.find_peers(maxattn.load_spec("maxvit_tiny_tf_224"))
    assert [(peer.library, peer.spec.name) for peer in found] == [
        ("timm", "maxvit_tiny_tf_224"),
        ("torchvision", "maxvit_t"),
    ]
    assert reasons == {}
    theirs = found[1]
    network = randomised(theirs.create()).eval()
    plain = maxattn.build(theirs.spec).eval()
    maxattn.load_weights(plain, network.state_dict())
    images = images_of(theirs.spec, 1, torch.float32, "cpu")
    with torch.no_grad():
        assert Reference(plain, images).wrong(network(images)) == ""
        assert "2-norm" in Reference(plain, images).wrong(randomised(network, seed=1)(images))


@pytest.mark.usefixtures("without_timm")
def test_a_library_that_is_not_installed_is_a_row_that_says_so() -> None:
    spec = SMALL.override(name="maxvit_tiny_tf_224")
    result = model.measure([spec], batches=[1], modes=["eager"], beside=["resnet18"], effort=TWO_ROUNDS)
    rows = told(result.rows)
    assert rows["timm"] == (False, "not installed: pip install timm")
    assert rows["maxattn plain, eager"] == (True, "")
    assert rows["resnet18, contiguous, eager"] == (False, "not installed: pip install timm")


def test_another_architecture_is_timed_and_said_to_be_unchecked() -> None:
    beside = ["resnet18", "deit_tiny_patch16_224", "resnt"]
    result = model.measure([SMALL], batches=[1], modes=["eager"], beside=beside, effort=TWO_ROUNDS)
    rows = told(result.rows)
    for layout in ("contiguous", "channels-last"):
        assert rows[f"deit_tiny_patch16_224, {layout}, eager"] == (True, model.UNCHECKED)
        timed, note = rows[f"resnet18, {layout}, eager"]  # it takes images of any size, and no size as an argument
        assert not timed
        assert "img_size" in note
        assert rows[f"resnt, {layout}, eager"] == (False, "has no resnt")


class TestReference:
    plain = randomised(maxattn.build("nano")).eval()
    images = images_of(plain.spec, 3, torch.float32, "cpu")

    @torch.no_grad()
    def test_grants_roundings_and_no_more(self) -> None:
        logits = self.plain(self.images)
        reference = Reference(self.plain, self.images)
        assert reference.wrong(logits) == ""
        assert reference.wrong(logits * (1 + 1e-7)) == ""
        assert "inf-norm" in reference.wrong(logits * (1 + 1e-4))

    @torch.no_grad()
    def test_notices_what_is_not_a_number_or_of_another_shape(self) -> None:
        logits = self.plain(self.images)
        reference = Reference(self.plain, self.images)
        assert reference.wrong(torch.full_like(logits, float("nan")))
        assert reference.wrong(logits[:, :3]) == "the shape is (3, 3)"
        assert reference.wrong(logits[:2]) == f"the shape is (2, {logits.shape[1]})"

    @pytest.mark.parametrize("which", [0, -1])
    @torch.no_grad()
    def test_notices_a_wrong_image_at_either_end_of_the_batch(self, which: int) -> None:
        logits = self.plain(self.images)
        logits[which] *= 1.01
        assert "2-norm" in Reference(self.plain, self.images).wrong(logits)


def windows(spec: maxattn.MaxViTSpec) -> set[object]:
    return {layer.window for stage in spec.resolved().stages for layer in stage.layers if layer.kind != "mbconv"}


def test_windows_follow_the_size_of_published_networks_alone() -> None:
    larger = sized_spec("maxvit_tiny_tf_224", (384, 384))
    published = maxattn.load_spec("maxvit_tiny_tf_384")
    assert windows(larger) == windows(published) == {(12, 12)}
    assert sized_spec("nano", (56, 56)).window == maxattn.load_spec("nano").window


class TestTraining:
    def test_timm_takes_the_same_first_step(self) -> None:
        result = train.measure(
            ["maxvit_tiny_tf_224"], batches=[2], img_size=(64, 64), modes=["eager"], effort=TWO_ROUNDS
        )
        rows = told(result.rows)
        assert [name for name, (timed, _) in rows.items() if timed] == [
            "maxattn, eager",
            "maxattn, selective, eager",
            "maxattn, checkpointed, eager",
            "timm, contiguous, eager",
            "timm, channels-last, eager",
        ]

    @pytest.mark.parametrize(
        ("device", "training", "recorded", "mode"),
        [
            ("cpu", False, False, None),
            ("cuda", False, False, "reduce-overhead"),
            ("cpu", True, False, None),
            ("cuda", True, False, None),
            ("cuda", True, True, "reduce-overhead"),
        ],
    )
    def test_cuda_graphs_are_for_inference_and_what_is_recorded(
        self, device: str, training: bool, recorded: bool, mode: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        given: dict[str, object] = {}
        monkeypatch.setattr(torch, "compile", lambda network, **options: [given.update(options), network][1])
        compiled(torch.nn.Identity(), device, training=training, recorded=recorded)
        assert given == {"dynamic": False, "mode": mode}

    def test_runs_compiled_and_under_autocast(self) -> None:
        result = train.measure([SMALL], batches=[2], dtype=torch.bfloat16, peers=False, effort=TWO_ROUNDS)
        timed = [f"maxattn, {kind}{mode}" for kind in ("", "selective, ") for mode in ("eager", "compiled")]
        assert told(result.rows) == dict.fromkeys([*timed, "maxattn, checkpointed, eager"], (True, ""))
        assert result.rows[0].case["dtype"] == "bfloat16"

    def test_memory_counts_weights_gradients_and_the_optimizers_state(self) -> None:
        rows = train.measure(["nano"], batches=[4], modes=["eager"], peers=False, effort=TWO_ROUNDS).rows
        weights = sum(weight.nbytes for weight in maxattn.build("nano").parameters()) / 2**20
        plain, selective, checkpointed = (row.mib or 0 for row in rows)
        assert 4 * weights < checkpointed < selective < plain  # weights, gradients and two moments

    def test_a_network_with_another_gradient_is_not_timed(self) -> None:
        (ours, *_), _ = variants(maxattn.load_spec("nano"), peers=False)
        other = Variant("other", "other", "contiguous", randomised(copy.deepcopy(ours.network), seed=1), ours.plain)
        images = images_of(ours.plain.spec, 2, torch.float32, "cpu")
        candidate = train._candidate(other, images, torch.float32, "eager", {})
        sampler = partial(wall_clock, device="cpu", effort=TWO_ROUNDS)
        (row,) = compare({}, [candidate], "cpu", TWO_ROUNDS, sampler, Span(silent))
        assert row.time is None
        assert "the loss is" in row.note
        assert "the norm of the gradient is" in row.note
