"""`optimize_for_inference`: the same numbers from less work, a plain network left alone, and nothing else allowed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from random_weights import randomise
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import maxattn
from maxattn.inference import InferenceMaxViT, network, onednn
from maxattn.nn import MaxViT
from maxattn.nn.attention import MLP
from maxattn.testing.budget import UNITS

LOADS_DECOMPOSITIONS = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
SMALL = {
    "num_classes": 5,
    "head_dim": 8,
    "window": 3,
    "stem": {"width": 8},
    "stages": [{"width": 16, "depth": 1}, {"width": 24, "depth": 2}],
}


def small(dtype: torch.dtype = torch.float32, **overrides: Any) -> MaxViT:
    """A network with everything in it random, norms and their statistics too."""
    torch.manual_seed(0)
    model = maxattn.build(SMALL, **overrides)
    randomise(model)
    return model.to(dtype).eval()


def images(batch: int = 2, height: int = 28, width: int = 19, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64).to(dtype)


def assert_equal_in_fp64(optimized: Tensor, plain: Tensor) -> None:
    torch.testing.assert_close(optimized, plain, rtol=1e-11, atol=1e-11 * plain.abs().max().item())


def assert_within_budget(plain_model: MaxViT, optimized: Tensor, x: Tensor) -> None:
    """At most twice as far from exact as the plain network in the same dtype, and some roundings of the result: those
    that the conformance kit grants a backend."""
    with torch.no_grad():
        plain, exact = plain_model(x).double(), copy.deepcopy(plain_model).double()(x.double())
    for order, units in ((float("inf"), UNITS["max"]), (2.0, UNITS["2-norm"])):
        allowed = 2 * torch.linalg.vector_norm(plain - exact, order)
        allowed += units * torch.finfo(x.dtype).eps * torch.linalg.vector_norm(exact, order)
        assert torch.linalg.vector_norm(optimized.double() - exact, order) <= allowed


class Seen(TorchDispatchMode):
    """The names of the operators that run, and the most bytes that one of them returns."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names.add(func.overloadpacket.__name__)
        self.largest = max(self.largest, result.nbytes if isinstance(result, Tensor) and not result.is_mkldnn else 0)
        return result


@contextmanager
def without_onednn() -> Iterator[None]:
    with torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        yield


