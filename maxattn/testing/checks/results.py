"""Outputs and gradients: right for every problem that is declared."""

from __future__ import annotations

from typing import Any

import torch

from maxattn.testing import strategies
from maxattn.testing.case import BIAS_LAYOUTS, GRADIENT_LAYOUTS, QKV_LAYOUTS, VALUES
from maxattn.testing.failure import NotApplicable
from maxattn.testing.registry import check, declared
from maxattn.testing.subject import SEVERAL_TILES, Subject, full_windows

HEADS = (1, 2, 3, 5, 8, 12, 16, 17, 24, 32)
EVERY_GRADIENT = ((True, True),)
WITHOUT_PADDING = ((8, 8), (8, 16), (16, 24))
"""Windows whose bias has rows of 64, 128 and 384 numbers: kernels that pad them leave these as they are."""


@check("the output is right for full windows in contiguous memory, block and grid, every dtype, with and without bias")
def forward(subject: Subject) -> None:
    subject.try_drawn(subject.cases(ragged=False), subject.verify, share=0.5)


@check("the gradients of q, k, v and bias are right, for the same", declared("backward"))
def gradients(subject: Subject) -> None:
    subject.try_drawn(subject.cases(ragged=False, gradients=EVERY_GRADIENT), subject.verify, share=0.5)


@check("qkv, bias and the gradient of the output may lie in memory in any way: sliced, transposed, expanded, unaligned")
def layouts(subject: Subject) -> None:
    tried = [{"layout": name} for name in QKV_LAYOUTS]
    tried += [{"grad_layout": name} for name in (*GRADIENT_LAYOUTS, "sum")] if subject.facts.backward else []
    if subject.facts.bias:
        unpadded = [window for window in WITHOUT_PADDING if window in subject.windows(1024)]
        tried += [{"bias_layout": name} for name in BIAS_LAYOUTS]
        tried += [{"bias_layout": "heads last", **full_windows(window)} for window in unpadded]
    subject.try_each(subject.variants(*tried), subject.verify)


@check("images that the window does not divide, or smaller than it: a pixel outside is no key", declared("ragged"))
def ragged(subject: Subject) -> None:
    subject.try_drawn(subject.cases(ragged=True, gradients=EVERY_GRADIENT), subject.verify, share=0.5)


@check("images of many windows along both sides, with all that may vary")
def many_groups(subject: Subject) -> None:
    drawn = subject.cases(among=subject.windows(12), groups=20, **strategies.ANYTHING)
    subject.try_drawn(drawn, subject.verify, share=0.3)


@check("long and narrow images", declared("ragged"))
def narrow(subject: Subject) -> None:
    sizes = [(1, 300), (300, 1), (2, 129), (67, 3)]
    subject.try_each(subject.variants(*({"height": H, "width": W} for H, W in sizes)), subject.verify)


@check("any scale: 0, negative, not the default")
def scale(subject: Subject) -> None:
    subject.try_each(subject.variants(*({"scale": scale} for scale in strategies.SCALES)), subject.verify)


@check("heads from 1 to 32, every declared head dim in every dtype, and batches of more than 16")
def heads(subject: Subject) -> None:
    dims, large = (
        subject.head_dims(strategies.HEAD_DIMS[-1]),
        full_windows(subject.largest_window(strategies.SMALL_TOKENS)),
    )
    several_tiles = full_windows(subject.largest_window(SEVERAL_TILES))
    tried: list[dict[str, Any]] = [{"heads": heads} for heads in HEADS]
    tried += [{"heads": heads, **window} for heads in (3, 9, 17, 32) for window in (large, several_tiles)]
    tried += [{"head_dim": d, "dtype": dtype} for d in dims for dtype in strategies.dtypes(subject.facts)]
    tried += [{"head_dim": d, **window} for d in dims[-4:] for window in (large, several_tiles)]
    tried += [{"batch": batch} for batch in (9, 17)]
    tried.append({"heads": 32, "head_dim": subject.head_dims(64)[-1]})
    subject.try_each(subject.variants(*tried), subject.verify)


@check("a bias of every declared dtype beside every dtype of qkv", declared("bias"))
def bias_dtypes(subject: Subject) -> None:
    pairs = [(a, b) for a in strategies.dtypes(subject.facts) for b in strategies.bias_dtypes(subject.facts)]
    subject.try_each(subject.variants(*({"dtype": a, "bias": b} for a, b in pairs)), subject.verify)


@check("gradients are right where only the bias, or only qkv, needs one", declared("backward"))
def one_gradient(subject: Subject) -> None:
    drawn = subject.cases(gradients=((False, True), (True, False)))
    subject.try_drawn(drawn, subject.verify, share=0.25)


@check("the gradient of the bias misses none of a thousand windows", declared("backward", "bias", "bias_gradient"))
def bias_sum(subject: Subject) -> None:
    P_h, P_w = subject.largest_window(4)
    sizes = {"window": (P_h, P_w), "batch": 4, "height": 16 * P_h, "width": 16 * P_w, "heads": 1}
    tried: list[dict[str, Any]] = [
        {"dtype": a, "values": b} for a in strategies.dtypes(subject.facts) for b in ("normal", "one sign")
    ]
    tried += [one | {"bias": subject.finest_bias} for one in tried]
    subject.try_each(subject.variants(*tried, **sizes), subject.verify)


@check("logits that are huge, constant, masked by a large negative bias, or shifted: nothing overflows")
def values(subject: Subject) -> None:
    tried: list[dict[str, Any]] = [{"values": name, "scale": scale} for name in VALUES for scale in (-0.5, 1.0)]
    several_tiles = subject.largest_window(SEVERAL_TILES)
    if subject.facts.ragged:  # groups of few tokens, whose logits may all be below those of the missing keys
        few = {"height": subject.base.window[0] + 1, "width": 1}
        tried += [few | {"values": name, "scale": scale} for name in VALUES for scale in (-0.5, 1.0)]
    for name in VALUES:
        for dtype in strategies.dtypes(subject.facts):
            tried.append({"values": name, "dtype": dtype})
            tried.append({"values": name, "dtype": dtype, "scale": 0.3})
            tried.append({"values": name, "dtype": dtype, **full_windows(several_tiles)})
    subject.try_each(subject.variants(*tried), subject.verify)


@check("the output is summed in fp32 whatever the dtype: where large terms cancel, what is left of them is right")
def cancelling_sums(subject: Subject) -> None:
    even = [(a, b) for a, b in subject.windows(SEVERAL_TILES) if a * b % 2 == 0]
    halves = [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in subject.facts.dtypes]
    if not even or not halves:
        raise NotApplicable("it needs bf16 or fp16, and a window of an even number of tokens")
    tried: list[dict[str, Any]] = [{"dtype": dtype} for dtype in halves]
    tried += [one | {"bias": None} for one in tried]
    plain = {"requires_grad": False, "bias_requires_grad": False, "values": "cancelling"}
    subject.try_each(subject.variants(*tried, **full_windows(even[-1]), **plain), subject.verify)


@check("all of these in any combination")
def anything(subject: Subject) -> None:
    subject.try_drawn(subject.cases(**strategies.ANYTHING), subject.verify, share=2.0)
