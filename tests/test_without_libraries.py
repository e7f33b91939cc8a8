"""A machine that has every plugin of this repository, and none of the libraries that they adapt."""

from __future__ import annotations

import json
from pathlib import Path

from fresh_python import announce, hiding, python

ROOT = Path(__file__).parents[1]
PLUGINS = [ROOT / "backends" / name for name in ("flash_attn", "flex", "triton", "xformers")]
PLUGINS.append(ROOT / "plugins" / "natten")
ASKED = ("explain", "--device", "cuda", "--compute-capability", "9.0", "--dtype", "bf16", "--no-bias", "--json")

WITHOUT = hiding(("triton", "flash_attn", "flash_attn_2_cuda", "flash_attn_interface", "xformers", "mslk", "natten"))
COMMAND = WITHOUT + "from maxattn.cli import main; main()"
NETWORK = (
    WITHOUT
    + """
import torch
import maxattn
from maxattn.plugins import load

assert not any(plugin.failure for plugin in load().plugins), load().plugins
torch.manual_seed(0)
qkv, bias = torch.randn(2, 10, 13, 3, 2, 32, requires_grad=True), torch.randn(2, 49, 49, requires_grad=True)
for axis in ("block", "grid"):
    results = []
    for backend in (None, "naive"):
        out = maxattn.max_sa(qkv, axis, 7, bias, backend=backend)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), (qkv, bias))])
    for chosen, naive in zip(*results):
        torch.testing.assert_close(chosen, naive)
stages = [{"width": 32, "depth": 1}, {"width": 64, "depth": 1}]
model = maxattn.build({"img_size": 64, "num_classes": 3, "stages": stages})
loss = model(torch.randn(2, 3, 64, 64)).logsumexp(1).sum()
loss.backward()
assert all(parameter.grad is not None for parameter in model.parameters())
print(maxattn.explain(qkv, axis="block", window=7, bias=bias).backend)
"""
)


def site(folder: Path) -> list[Path]:
    for plugin in PLUGINS:
        announce(plugin, folder)
    return [folder, *(plugin / "src" for plugin in PLUGINS)]


def test_the_core_works_and_each_plugin_says_what_is_missing(tmp_path: Path) -> None:
    answer = json.loads(python(*site(tmp_path), arguments=("-c", COMMAND, *ASKED)))
    assert answer["backend"] == "sdpa"
    reasons = {one["name"]: [reason["code"] for reason in one["reasons"]] for one in answer["candidates"]}
    assert set(reasons) == {"naive", "sdpa", "flash_attn", "flex", "triton", "xformers", "natten"}
    for name in set(reasons) - {"naive", "sdpa"}:
        assert "not_installed" in reasons[name], name


def test_the_operator_and_a_network_train(tmp_path: Path) -> None:
    assert python(*site(tmp_path), arguments=("-c", NETWORK)) == "sdpa\n"
