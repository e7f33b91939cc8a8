"""load_weights: every naming is found, all or nothing is written, every error says what would work."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import small_torchvision, timm, torchvision
from random_weights import randomise, small
from torch import Tensor, nn

import maxattn
from maxattn.ops import rel_pos

State = dict[str, Tensor]
TABLE = "stages.1.blocks.0.layers.2.attn.rel_pos.table"
SHALLOW = {"img_size": 64, "window": 2, "stages.*.depth": 1}


def snapshot(model: nn.Module) -> State:
    return {name: tensor.cpu().clone() for name, tensor in model.state_dict().items()}


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestFindsTheTensors:
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "_orig_mod.module.", "model."])
    def test_under_the_prefixes_of_wrappers(self, prefix: str) -> None:
        model, other = small(), small(1)
        report = maxattn.load_weights(model, {prefix + name: tensor for name, tensor in other.state_dict().items()})
        assert equal(snapshot(model), snapshot(other))
        assert set(report.loaded) == set(model.state_dict())

    @pytest.mark.parametrize("entry", ["state_dict", "model", "model_ema", "model_state_dict"])
    def test_in_an_entry_of_a_checkpoint(self, entry: str) -> None:
        model, other = small(), small(1)
        report = maxattn.load_weights(model, {"epoch": 3, entry: other.state_dict(), "optimizer": {"state": {}}})
        assert equal(snapshot(model), snapshot(other))
        assert report.source == f"the state dict[{entry!r}]"

    def test_averaged_ones_first(self) -> None:
        model, averaged = small(), small(1)
        ema = {f"module.{name}": tensor for name, tensor in averaged.state_dict().items()}
        checkpoint = {"model": small(2).state_dict(), "model_ema": ema | {"n_averaged": torch.tensor(9)}}
        report = maxattn.load_weights(model, checkpoint)
        assert equal(snapshot(model), snapshot(averaged))
        assert report.ignored == 1

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    def test_in_a_file_of_torch_save_with_a_training_scripts_arguments(self, tmp_path: Path, zipped: bool) -> None:
        model, other = small(), small(1)
        checkpoint = {"model": other.state_dict(), "args": argparse.Namespace(lr=1e-3), "epoch": 3}
        torch.save(checkpoint, tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
        maxattn.load_weights(model, str(tmp_path / "checkpoint.pth"))
        assert equal(snapshot(model), snapshot(other))

    def test_in_a_file_of_safetensors_whatever_it_is_called(self, tmp_path: Path) -> None:
        model, other = small(), small(1)
        maxattn.save_weights(other, tmp_path / "small.safetensors")
        (tmp_path / "small.safetensors").rename(tmp_path / "small.bin")
        maxattn.load_weights(model, tmp_path / "small.bin")
        assert equal(snapshot(model), snapshot(other))

    def test_as_arrays(self) -> None:
        model, other = small(), small(1)
        maxattn.load_weights(model, {name: tensor.numpy() for name, tensor in other.state_dict().items()})
        assert equal(snapshot(model), snapshot(other))

    def test_of_layers_in_any_order_in_our_own_naming(self) -> None:
        layers = {"stages.*.layers": ["grid", ["mbconv", "block"]]}
        model, other = small(**layers), small(1, **layers)
        assert maxattn.load_weights(model, other.state_dict()).naming == "maxattn"
        assert equal(snapshot(model), snapshot(other))

    @pytest.mark.parametrize(
        ("preset", "theirs", "ignored"),
        [
            ("maxvit_tiny_tf_224", lambda: timm.create_model("maxvit_tiny_tf_224"), 0),
            ("maxvit_t", torchvision.models.maxvit_t, 22),
        ],
        ids=["timm", "torchvision"],
    )
    def test_of_every_peers_network(self, preset: str, theirs: Callable[[], nn.Module], ignored: int) -> None:
        with torch.device("meta"):
            network = theirs()
        state = {name: tensor.new_zeros(tensor.shape, device="cpu") for name, tensor in network.state_dict().items()}
        model = maxattn.build(preset)
        report = maxattn.load_weights(model, state)
        assert set(report.loaded) == set(model.state_dict())
        assert len(report.loaded) + report.ignored == len(state)
        assert report.ignored == ignored


class TestWritesIntoTheModel:
    @pytest.mark.parametrize(
        "wrap", [partial(torch.compile, backend="eager"), nn.DataParallel], ids=["compile", "data"]
    )
    def test_also_below_a_wrapper(self, wrap: Callable[[nn.Module], nn.Module]) -> None:
        model, other = small(), small(1)
        maxattn.load_weights(wrap(model), other.state_dict())
        assert equal(snapshot(model), snapshot(other))

    def test_keeping_its_parameters_and_their_dtype(self) -> None:
        model, other = small().bfloat16(), small(1)
        before = dict(model.named_parameters())
        maxattn.load_weights(model, other.state_dict())
        assert all(parameter is before[name] for name, parameter in model.named_parameters())
        assert equal(snapshot(model), snapshot(other.bfloat16()))

    @torch.no_grad()
    def test_so_that_nothing_kept_from_the_old_weights_is_used(self) -> None:
        model, other = small(), small(1)
        x = torch.randn(1, 3, 32, 32)
        model(x)
        maxattn.load_weights(model, other.state_dict())
        assert torch.equal(model(x), other(x))

    def test_resizing_tables_of_another_window(self) -> None:
        model, other = small(window=(6, 5)), small(1)
        report = maxattn.load_weights(model, other.state_dict())
        assert report.resized.keys() == model.no_weight_decay()
        assert set(report.resized.values()) == {((4, 4), (6, 5))}
        expected = rel_pos.resize(other.state_dict()[TABLE], (6, 5))
        assert torch.equal(model.state_dict()[TABLE], expected)
        assert "resized 4 tables of relative positions: window 4 x 4 to 6 x 5" in str(report)

    def test_folding_another_attention_scale_into_q(self) -> None:
        model = maxattn.build("maxvit_t", attn_scale=0.25, **SHALLOW)
        other = maxattn.build("maxvit_t", **SHALLOW)
        state = randomise(small_torchvision()).state_dict()
        report = maxattn.load_weights(model, state)
        maxattn.load_weights(other, state)
        factors = {64: 64**-0.5 / 0.25, 128: 128**-0.5 / 0.25, 256: 256**-0.5 / 0.25, 512: 512**-0.5 / 0.25}
        assert len(report.folded) == 2 * 2 * 4 - 2 * 2 * (256**-0.5 == 0.25)
        for name, factor in report.folded.items():
            q, *kv = model.state_dict()[name].chunk(3)
            expected_q, *expected_kv = other.state_dict()[name].chunk(3)
            assert factor == factors[len(q)]
            assert torch.equal(q, (expected_q.double() * factor).float())
            assert all(map(torch.equal, kv, expected_kv))


def without(name: str) -> Callable[[State], State]:
    return lambda state: {key: tensor for key, tensor in state.items() if key != name}


def with_(name: str, tensor: Tensor) -> Callable[[State], State]:
    return lambda state: state | {name: tensor}


BROKEN = [
    pytest.param(without("stem.conv1.weight"), r"1 missing in the weights: stem\.conv1\.weight", id="missing"),
    pytest.param(
        with_("stem.conv9.weight", torch.zeros(1)), r"1 not in the model: stem\.conv9\.weight", id="unexpected"
    ),
    pytest.param(
        with_("head.norm.weight", torch.zeros(7)),
        r"1 of another shape: head\.norm\.weight \(\(7,\), the model's \(64,\)\)",
        id="shape",
    ),
    pytest.param(
        with_("head.norm.weight", torch.zeros(64, dtype=torch.int32)),
        r"head\.norm\.weight \(\(64,\) torch\.int32, the model's \(64,\)\)",
        id="dtype",
    ),
    pytest.param(with_(TABLE, torch.zeros(4, 6, 6)), r"\(4, 6, 6\), the model's \(4, 7, 7\)", id="even-table"),
    pytest.param(with_(TABLE, torch.zeros(2, 9, 9)), r"\(2, 9, 9\), the model's \(4, 7, 7\)", id="heads-of-table"),
]


class TestWeightsThatDoNotFit:
    @pytest.mark.parametrize(("broken", "message"), BROKEN)
    def test_raise_and_leave_the_model_bit_identical(self, broken: Callable[[State], State], message: str) -> None:
        model = small()
        before = snapshot(model)
        with pytest.raises(ValueError, match=message) as caught:
            maxattn.load_weights(model, broken(small(1).state_dict()))
        assert "nothing was loaded" in str(caught.value)
        assert "strict=False" in str(caught.value)
        assert equal(snapshot(model), before)

    @pytest.mark.parametrize(("broken", "message"), BROKEN)
    def test_are_left_out_and_reported_if_not_strict(self, broken: Callable[[State], State], message: str) -> None:
        model, other = small(), small(1)
        before, state = snapshot(model), broken(other.state_dict())
        report = maxattn.load_weights(model, state, strict=False)
        left = {*report.missing, *report.mismatched}
        assert left | set(report.loaded) == set(before)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name] if name in left else state[name])
        assert len(left) + len(report.unexpected) == 1

    def test_are_listed_only_in_part_but_counted(self) -> None:
        with pytest.raises(ValueError, match=r"108 missing in the weights: (\S+, ){5}\.\.\.") as caught:
            maxattn.load_weights(small(), {"stages.7.blocks.0.layers.0.conv1.weight": torch.zeros(1)})
        assert "build the model that the weights are of" in str(caught.value)

    def test_raise_even_if_not_strict_where_nothing_fits(self) -> None:
        state = {f"stages.0.blocks.0.layers.{name}": tensor for name, tensor in small().state_dict().items()}
        with pytest.raises(ValueError, match="nothing was loaded"):
            maxattn.load_weights(small(), state, strict=False)

    def test_name_open_model_where_the_file_holds_its_spec(self, tmp_path: Path) -> None:
        path = tmp_path / "wide.safetensors"
        maxattn.save_weights(small(**{"stages.*.width": 48}), path)
        with pytest.raises(ValueError, match="would build it") as caught:
            maxattn.load_weights(small(), path)
        assert f"maxattn.open_model({str(path)!r})" in str(caught.value)

    def test_for_another_number_of_classes_say_so(self) -> None:
        with pytest.raises(ValueError, match="of 5 classes, the model's of 10: build with num_classes=5, or keep"):
            maxattn.load_weights(small(), small(1, num_classes=5).state_dict())

    def test_for_another_number_of_classes_leave_the_classifier_fresh_if_not_strict(self) -> None:
        model, other = small(), small(1, num_classes=5)
        fresh = model.head.fc.weight.clone()
        report = maxattn.load_weights(model, other.state_dict(), strict=False)
        assert report.mismatched.keys() == {"head.fc.weight", "head.fc.bias"}
        assert report.num_classes == 5
        assert torch.equal(model.head.fc.weight, fresh)
        assert torch.equal(model.head.norm.weight, other.head.norm.weight)

    def test_for_a_classifier_where_the_model_has_none_say_so(self) -> None:
        model, other = small(num_classes=0), small(1)
        with pytest.raises(ValueError, match="model's of 0: build with num_classes=10, or leave it out"):
            maxattn.load_weights(model, other.state_dict())
        report = maxattn.load_weights(model, other.state_dict(), strict=False)
        assert report.unexpected == ("head.fc.weight", "head.fc.bias")

    def test_into_other_layers_than_the_peers_have_say_so(self) -> None:
        model = maxattn.build("maxvit_tiny_tf_224", **{"stages.2.layers": ["block", ["mbconv", "grid"]], **SHALLOW})
        state = timm.create_model("maxvit_tiny_tf_224", img_size=64, depths=(1, 1, 1, 1)).state_dict()
        with pytest.raises(ValueError, match=r"stage 2 of the model has \['block', \['mbconv', 'grid'\]\]"):
            maxattn.load_weights(model, state, strict=False)

    @pytest.mark.parametrize("name", ["maxvit_pico_rw_256", "maxxvit_rmlp_nano_rw_256", "maxvit_tiny_pm_256"])
    def test_of_timms_other_families_are_refused_even_if_not_strict(self, name: str) -> None:
        with torch.device("meta"):
            state = timm.create_model(name).state_dict()
        state = {name: tensor.new_zeros(tensor.shape, device="cpu") for name, tensor in state.items()}
        with pytest.raises(ValueError, match=r"of timm's networks the maxvit_\*_tf_\* can be loaded"):
            maxattn.load_weights(small(), state, strict=False)

    def test_of_another_library_are_shown(self) -> None:
        state = {"conv1.weight": torch.zeros(1), "layer1.0.conv1.weight": torch.zeros(1)}
        with pytest.raises(ValueError, match=r"no MaxViT .* 2 tensors are conv1\.weight, layer1\.0\.conv1\.weight"):
            maxattn.load_weights(small(), state)

    @pytest.mark.parametrize("state", [{}, {"epoch": 3, "lr": 0.1}, {"model": {}}], ids=["empty", "plain", "nested"])
    def test_without_tensors_are_no_weights(self, state: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match="holds no tensors"):
            maxattn.load_weights(small(), state)

    def test_must_be_a_path_or_a_state_dict(self) -> None:
        with pytest.raises(TypeError, match=r"not MaxViT; of a module, \.state_dict\(\)"):
            maxattn.load_weights(small(), small())  # type: ignore[arg-type]


class TestModelsThatTakeNone:
    def test_on_the_meta_device(self) -> None:
        with pytest.raises(ValueError, match=r"meta device .* model\.to_empty"):
            maxattn.load_weights(small().to("meta"), small().state_dict())

    def test_of_other_libraries(self) -> None:
        with pytest.raises(TypeError, match=r"one that maxattn\.build made, not Linear"):
            maxattn.load_weights(nn.Linear(2, 2), small().state_dict())


class Unknown:
    """Something in a pickle that is no tensor."""


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def write_cut_safetensors(path: Path) -> None:
    maxattn.save_weights(small(), path)
    cut(path, 0.5)


def write_cut_zip(path: Path) -> None:
    torch.save(small().state_dict(), path)
    cut(path, 0.9)


def write_cut_legacy(path: Path) -> None:
    torch.save(small().state_dict(), path, _use_new_zipfile_serialization=False)
    cut(path, 0.5)


UNREADABLE = [
    pytest.param("a.safetensors", write_cut_safetensors, "no complete safetensors file .* download it again", id="cut"),
    pytest.param("a.safetensors", lambda path: path.write_bytes(b"\x10\0"), "no complete safetensors file", id="head"),
    pytest.param("a.pth", write_cut_zip, r"no complete file of torch\.save .* download it again", id="cut-zip"),
    pytest.param("a.pth", write_cut_legacy, r"no complete file of torch\.save .* download it again", id="cut-legacy"),
    pytest.param("a.pth", lambda path: path.write_text("version 1\n"), "begins with the text 'version 1'", id="text"),
    pytest.param("a.safetensors", lambda path: path.write_text("<html>\n"), "the text '<html>'", id="html"),
    pytest.param("a.h5", lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n"), "it begins with .*HDF", id="hdf5"),
    pytest.param("a.pth", Path.touch, r"is empty \(0 bytes\)", id="empty"),
    pytest.param("a.pth", lambda path: torch.save([1, 2], path), "holds a list, no state dict", id="list"),
    pytest.param("a.npz", lambda path: np.savez(path, a=np.zeros(1)), r"dict\(numpy\.load\(path\)\)", id="npz"),
    pytest.param("a.pth", lambda path: torch.save({"x": Unknown()}, path), "refused: .*Unknown.* any code", id="class"),
    pytest.param("a.pth", lambda path: torch.save(small(), path), "refused: .*MaxViT.* any code", id="module"),
    pytest.param("a.pkl", lambda path: path.write_bytes(pickle.dumps({"x": Unknown()})), "refused: ", id="pickle"),
]


class TestUnreadableFiles:
    @pytest.mark.parametrize(("name", "write", "message"), UNREADABLE)
    def test_raise_saying_what_they_look_like_and_leave_the_model_bit_identical(
        self, tmp_path: Path, name: str, write: Callable[[Path], object], message: str
    ) -> None:
        path, model = tmp_path / name, small()
        before = snapshot(model)
        write(path)
        with pytest.raises(ValueError, match=message) as caught:
            maxattn.load_weights(model, path)
        assert str(caught.value).startswith(str(path))
        assert equal(snapshot(model), before)

    def test_that_are_missing(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no weights file .*none\.pth; give the path of a \.safetensors"):
            maxattn.load_weights(small(), tmp_path / "none.pth")

    def test_that_are_folders(self, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match=r"is a folder, .* give the path of a \.safetensors"):
            maxattn.load_weights(small(), tmp_path)


def test_the_report_is_plain_data_and_readable() -> None:
    model = maxattn.build("maxvit_t", attn_scale="head_dim", num_classes=5, **(SHALLOW | {"window": 3}))
    report = maxattn.load_weights(model, small_torchvision().state_dict(), strict=False)
    assert str(report).splitlines() == [
        "loaded 216 tensors of the state dict, in torchvision's naming",
        "resized 8 tables of relative positions: window 2 x 2 to 3 x 3",
        "multiplied q by 0.25, 0.3536, 0.5, 0.7071 in 16: another attention scale",
        "1 of another shape: head.fc.weight ((1000, 512), the model's (5, 512))",
        "ignored 8 entries that are of no use",
    ]
    data = json.loads(json.dumps(report.to_dict()))
    assert data["naming"] == "torchvision"
    assert data["num_classes"] == 1000
    assert data["resized"]["stages.0.blocks.0.layers.1.attn.rel_pos.table"] == [[2, 2], [3, 3]]