class TestTheSameNumbers:
    @pytest.mark.parametrize("size", [(28, 19), (15, 16), (1, 2)], ids=str)
    @pytest.mark.parametrize(
        "overrides",
        [
            {},
            {"conv_norm": "group_norm"},
            {"conv_norm": "layer_norm"},
            {"attn_norm": "rms_norm"},
            {"layer_scale": 0.3},
            {"rel_pos": "none"},
            {"rel_pos": "log_mlp"},
            {"qkv_bias": False},
            {"mlp_ratio": 0},
            {"se_ratio": 0},
            {"kernel_size": 5},
            {"padding": "symmetric", "shortcut_pool": "max3", "shortcut_conv": "stride"},
            {"act": "gelu"},
            {"act": "silu"},
            {"act": "relu"},
            {"head": {"kind": "linear"}},
            {"num_classes": 0},
            {"stem": {"width": 8, "stride": 1}},
            {"stem": {"width": 8, "kernel_size": 5, "first_bias": False}},
            {"stages.*.layers": ["grid", "mbconv", "block"]},
            {"stages.*.layers": ["block", "grid"]},
            {"stages.*.layers": [["mbconv", "block"], "grid"]},
            {"attn_drop": 0.5, "proj_drop": 0.5, "drop_path_rate": 0.5, "head": {"kind": "mlp", "dropout": 0.5}},
        ],
        ids=str,
    )
    def test_in_fp64_for_any_spec_and_size(self, overrides: dict[str, Any], size: tuple[int, int]) -> None:
        model, x = small(torch.float64, **overrides), images(2, *size, torch.float64)
        optimized = maxattn.optimize_for_inference(model)
        with torch.no_grad():
            assert_equal_in_fp64(optimized(x), model(x))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("act", ["gelu_tanh", "gelu", "silu", "relu"])
    def test_within_the_error_budget_with_and_without_onednn(self, act: str, dtype: torch.dtype) -> None:
        model, x = small(dtype, act=act), images(dtype=dtype)
        optimized = maxattn.optimize_for_inference(model)
        assert_within_budget(model, optimized(x), x)
        with without_onednn():
            assert_within_budget(model, optimized(x), x)

    def test_of_every_method(self) -> None:
        model, x = small(torch.float64), images(dtype=torch.float64)
        optimized = maxattn.optimize_for_inference(model)
        with torch.no_grad():
            features = optimized.forward_features(x)
            assert_equal_in_fp64(features, model.forward_features(x))
            for ours, plain in zip(optimized.features(x), model.features(x), strict=True):
                assert_equal_in_fp64(ours, plain)
            for pre_logits in (False, True):
                plain = model.forward_head(features, pre_logits)
                assert_equal_in_fp64(optimized.forward_head(features, pre_logits), plain)

    def test_of_a_preset(self) -> None:
        model = maxattn.build("maxvit_t", window=2, drop_path_rate=0.0, **{"stages.*.depth": 1}).eval()
        randomise(model)
        x = images(1, 64, 64)
        assert_within_budget(model, maxattn.optimize_for_inference(model)(x), x)

    def test_of_few_images_at_a_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        optimized, x = maxattn.optimize_for_inference(small()), images(5, 64, 64)
        limit = 3 * 64 * 32 * 32 * 4  # three images' widest tensor, in the first stage
        with Seen() as seen:
            together = optimized(x)
        assert seen.largest > limit
        monkeypatch.setattr(network, "BYTES_AT_ONCE", limit)
        with Seen() as seen:
            apart = optimized(x)
        assert seen.largest <= limit
        torch.testing.assert_close(apart, together, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("batch", [0, 1])
    def test_of_any_batch(self, batch: int) -> None:
        model, x = small(), images(batch)
        with torch.no_grad():
            torch.testing.assert_close(maxattn.optimize_for_inference(model)(x), model(x), rtol=1e-4, atol=1e-4)

    def test_of_a_model_moved_or_loaded_after_its_first_call(self) -> None:
        model, x = small(), images()
        optimized = maxattn.optimize_for_inference(model)
        before = optimized(x)
        assert optimized.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
        zeros = {name: torch.zeros_like(tensor) for name, tensor in optimized.float().state_dict().items()}
        optimized.load_state_dict(zeros)
        assert optimized(x).eq(0).all()
        optimized.load_state_dict(maxattn.optimize_for_inference(model).state_dict())
        assert optimized(x).equal(before)

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_of_copies(self, again: Any) -> None:
        optimized, x = maxattn.optimize_for_inference(small()), images()
        expected = optimized(x)
        assert again(optimized)(x).equal(expected)

    def test_under_autocast(self) -> None:
        model, x = small(), images()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            plain, ours = model(x), maxattn.optimize_for_inference(model)(x)
        torch.testing.assert_close(ours.float(), plain.float(), rtol=0.1, atol=0.1 * plain.abs().max().item())

    def test_gradients_of_the_image(self) -> None:
        model = small(torch.float64, act="relu")
        gradients = []
        for each in (model, maxattn.optimize_for_inference(model)):
            x = images(dtype=torch.float64).requires_grad_()
            each(x).square().sum().backward()
            gradients.append(x.grad)
        assert_equal_in_fp64(gradients[1], gradients[0])

    @LOADS_DECOMPOSITIONS
    def test_derivatives_in_forward_mode(self) -> None:
        model, x = small(act="relu"), images()
        with maxattn.use_backend("naive"):
            ours, plain = (torch.func.jvp(m, (x,), (x,))[1] for m in (maxattn.optimize_for_inference(model), model))
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())

    def test_gradients_of_the_image_where_onednn_serves(self) -> None:
        model = small()
        gradients = []
        for each in (model, maxattn.optimize_for_inference(model)):
            x = images().requires_grad_()
            each(x).square().sum().backward()
            gradients.append(x.grad)
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())


