"""Weights in the official TensorFlow code's naming make the network that code makes of them."""

from __future__ import annotations

import numpy as np
import official_maxvit as official
import pytest
import torch

import maxattn

WINDOW, SIZE, DEPTHS = 3, 24, (2, 1)


@pytest.fixture(scope="module")
def variables() -> official.Variables:
    return official.random_variables(official.shapes(stem=32, widths=(32, 64), depths=DEPTHS, window=WINDOW, classes=7))


def network(window: int = WINDOW) -> maxattn.nn.MaxViT:
    stages = [{"width": 32, "depth": DEPTHS[0]}, {"width": 64, "depth": DEPTHS[1]}]
    spec = {"img_size": SIZE, "num_classes": 7, "window": window, "stem": {"width": 32}, "stages": stages}
    return maxattn.build(spec).double().eval()


def images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, SIZE, SIZE, 3))


def test_logits_equal_the_official_codes(variables: official.Variables) -> None:
    model = network()
    report = maxattn.load_weights(model, variables)
    assert (report.naming, report.ignored) == ("tensorflow", 0)
    with torch.no_grad():
        seen = model(torch.from_numpy(images()).permute(0, 3, 1, 2)).numpy()
    expected = official.logits(variables, images(), DEPTHS, WINDOW)
    assert np.abs(expected[0] - expected[1]).max() > 0.01
    assert np.abs(seen - expected).max() <= 1e-9 * np.abs(expected).max()


def test_one_attention_equals_the_official_einsums(variables: official.Variables) -> None:
    model = network()
    maxattn.load_weights(model, variables)
    attention = next(module for module in model.stages[1].modules() if isinstance(module, maxattn.nn.MaxAttention))
    x = np.random.default_rng(2).standard_normal((5, WINDOW**2, 64))
    expected = official.attention(x, variables, "maxvit/block_01_00/attention", WINDOW, WINDOW)
    with torch.no_grad():
        seen = attention(torch.from_numpy(x).unflatten(1, (WINDOW, WINDOW))).flatten(1, 2).numpy()
    assert np.abs(seen - expected).max() <= 1e-9 * np.abs(expected).max()


@pytest.mark.parametrize("suffix", [":0", "/.ATTRIBUTES/VARIABLE_VALUE", "/ExponentialMovingAverage"])
def test_suffixes_of_names_make_no_difference(variables: official.Variables, suffix: str) -> None:
    plain, suffixed = network(), network()
    maxattn.load_weights(plain, variables)
    maxattn.load_weights(suffixed, {name + suffix: torch.from_numpy(value) for name, value in variables.items()})
    assert all(map(torch.equal, plain.state_dict().values(), suffixed.state_dict().values()))


def test_averaged_weights_go_before_the_last_ones_and_optimizer_state_is_ignored(
    variables: official.Variables,
) -> None:
    averaged, checkpoint = network(), network()
    maxattn.load_weights(averaged, variables)
    last = {name: np.zeros_like(value) for name, value in variables.items()}
    means = {f"{name}/ExponentialMovingAverage": value for name, value in variables.items()}
    slots = {f"{name}/Adam_1": value for name, value in variables.items()}
    report = maxattn.load_weights(checkpoint, last | means | slots | {"global_step": np.array(7)})
    assert all(map(torch.equal, averaged.state_dict().values(), checkpoint.state_dict().values()))
    assert report.ignored == 2 * len(variables) + 1


def test_tables_of_another_window_are_resized_as_the_official_code_does(variables: official.Variables) -> None:
    model = network(window=6)
    report = maxattn.load_weights(model, variables)
    assert set(report.resized.values()) == {((3, 3), (6, 6))}
    assert len(report.resized) == 6
    table = variables["maxvit/block_00_01/attention_1/relative_bias"]
    seen = model.stages[0].blocks[1].layers[2].attn.rel_pos.table.detach().numpy()
    # Half-pixel centres, clamped at the edge, as tf.image.resize has them.
    centres = np.clip((np.arange(11) + 0.5) * 5 / 11 - 0.5, 0, 4)
    low = np.minimum(centres.astype(int), 3)
    line = np.zeros((11, 5))
    line[np.arange(11), low], line[np.arange(11), low + 1] = 1 - (centres - low), centres - low
    assert np.abs(seen - np.einsum("ai,nij,bj->nab", line, table, line)).max() <= 1e-12


@pytest.mark.parametrize(
    ("name", "shape"),
    [("maxvit/block_00_00/attention/q/weight", (1, 32, 32)), ("maxvit/stem/conv_0/kernel", (32, 3, 3, 3))],
)
def test_a_variable_of_another_shape_is_named(variables: official.Variables, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"1 of another shape: (stem|stages)\."):
        maxattn.load_weights(network(), variables | {name: np.zeros(shape)})
