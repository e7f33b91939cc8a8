"""Relative position bias: its order, its resizing, and that a kept bias is never stale."""

from __future__ import annotations

import pytest
import torch

from maxattn.nn import MaxAttention, RelPosLogMLP, RelPosTable
from maxattn.ops import rel_pos


@pytest.mark.parametrize("window", [(1, 1), (2, 3), (4, 2), (7, 7)])
def test_gather_takes_the_entry_of_each_offset(window: tuple[int, int]) -> None:
    P_h, P_w = window
    table = torch.randn(2, 2 * P_h - 1, 2 * P_w - 1)
    bias = rel_pos.gather(table, window).view(2, P_h, P_w, P_h, P_w)
    for y in range(P_h):
        for x in range(P_w):
            for v in range(P_h):
                for u in range(P_w):
                    assert bias[:, y, x, v, u].equal(table[:, v - y + P_h - 1, u - x + P_w - 1])


def test_gather_is_differentiable_twice() -> None:
    table = torch.randn(1, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: rel_pos.gather(t, (2, 3)), table)
    assert torch.autograd.gradgradcheck(lambda t: rel_pos.gather(t, (2, 3)).square(), table)


def test_resize_to_the_same_window_changes_nothing_and_keeps_a_plane_a_plane() -> None:
    table = torch.randn(2, 13, 13)
    assert rel_pos.resize(table, (7, 7)) is table
    ramp = torch.linspace(-1, 1, 13).expand(1, 13, 13)
    wider = rel_pos.resize(ramp, (7, 12))
    assert wider.shape == (1, 13, 23)
    inner = wider[0, 0, 3:-3].diff()
    torch.testing.assert_close(inner, torch.full_like(inner, 2 / 12 * 13 / 23))


def test_the_log_mlp_serves_any_window_with_the_same_weights() -> None:
    torch.manual_seed(0)
    bias = RelPosLogMLP(3, (4, 4), hidden=8)
    small = bias()
    bias.resize((6, 6))
    large = bias().view(3, 6, 6, 6, 6)[:, :4, :4, :4, :4].reshape(3, 16, 16)
    torch.testing.assert_close(small, large)


def test_a_change_of_the_table_is_seen_however_it_was_made() -> None:
    module = RelPosTable(2, (3, 4)).eval()
    changes = {
        "in place": lambda: module.table.mul_(2),
        "data": module.table.data.normal_,
        "load": lambda: module.load_state_dict({"table": torch.randn_like(module.table)}),
        "dtype": module.double,
        "resize": lambda: module.resize((5, 2)),
    }
    with torch.no_grad():
        for name, change in changes.items():
            module()
            change()
            assert module().equal(rel_pos.gather(module.table, module.window)), name


def test_resizing_to_the_same_window_keeps_the_parameter() -> None:
    module = RelPosTable(2, (3, 4))
    table = module.table
    module.resize((3, 4))
    assert module.table is table


def test_a_module_made_in_inference_mode_runs() -> None:
    with torch.inference_mode():
        attention = MaxAttention(8, window=2, head_dim=4).eval()
        assert attention(torch.randn(1, 4, 4, 8)).shape == (1, 4, 4, 8)
