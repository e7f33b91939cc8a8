"""The time of a network made for inference, by kind of layer."""

from __future__ import annotations

import pytest
import torch

import maxattn
from maxattn.bench import model
from maxattn.bench.kinds import kinds_of_weights, seconds_by_kind
from maxattn.bench.networks import images_of, randomised, variants
from maxattn.bench.timing import Effort
from maxattn.inference.gpu.costs import costs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TWO_RUNS = Effort(least=2)
SPEC = maxattn.load_spec("nano").override(img_size=28)


@pytest.fixture
def network() -> maxattn.inference.network.InferenceMaxViT:
    return maxattn.optimize_for_inference(randomised(maxattn.build(SPEC))).to(DEVICE, torch.float16)


def test_each_kind_that_is_counted_is_timed(network: maxattn.inference.network.InferenceMaxViT) -> None:
    images = images_of(SPEC, 1, torch.float16, DEVICE)
    seconds = seconds_by_kind(network, images, runs=2)
    assert seconds.keys() == {cost.kind for cost in costs(network, 1, (28, 28))}
    assert all(taken > 0 for taken in seconds.values())


def test_what_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (ours,), _ = variants(SPEC, peers=False)
    images = images_of(SPEC, 1, torch.float16, DEVICE)
    seconds, why = model.by_kind(ours, images, TWO_RUNS)
    assert seconds["mlp"] > 0
    assert why == ""
    monkeypatch.setattr(model, "seconds_by_kind", lambda *arguments: 1 / 0)
    assert model.by_kind(ours, images, TWO_RUNS) == ({}, "ZeroDivisionError: division by zero")


def test_each_weight_belongs_to_a_layer(network: maxattn.inference.network.InferenceMaxViT) -> None:
    kinds = kinds_of_weights(network, images_of(SPEC, 1, torch.float16, DEVICE))
    block, attention = network.stages[0].get_submodule("blocks.0.layers.0"), next(iter(network.attentions()))
    found = {
        "conv1": block.conv1.weight,
        "laid out": network.get_submodule("stem.blocks.0.conv1").laid_out,
        "gate": block.se.fc2.bias,
        "bias": attention.rel_pos.bias,
        "qkv": attention.qkv.weight,
        "classifier": network.head.fc.weight,
    }
    assert {name: kinds[tensor.untyped_storage().data_ptr()] for name, tensor in found.items()} == {
        "conv1": "expansion",
        "laid out": "stem",
        "gate": "squeeze_excite",
        "bias": "attention",
        "qkv": "qkv",
        "classifier": "head",
    }
