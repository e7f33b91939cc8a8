"""A classifier as `maxattn train` saves it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_training import CLASSES, SPEC

import maxattn
from maxattn.train import Classifier
from maxattn.train.classifier import find_device
from maxattn.train.data import find_images

CPU = torch.device("cpu")


@pytest.fixture
def classifier() -> Classifier:
    return Classifier(maxattn.build(SPEC, num_classes=3), CLASSES, mean=(0.5,), std=(0.25,))


def test_a_saved_classifier_opens_as_the_same(classifier: Classifier, tmp_path: Path) -> None:
    classifier.save(tmp_path / "model.safetensors")
    again = Classifier.open(tmp_path / "model.safetensors", CPU)
    assert (again.classes, again.mean, again.std) == (CLASSES, (0.5,), (0.25,))
    images = torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8)
    assert again.logits(images).equal(classifier.logits(images))


def test_probabilities_come_for_each_file_in_order(classifier: Classifier, stripes: Path) -> None:
    files = find_images(stripes / "val")
    found = list(classifier.predict(files, batch_size=7))
    assert [file for file, _ in found] == files
    one_by_one = [probabilities for file in files for _, probabilities in classifier.predict([file])]
    torch.testing.assert_close(torch.stack([probabilities for _, probabilities in found]), torch.stack(one_by_one))
    torch.testing.assert_close(torch.stack(one_by_one).sum(-1), torch.ones(len(files)))


def test_weights_without_class_names_are_an_error_that_says_how_to_add_them(
    classifier: Classifier, tmp_path: Path
) -> None:
    maxattn.save_weights(classifier.model, tmp_path / "model.safetensors", {"mean": [0.5]})
    with pytest.raises(ValueError, match=r"lacks classes, std, .* add them: maxattn.save_weights\(model, path, extra="):
        Classifier.open(tmp_path / "model.safetensors", CPU)


@pytest.mark.parametrize("name", ["tpu", "cuda:17"])
def test_a_device_that_is_not_known_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match="device must be auto, cpu or cuda"):
        find_device(name)


def test_the_device_chosen_by_itself_is_the_gpu_if_there_is_one() -> None:
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
