"""`maxattn bench scaling`: what grows how, full attention that is full, and an end where it takes too long."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import maxattn
from maxattn.bench import Result, Row, Time, scaling
from maxattn.bench.networks import images_of, randomised
from maxattn.bench.tables import slopes
from maxattn.bench.timing import Effort

measured = partial(scaling.measure, "nano", effort=Effort(least=2, most=2, sample=0))


def grown(candidate: str, power: float, sizes: tuple[int, ...] = (224, 448, 896, 1792)) -> list[Row]:
    return [
        Row(case={"img_size": n}, candidate=candidate, time=Time(median=1e-6 * (n * n) ** power), mib=2e-3 * n * n)
        for n in sizes
    ]


def test_both_attentions_are_measured_at_every_size() -> None:
    kept: list[Result] = []
    result = measured(sizes=[28, 56], keep=kept.append)
    assert [(row.case["img_size"], row.candidate, row.note) for row in result.rows] == [
        (size, kind, "") for size in (28, 56) for kind in ("windows", "full attention")
    ]
    assert all(row.time is not None and row.mib is not None and row.mib > 0 for row in result.rows)
    assert {row.attention for row in result.rows} == {"sdpa"}
    assert [(one.finished, len(one.rows)) for one in kept] == [(False, 2), (False, 4), (True, 4)]


def test_larger_images_are_left_out_once_they_would_take_too_long() -> None:
    rows = measured(sizes=[28, 2800], max_seconds=0.01).rows
    assert [row.time is None for row in rows] == [False, False, True, True]
    assert all("left out: a call would take about" in row.note for row in rows[2:])


def test_larger_images_are_left_out_for_want_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "memory_bytes", lambda which: 2**20)
    rows = measured(sizes=[28, 560], max_seconds=1e9).rows
    assert [row.time is None for row in rows] == [False, False, True, True]
    assert all(row.note.endswith("GiB") for row in rows[2:])


def test_full_attention_has_one_window_and_the_same_weights() -> None:
    windows = randomised(maxattn.build("nano")).eval()
    spec = maxattn.load_spec("nano").override(img_size=(30, 45))
    full = scaling._with_weights_of(windows, scaling._full_attention(spec))
    assert [stage.window for stage in full.spec.stages] == [(15, 23), (8, 12)]
    assert full.spec.rel_pos == "none"
    for name, tensor in full.state_dict().items():
        assert torch.equal(tensor, windows.state_dict()[name])
    # every pixel sees every other: a change in one corner reaches the first attention's output everywhere
    images = images_of(spec, 1, torch.float64, "cpu")
    other = images.clone()
    other[..., -4:, -4:] += 1
    with torch.no_grad():
        first, second = (full.double().features(x)[1] for x in (images, other))
    assert ((first - second).abs().amax(dim=1) > 0).all()


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_the_exponent_is_that_of_the_pixels(power: float) -> None:
    rows = grown("windows", power)
    assert scaling.exponent(rows, "time") == pytest.approx(power)
    assert scaling.exponent(rows, "mib") == pytest.approx(1)
    assert scaling.exponent(rows[:1], "time") is None


def test_exponents_are_fitted_to_the_larger_half_of_what_was_measured() -> None:
    small = [Row(case={"img_size": n}, candidate="windows", time=Time(median=1.0), mib=1.0) for n in (28, 56, 112, 168)]
    left_out = Row(case={"img_size": 4096}, candidate="windows", note="left out")
    found = slopes([*small, *grown("windows", 1), *grown("full attention", 2), left_out])
    assert found == pytest.approx(
        {
            ("windows", "time"): 1,
            ("windows", "mib"): 1,
            ("full attention", "time"): 2,
            ("full attention", "mib"): 1,
        }
    )


@pytest.mark.parametrize("sizes", [[], [56, 28], [28, 28]])
def test_sizes_that_do_not_increase_are_an_error(sizes: list[int]) -> None:
    with pytest.raises(ValueError, match="sizes must be increasing"):
        measured(sizes=sizes)