class TestLessWork:
    def test_no_batch_norm_activation_or_padding_is_left(self) -> None:
        optimized, x = maxattn.optimize_for_inference(small()), images()
        optimized(x)
        with Seen() as seen:
            optimized(x)
        assert {"_linear_pointwise", "_convolution_pointwise"} <= seen.names
        left_over = {"native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training", "addmm"}
        assert not seen.names & (left_over | {"gelu", "silu", "convolution", "constant_pad_nd", "flip"})

    def test_the_plain_network_has_them_all(self) -> None:
        with Seen() as seen, torch.no_grad():
            small()(images())
        assert {"gelu", "silu", "constant_pad_nd", "flip", "addmm"} <= seen.names

    def test_layer_norms_have_no_weights(self) -> None:
        optimized = maxattn.optimize_for_inference(small())
        norms = [m for m in optimized.stages.modules() if isinstance(m, nn.LayerNorm)]
        assert norms
        assert not any(list(norm.parameters()) for norm in norms)

    def test_no_file_holds_what_is_made_of_the_weights(self) -> None:
        optimized = maxattn.optimize_for_inference(small())
        assert {name.rpartition(".")[2] for name in optimized.state_dict()} == {"weight", "bias"}

    def test_what_is_made_of_the_weights_follows_them(self) -> None:
        model = small()
        first, second = (maxattn.optimize_for_inference(m) for m in (model, small(act="relu", layer_scale=0.3)))
        first.to(torch.bfloat16).load_state_dict(second.state_dict())
        taps = first.stages[0].blocks[0].layers[0].conv2
        assert taps.laid_out.equal(taps.weight[:, 0].permute(1, 2, 0))

    def test_biases_are_laid_out_for_fused_kernels(self) -> None:
        optimized = maxattn.optimize_for_inference(small())
        for attention in optimized.attentions():
            bias = attention.rel_pos()
            assert bias.shape == (attention.heads, 9, 9)
            assert bias.stride() == (9 * 16, 16, 1)
            assert bias.data_ptr() == attention.rel_pos.bias.data_ptr()

    @LOADS_DECOMPOSITIONS
    def test_onednn_declines_what_it_cannot_do(self) -> None:
        x, weight = torch.zeros(2, 4), torch.zeros(3, 4)
        assert onednn.serves(x, weight)
        assert not onednn.serves(x.double(), weight.double())
        assert not onednn.serves(x, weight.bfloat16())
        assert not onednn.serves(x.to("meta"), weight)
        assert not onednn.serves(x.clone().requires_grad_(), weight)
        with forward_ad.dual_level():
            assert not onednn.serves(forward_ad.make_dual(x, x), weight)
        answers: list[bool] = []
        torch.func.vmap(lambda x: [answers.append(onednn.serves(x, weight)), x][1])(x)
        assert answers == [False]
        with torch.autocast("cpu", torch.bfloat16):
            assert not onednn.serves(x, weight)
        with without_onednn():
            assert not onednn.serves(x, weight)


class TestCompiled:
    def test_stages_are_frozen_and_equal(self) -> None:
        from torch._inductor.utils import run_and_get_code

        model, x = small(), images()
        optimized = maxattn.optimize_for_inference(maxattn.optimize_for_inference(model), compile=True)
        with torch.no_grad():
            out, codes = run_and_get_code(optimized, x)
        assert len(codes) == 3
        assert all("mkldnn._convolution_pointwise" in code for code in codes)
        assert not any("addmm" in code.partition("def call")[2] for code in codes)
        assert not any(".tanh()" in code for code in codes)  # of GELU, which is oneDNN's too
        assert_within_budget(model, out, x)
        assert len(optimized.features(x)) == 3

    def test_an_activation_over_the_last_dimension(self) -> None:
        model, x = small(), images()
        for module in model.modules():
            if isinstance(module, MLP):
                module.act = nn.Softmax(-1)
        optimized = maxattn.optimize_for_inference(model)
        compiled = torch.compile(optimized, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), optimized(x), rtol=1e-4, atol=1e-4)

    def test_in_a_graph_of_the_callers(self) -> None:
        optimized, x = maxattn.optimize_for_inference(small()), images()
        torch.testing.assert_close(
            torch.compile(optimized, backend="eager", fullgraph=True)(x), optimized(x), rtol=1e-4, atol=1e-4
        )

    def test_exported(self) -> None:
        optimized, x = maxattn.optimize_for_inference(small()), images()
        program = torch.export.export(optimized, (x,))
        torch.testing.assert_close(program.module()(x), optimized(x), rtol=1e-4, atol=1e-4)

    def test_another_value_is_refused(self) -> None:
        with pytest.raises(ValueError, match="compile must be False, True or 'max-autotune', not 'fast'"):
            maxattn.optimize_for_inference(small(), compile="fast")


