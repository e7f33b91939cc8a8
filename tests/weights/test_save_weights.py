"""save_weights and open_model: a model as one file, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from random_weights import SMALL, small
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import maxattn
from maxattn.weights.files import replacing


@torch.no_grad()
def logits(model: nn.Module, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return model(torch.randn(2, 3, 36, 28, generator=torch.Generator().manual_seed(0)).to(dtype))


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
    def test_gives_bit_identical_logits_in_every_dtype(self, tmp_path: Path, dtype: torch.dtype) -> None:
        model = small().to(dtype)
        maxattn.save_weights(model, tmp_path / "small.safetensors")
        opened, extra = maxattn.open_model(tmp_path / "small.safetensors")
        assert torch.equal(logits(opened, dtype), logits(model, dtype))
        assert (opened.training, extra) == (False, {})

    def test_keeps_each_tensors_dtype(self, tmp_path: Path) -> None:
        model = small().bfloat16()
        model.head.float()
        maxattn.save_weights(model, tmp_path / "small.safetensors")
        opened, _ = maxattn.open_model(tmp_path / "small.safetensors")
        dtypes = {name: tensor.dtype for name, tensor in opened.state_dict().items()}
        assert dtypes == {name: tensor.dtype for name, tensor in model.state_dict().items()}

    def test_keeps_the_spec_as_the_model_has_changed_it(self, tmp_path: Path) -> None:
        model = small()
        model.reset_classifier(3)
        model.set_input_size(window=(5, 3))
        maxattn.save_weights(model, tmp_path / "small.safetensors")
        opened, _ = maxattn.open_model(tmp_path / "small.safetensors")
        assert opened.spec == model.spec
        assert torch.equal(logits(opened), logits(model))

    def test_takes_weights_in_any_memory_format_and_below_wrappers(self, tmp_path: Path) -> None:
        model = small().to(memory_format=torch.channels_last)
        maxattn.save_weights(torch.compile(nn.DataParallel(model), backend="eager"), tmp_path / "small.safetensors")
        opened, _ = maxattn.open_model(tmp_path / "small.safetensors")
        assert torch.equal(logits(opened), logits(small()))

    def test_keeps_what_is_saved_beside_the_weights(self, tmp_path: Path) -> None:
        extra = {"classes": ["cat", "dög"], "mean": [0.5, 0.25, 0.125], "crop": None}
        maxattn.save_weights(small(), tmp_path / "small.safetensors", extra)
        assert maxattn.open_model(tmp_path / "small.safetensors")[1] == extra

    def test_takes_overrides(self, tmp_path: Path) -> None:
        maxattn.save_weights(small(), tmp_path / "small.safetensors")
        opened, _ = maxattn.open_model(tmp_path / "small.safetensors", window=6, backend="naive", num_classes=4)
        expected = small()
        expected.set_input_size(window=6)
        expected.reset_classifier(4)
        expected.head.fc.load_state_dict(opened.head.fc.state_dict())
        with maxattn.use_backend("naive"):
            assert torch.equal(logits(opened), logits(expected))
        assert (opened.spec.backend, opened.spec.num_classes) == ("naive", 4)

    def test_holds_spec_version_and_extra_in_the_metadata(self, tmp_path: Path) -> None:
        maxattn.save_weights(small(), tmp_path / "small.safetensors", {"a": 1})
        with safe_open(tmp_path / "small.safetensors", framework="pt") as file:
            metadata = file.metadata()
        assert maxattn.MaxViTSpec.parse(metadata["maxattn.spec"]) == maxattn.load_spec(SMALL)
        assert metadata["maxattn.version"] == maxattn.__version__
        assert json.loads(metadata["maxattn.extra"]) == {"a": 1}


class TestWritesAllOrNothing:
    def test_replaces_what_was_there_and_leaves_nothing_else(self, tmp_path: Path) -> None:
        path = tmp_path / "small.safetensors"
        for model in (small(), small(1)):
            maxattn.save_weights(model, path)
        assert torch.equal(logits(maxattn.open_model(path)[0]), logits(small(1)))
        assert list(tmp_path.iterdir()) == [path]

    def test_keeps_what_was_there_where_writing_fails(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("old")
        with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:  # noqa: PT012
            temporary.write_text("half of the n")
            raise KeyboardInterrupt
        assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]

    def test_leaves_nothing_where_the_name_is_a_folders(self, tmp_path: Path) -> None:
        path = tmp_path / "small.safetensors"
        path.mkdir()
        with pytest.raises(IsADirectoryError):
            maxattn.save_weights(small(), path)
        assert list(tmp_path.rglob("*")) == [path]


class TestErrors:
    def test_another_suffix(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"name the file small\.safetensors, not small\.pth"):
            maxattn.save_weights(small(), tmp_path / "small.pth")

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(
            FileNotFoundError, match=r"no folder .*runs to write small\.safetensors to; create it first"
        ):
            maxattn.save_weights(small(), tmp_path / "runs" / "small.safetensors")

    def test_extra_that_is_no_json(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"what JSON can hold: .*Tensor"):
            maxattn.save_weights(small(), tmp_path / "small.safetensors", {"mean": torch.zeros(3)})
        assert list(tmp_path.iterdir()) == []

    def test_a_model_on_the_meta_device(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="meta device: it has no weights to save"):
            maxattn.save_weights(small().to("meta"), tmp_path / "small.safetensors")

    def test_a_model_of_another_library(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"one that maxattn\.build made, not Linear"):
            maxattn.save_weights(nn.Linear(2, 2), tmp_path / "linear.safetensors")

    def test_opening_a_file_without_a_spec(self, tmp_path: Path) -> None:
        save_file(small().state_dict(), tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match=r"no spec inside.* maxattn\.load_weights\(model, "):
            maxattn.open_model(tmp_path / "other.safetensors")

    def test_opening_with_overrides_that_the_weights_do_not_fit(self, tmp_path: Path) -> None:
        maxattn.save_weights(small(), tmp_path / "small.safetensors")
        with pytest.raises(ValueError, match="of another shape: "):
            maxattn.open_model(tmp_path / "small.safetensors", **{"stages.*.width": 48})

    def test_opening_a_file_whose_spec_is_of_another_version(self, tmp_path: Path) -> None:
        path = tmp_path / "newer.safetensors"
        metadata = {"maxattn.spec": '{"stages": [], "hyperbolic": true}', "maxattn.version": "9.0"}
        save_file(small().state_dict(), path, metadata)
        with pytest.raises(ValueError, match=r"newer\.safetensors, of maxattn 9\.0, is invalid:"):
            maxattn.open_model(path)
