"""A training of seconds: stripes of three directions, and a network that tells them apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CLASSES = ("across", "down", "slanted")
SPEC: dict[str, Any] = {
    "img_size": 16,
    "in_chans": 1,
    "window": 4,
    "head_dim": 8,
    "conv_norm_eps": 1e-5,
    "drop_path_rate": 0.1,
    "stem": {"width": 8},
    "head": {"kind": "linear"},
    "stages": [{"width": 16, "depth": 2}],
}
RECIPE: dict[str, Any] = {"epochs": 3, "batch_size": 16, "lr": 5e-3, "shift": 2, "flip": False, "workers": 0}


def write_stripes(data: Path, train: int = 24, val: int = 8) -> Path:
    """PNGs of 16 x 16 pixels in `data/{train,val}/<class>`, `train` and `val` of each class; returns `data`."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[:16, :16]
    for part, count in (("train", train), ("val", val)):
        for name, place in zip(CLASSES, (rows, columns, rows + columns), strict=True):
            folder = data / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                stripes = np.sin((place + random.uniform(0, 6)) * 1.6) * 100 + random.normal(128, 12, (16, 16))
                Image.fromarray(stripes.clip(0, 255).astype(np.uint8)).save(folder / f"{number:03}.png")
    return data