class TestThePlainNetwork:
    def test_stays_as_it_is(self) -> None:
        model = small().train()
        before = copy.deepcopy(model.state_dict())
        optimized = maxattn.optimize_for_inference(model)
        optimized(images())
        assert model.training
        assert not optimized.training
        assert before.keys() == model.state_dict().keys()
        assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())

    def test_shares_no_memory(self) -> None:
        model = small()
        theirs = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
        ours = maxattn.optimize_for_inference(model).state_dict()
        assert not theirs & {tensor.untyped_storage().data_ptr() for tensor in ours.values()}


class TestSaved:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_opens_as_it_was(self, tmp_path: Path, dtype: torch.dtype) -> None:
        path, x = tmp_path / "fast.safetensors", images(dtype=dtype)
        optimized = maxattn.optimize_for_inference(small(dtype, rel_pos="log_mlp"))
        maxattn.save_weights(optimized, path, extra={"classes": ["a"]})
        opened, extra = maxattn.open_model(path)
        assert isinstance(opened, InferenceMaxViT)
        assert extra == {"classes": ["a"]}
        assert not opened.training
        assert not any(parameter.requires_grad for parameter in opened.parameters())
        assert opened(x).equal(optimized(x))

    def test_takes_no_overrides(self, tmp_path: Path) -> None:
        maxattn.save_weights(maxattn.optimize_for_inference(small()), tmp_path / "fast.safetensors")
        with pytest.raises(ValueError, match=r"takes no overrides, not num_classes: open the plain model's file"):
            maxattn.open_model(tmp_path / "fast.safetensors", num_classes=3)

    def test_does_not_load_into_a_plain_network(self, tmp_path: Path) -> None:
        maxattn.save_weights(maxattn.optimize_for_inference(small()), tmp_path / "fast.safetensors")
        with pytest.raises(ValueError, match=r"its weights folded: maxattn\.open_model"):
            maxattn.load_weights(small(), tmp_path / "fast.safetensors", strict=False)


class TestErrors:
    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.train(),
            lambda model: model.reset_classifier(3),
            lambda model: model.set_input_size(64),
            lambda model: model.set_grad_checkpointing(),
            lambda model: model.param_groups(),
        ],
    )
    def test_what_would_change_it_says_to_change_the_plain_one(self, change: Any) -> None:
        with pytest.raises(RuntimeError, match=r"do so with the plain model, then maxattn\.optimize_for_inference"):
            change(maxattn.optimize_for_inference(small()))

    def test_loading_weights(self) -> None:
        with pytest.raises(TypeError, match=r"are folded: do so with the plain model, then maxattn\.optimize_for_inf"):
            maxattn.load_weights(maxattn.optimize_for_inference(small()), small().state_dict())

    def test_a_model_of_another_library(self) -> None:
        with pytest.raises(TypeError, match=r"one that maxattn\.build made, not wrapped, not Linear"):
            maxattn.optimize_for_inference(nn.Linear(2, 2))

    def test_one_made_before_is_copied(self) -> None:
        optimized, x = maxattn.optimize_for_inference(small()), images()
        again = maxattn.optimize_for_inference(optimized)
        assert again is not optimized
        assert again(x).equal(optimized(x))
