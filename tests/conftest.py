"""Settings for all tests: no override from the developer's environment, one thread, hypothesis without a clock."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

for name in [name for name in os.environ if name.startswith("MAXATTN_")]:
    del os.environ[name]

torch.set_num_threads(1)

settings.register_profile("default", deadline=None, derandomize=True, max_examples=100)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("default")
