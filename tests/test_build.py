"""Networks built from specs: any size, any order of layers, the methods of the model, and its initial weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import maxattn
from maxattn.nn import AttentionLayer, Downsample, MaxViT, MBConv, RelPosTable
from maxattn.nn.checkpointing import Checkpointing

SMALL = {
    "in_chans": 2,
    "num_classes": 5,
    "head_dim": 4,
    "window": 3,
    "stem": {"width": 4},
    "stages": [{"width": 8, "depth": 1}, {"width": 16, "depth": 2}],
}


def small(**overrides: object) -> MaxViT:
    torch.manual_seed(0)
    return maxattn.build(SMALL, **overrides)


@given(st.integers(5, 40), st.integers(5, 40))
@settings(max_examples=15, deadline=None)
def test_any_height_and_width_just_work(height: int, width: int) -> None:
    model = small().eval()
    maps = model.features(torch.randn(1, 2, height, width))
    assert [tuple(x.shape[2:]) for x in maps] == [(-(-height // s), -(-width // s)) for s in (2, 4, 8)]
    assert model(torch.randn(1, 2, height, width)).shape == (1, 5)


@pytest.mark.parametrize("enable", [False, "selective", True])
def test_a_hook_on_any_module_is_called(enable: Checkpointing) -> None:
    model, called = small().train(), set[str]()
    model.set_grad_checkpointing(enable)
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(torch.randn(2, 2, 12, 12))
    assert {name for name, _ in model.named_modules()} - lists == called


def test_other_modules_may_take_the_place_of_a_layers_own() -> None:
    model, x = small().train(), torch.randn(2, 2, 12, 12)
    for module in model.modules():
        if isinstance(module, AttentionLayer):
            module.attn, module.mlp = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        if isinstance(module, MBConv):
            module.se = nn.Identity()  # type: ignore[assignment]
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("padding", ["same", "symmetric"])
@pytest.mark.parametrize("pool", ["avg2", "avg3", "max2", "max3"])
def test_shortcut_and_residual_agree_on_odd_and_even_sizes(padding: str, pool: str) -> None:
    layer = MBConv(4, 8, 2, padding=padding, shortcut_pool=pool).eval()
    for height, width in ((7, 8), (1, 2), (9, 3)):
        assert layer(torch.randn(1, height, width, 4)).shape == (1, -(-height // 2), -(-width // 2), 8)


@pytest.mark.parametrize(
    "layers",
    [
        ["mbconv", "block", "grid"],
        ["mbconv", "grid", "block"],
        ["block", "mbconv", "grid"],
        ["block", "grid", "mbconv"],
        ["grid", "mbconv", "block"],
        ["grid", "block", "mbconv"],
        ["mbconv", ["block", "grid"]],
        [["block", "grid"], "mbconv"],
        ["block"],
        ["grid", "grid", "grid"],
        ["mbconv"],
        [["mbconv", "block"], "grid"],
    ],
)
def test_any_order_and_parallel_layers_train(layers: list) -> None:
    model = small(**{"stages.*.layers": layers})
    model(torch.randn(2, 2, 13, 10)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_paper_orders_have_the_same_number_of_parameters_when_mbconv_comes_first() -> None:
    spec = maxattn.load_spec("maxvit_tiny_tf_224")
    swapped = spec.override(**{"stages.*.layers": ["mbconv", "grid", "block"]})
    parallel = spec.override(**{"stages.*.layers": ["mbconv", ["block", "grid"]]})
    assert swapped.summary().params == parallel.summary().params == spec.summary().params


def test_a_stage_without_mbconv_downsamples_before_its_layers() -> None:
    model = small(**{"stages.*.layers": ["block", "grid"]})
    assert [isinstance(stage.blocks[0].downsample, Downsample) for stage in model.stages] == [True, True]
    assert model.stages[1].blocks[1].downsample is None


def test_parallel_layers_add_their_updates() -> None:
    model = small(**{"stages.0.layers": ["mbconv", ["block", "grid"]]}).eval()
    parallel = model.stages[0].blocks[0].layers[1]
    x = torch.randn(1, 6, 7, 8)
    block, grid = parallel.layers
    torch.testing.assert_close(parallel(x) - x, (block(x) - x) + (grid(x) - x))


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ({"se_ratio": 0}, lambda m: m.stages[0].blocks[0].layers[0].se is None),
        ({"expansion": 2}, lambda m: m.stages[1].blocks[0].layers[0].conv1.out_channels == 32),
        ({"expand_from": "input"}, lambda m: m.stages[1].blocks[0].layers[0].conv1.out_channels == 32),
        ({"kernel_size": 5}, lambda m: m.stages[0].blocks[0].layers[0].conv2.kernel_size == (5, 5)),
        ({"conv_norm": "group_norm"}, lambda m: isinstance(m.stem.norm, nn.GroupNorm)),
        ({"conv_norm": "layer_norm"}, lambda m: isinstance(m.stem.norm, nn.LayerNorm)),
        ({"attn_norm": "rms_norm"}, lambda m: isinstance(m.stages[0].blocks[0].layers[1].norm1, nn.RMSNorm)),
        ({"rel_pos": "none"}, lambda m: next(m.attentions()).rel_pos is None),
        ({"rel_pos": "log_mlp"}, lambda m: next(m.attentions()).rel_pos.fc1.in_features == 2),
        ({"attn_scale": "width"}, lambda m: next(m.attentions()).scale == 8**-0.5),
        ({"attn_scale": 0.25}, lambda m: next(m.attentions()).scale == 0.25),
        ({"qkv_bias": False}, lambda m: next(m.attentions()).qkv.bias is None),
        ({"mlp_ratio": 0}, lambda m: m.stages[0].blocks[0].layers[1].mlp is None),
        ({"layer_scale": 0.1}, lambda m: m.stages[0].blocks[0].layers[0].update[0].scale.eq(0.1).all()),
        ({"head": {"kind": "linear"}}, lambda m: m.head.pre_logits is None),
        ({"head": {"kind": "mlp", "hidden": 3}}, lambda m: m.head.fc.in_features == 3),
        ({"stem": {"width": 4, "stride": 1}}, lambda m: m.stem.conv1.stride == (1, 1)),
        ({"stages.0.window": [2, 5]}, lambda m: [a.window for a in m.attentions()][1:3] == [(2, 5), (3, 3)]),
        ({"act": "relu"}, lambda m: isinstance(m.stem.act, nn.ReLU)),
        ({"shortcut_conv": "stride", "stem": {"width": 8}}, lambda m: m.stages[0].blocks[0].layers[0].shortcut.conv),
        ({"batch_norm_momentum": 0.01}, lambda m: m.stem.norm.momentum == 0.01),
        ({"backend": "naive"}, lambda m: next(m.attentions()).backend == "naive"),
        ({"attn_drop": 0.5}, lambda m: next(m.attentions()).attn_drop == 0.5),
        ({"proj_drop": 0.5}, lambda m: next(m.attentions()).proj_drop.p == 0.5),
    ],
)
def test_every_setting_reaches_the_network(override: dict, changed) -> None:
    model = small(**override)
    assert changed(model)
    assert model(torch.randn(2, 2, 9, 11)).shape == (2, 5)


def test_stochastic_depth_grows_linearly_and_keeps_the_expectation() -> None:
    model = small(drop_path_rate=0.4)
    rates = [m.rate for m in model.modules() if type(m).__name__ == "DropPath"]
    assert sorted(set(rates)) == pytest.approx([0.2, 0.4])
    torch.manual_seed(1)
    drop = maxattn.nn.basic.DropPath(0.25)
    x = torch.ones(20_000, 1, 1, 2)
    y = drop(x)
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert y[:, 0, 0, 0].equal(y[:, 0, 0, 1])
    assert y.mean().item() == pytest.approx(1.0, abs=5 * (0.25 / 0.75 / 20_000) ** 0.5)
    assert drop.eval()(x).equal(x)


def test_an_unable_backend_of_the_spec_is_refused_and_never_replaced() -> None:
    with pytest.raises(maxattn.BackendUnavailableError, match="nonesuch"):
        small(backend="nonesuch")(torch.randn(1, 2, 8, 8))


def test_initial_weights_are_the_official_ones() -> None:
    model = maxattn.build("nano")
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)])
    assert weights.std().item() == pytest.approx(0.02, rel=0.02)
    assert all(m.bias.eq(0).all() for m in model.modules() if isinstance(m, nn.Linear) and m.bias is not None)
    tables = torch.cat([m.table.flatten() for m in model.modules() if isinstance(m, RelPosTable)])
    assert tables.std().item() == pytest.approx(0.02, rel=0.15)


def test_forward_is_features_then_head() -> None:
    model, x = small().eval(), torch.randn(2, 2, 17, 12)
    features = model.forward_features(x)
    assert features.equal(model.features(x)[-1])
    assert model.forward_head(features).equal(model(x))
    assert model.forward_head(features, pre_logits=True).shape == (2, 16)


def test_wrong_images_are_refused_with_the_shape_that_works() -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, 2, H, W\), not \(1, 3, 8, 8\)"):
        small()(torch.randn(1, 3, 8, 8))


def test_integer_images_are_refused() -> None:
    with pytest.raises(TypeError, match=r"floating point dtype, not torch\.uint8"):
        small()(torch.zeros(1, 2, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 7}, "head_dim must be a positive int that divides the width 8, not 7"),
        ({"head_dim": 0}, "head_dim must be a positive int"),
        ({"axis": "blok"}, "axis must be 'block' or 'grid', not 'blok'"),
        ({"window": 0}, "window must be at least 1 x 1 token"),
        ({"window": (7,)}, "window must be an int or two ints"),
        ({"window": 7.0}, "window must be an int or two ints"),
        ({"scale": "heads"}, "scale must be 'head_dim', 'width' or a number, not 'heads'"),
        ({"rel_pos": "tabel"}, "rel_pos must be 'table', 'log_mlp' or 'none', not 'tabel'"),
    ],
)
def test_a_wrong_argument_of_the_attention_module_is_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        maxattn.nn.MaxAttention(8, **{"head_dim": 4, **arguments})


def test_reset_classifier_changes_the_outputs_and_the_spec() -> None:
    model = small()
    model.reset_classifier(9)
    assert model(torch.randn(2, 2, 8, 8)).shape == (2, 9)
    assert model.spec.num_classes == 9
    model.reset_classifier(0)
    assert model(torch.randn(2, 2, 8, 8)).shape == (2, 16)


def test_set_input_size_moves_relative_windows_only() -> None:
    model = small(img_size=48, window="img/16", **{"stages.1.window": 2})
    model.set_input_size((96, 64))
    assert [attention.window for attention in model.attentions()] == [(6, 4)] * 2 + [(2, 2)] * 4
    assert model.spec.img_size == (96, 64)
    assert next(model.attentions()).rel_pos.table.shape == (2, 11, 7)
    assert model(torch.randn(1, 2, 96, 64)).shape == (1, 5)


def test_set_input_size_with_a_window_sets_every_window() -> None:
    model = small(**{"stages.1.window": 2})
    model.set_input_size(window=(4, 5))
    assert {attention.window for attention in model.attentions()} == {(4, 5)}
    assert maxattn.build(model.spec).state_dict().keys() == model.state_dict().keys()
    assert model.spec.resolved().stages[1].layers[1].window == (4, 5)


def test_param_groups_hold_every_parameter_once_and_decay_only_matrices() -> None:
    model = small()
    groups = model.param_groups(lr=1.0, weight_decay=0.1, layer_decay=0.5)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    rate = {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}
    assert rate["stem.conv1.weight"] == (0.5**4, 0.1)
    assert rate["stages.0.blocks.0.layers.1.attn.qkv.bias"] == (0.5**3, 0.0)
    assert rate["stages.1.blocks.1.layers.1.attn.rel_pos.table"] == (0.5, 0.0)
    assert rate["head.fc.weight"] == (1.0, 0.1)
    assert model.no_weight_decay() == {name for name in names if name.endswith("rel_pos.table")}


def test_channels_last_and_contiguous_images_give_the_same_logits() -> None:
    model, x = small().eval(), torch.randn(2, 2, 12, 9)
    torch.testing.assert_close(model(x), model(x.contiguous(memory_format=torch.channels_last)))


def test_autocast_runs_the_network_in_bfloat16() -> None:
    model, x = small(), torch.randn(2, 2, 12, 9)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x).float().square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


def test_the_network_compiles_as_one_graph_and_exports() -> None:
    model, x = small().eval(), torch.randn(2, 2, 16, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    y = torch.randn(3, 2, 16, 12)
    torch.testing.assert_close(program.module()(y), model(y))
