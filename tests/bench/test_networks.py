"""`maxattn bench model` and `train`: the same weights in all, outputs checked, and peers that are not there say so."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch

import maxattn
from maxattn.bench import Row, model, peers, train
from maxattn.bench.compare import Span, compare, silent
from maxattn.bench.networks import Reference, Variant, images_of, randomised, sized_spec, variants
from maxattn.bench.timing import Effort, wall_clock

TWO_ROUNDS = Effort(least=2, most=2, sample=0)
SMALL = {"img_size": 64, "num_classes": 5, "stages": [{"width": 32, "depth": 1}], "name": "small"}


@pytest.fixture
def without_timm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "timm", None)
    peers._library.cache_clear()
    yield
    peers._library.cache_clear()


def told(rows: tuple[Row, ...]) -> dict[str, tuple[bool, str]]:
    return {row.candidate: (row.time is not None, row.note) for row in rows}


def test_ours_is_measured_plain_and_optimised_eager_and_compiled() -> None:
    result = model.measure(["nano"], batches=[1], effort=TWO_ROUNDS, peers=False)
    assert told(result.rows) == {
        f"maxattn {kind}, {mode}": (True, "") for kind in ("plain", "optimized") for mode in ("eager", "compiled")
    }
    for row in result.rows:
        assert row.case == {"network": "nano", "img_size": 28, "batch": 1, "dtype": "float32"}
        assert row.mib is not None
        assert row.mib > 0


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
    spec = sized_spec("maxvit_tiny_tf_224", (64, 64))
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
            "timm, contiguous, eager",
            "timm, channels-last, eager",
        ]

    def test_runs_compiled_and_under_autocast(self) -> None:
        result = train.measure(["nano"], batches=[2], dtype=torch.bfloat16, peers=False, effort=TWO_ROUNDS)
        assert told(result.rows) == {"maxattn, eager": (True, ""), "maxattn, compiled": (True, "")}
        assert result.rows[0].case["dtype"] == "bfloat16"

    def test_memory_counts_weights_gradients_and_the_optimizers_state(self) -> None:
        (row,) = train.measure(["nano"], batches=[2], modes=["eager"], peers=False, effort=TWO_ROUNDS).rows
        weights = sum(weight.nbytes for weight in maxattn.build("nano").parameters()) / 2**20
        assert row.mib is not None
        assert row.mib > 4 * weights  # weights, gradients and two moments

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
