"""Settings for all tests: nothing of the developer's environment, one thread, hypothesis without a clock."""

from __future__ import annotations

import os

import torch
from hypothesis import settings

import maxattn

for name in [name for name in os.environ if name.startswith("MAXATTN_")]:
    del os.environ[name]

os.environ["MAXATTN_PLUGINS"] = ""
maxattn.list_backends()  # loads plugins, once in a process: none of those that are installed
del os.environ["MAXATTN_PLUGINS"]

torch.set_num_threads(1)

settings.register_profile("default", deadline=None, derandomize=True, max_examples=100)
settings.register_profile("thorough", deadline=None, max_examples=1000)
settings.load_profile("default")
