"""The stamp of a measurement: what it ran on, with which versions and settings, and when."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from maxattn import __version__

LIBRARIES = (
    "triton",
    "timm",
    "torchvision",
    "xformers",
    "mslk",
    "flash-attn",
    "flash-attn-3",
    "flash-attn-4",
    "nvidia-cutlass-dsl",
    "quack-kernels",
    "natten",
    *(f"maxattn-{name}" for name in ("triton", "flex", "xformers", "flash-attn", "natten")),
)
SETTINGS = re.compile(r"(CUBLAS|CUDA|DNNL|GOMP|KMP|MALLOC|MAXATTN|MKL|NVIDIA_TF32|OMP|ONEDNN|PYTORCH|TORCH|TRITON)_")
"""Environment variables that change what is measured; the C library's MALLOC_* change it a lot for large tensors."""
NO_SETTING = re.compile(r".*(DIR|PATH|HOME|LAUNCHES|VISIBLE_DEVICES)$")
ALLOCATORS = ("jemalloc", "tcmalloc", "mimalloc")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What a measurement ran on and when. `gpu` is None for one on the CPU; what an old one did not note is empty."""

    device: str
    cpu: str
    cores: int
    threads: int
    memory_gib: float
    gpu: str | None
    python: str
    torch: str
    maxattn: str
    date: str
    libraries: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The name of the chip, as a part of file names.

        Example:
            >>> this_machine("cpu").name.isascii()
            True
        """
        chip = self.gpu or f"{re.sub(r'[(](R|TM|tm)[)]|@.*| CPU| Processor', '', self.cpu)} {self.cores} cores"
        return re.sub(r"[^a-z0-9]+", "-", chip.lower()).strip("-")

    def __str__(self) -> str:
        where = [self.gpu or self.cpu]
        if self.gpu is None and self.cores:
            where.append(f"{self.cores} cores, {self.threads} thread{'' if self.threads == 1 else 's'}")
        versions = {"python": self.python, "torch": self.torch, **self.libraries, "maxattn": self.maxattn}
        told = [f"{name} {number}" for name, number in versions.items() if number]
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return ", ".join([*where, *told, *settings, self.date or "not dated"])


def this_machine(device: str = "cpu") -> Machine:
    """The stamp of this machine, now, for what is measured on its `device`.

    Example:
        >>> this_machine("cpu").gpu is None
        True
    """
    return Machine(
        device=device,
        cpu=cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_gib=round(memory_bytes("MemTotal") / 2**30, 1),
        gpu=None if device == "cpu" else torch.get_device_module(device).get_device_name(),
        python=platform.python_version(),
        torch=torch.__version__,
        maxattn=__version__,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        libraries={name: number for name in LIBRARIES if (number := installed(name)) is not None},
        environment=_environment(),
    )


def cpu_model() -> str:
    """The processor's name, as far as the system tells it."""
    return _told_by("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def memory_bytes(which: str) -> int:
    """`MemTotal` or `MemAvailable` of Linux, in bytes; 0 where the system does not tell.

    Example:
        >>> memory_bytes("MemTotal") >= memory_bytes("MemAvailable") >= 0
        True
    """
    told = _told_by("/proc/meminfo", which)
    return int(told.split()[0]) * 1024 if told else 0


def device_types() -> list[str]:
    """The kinds of device that torch can use here: the CPU, then the accelerator if there is one.

    Example:
        >>> device_types()[0]
        'cpu'
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def installed(distribution: str) -> str | None:
    """The version of an installed distribution, else None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _environment() -> dict[str, str]:
    """Settings that change what is measured; of a preloaded allocator its name, never where it lies."""
    found = {
        name: value
        for name, value in sorted(os.environ.items())
        if SETTINGS.match(name) and not NO_SETTING.match(name) and "/" not in value
    }
    preloaded = [name for name in ALLOCATORS if name in os.environ.get("LD_PRELOAD", "")]
    return found | ({"LD_PRELOAD": ",".join(preloaded)} if preloaded else {})


def _told_by(file: str, field_name: str) -> str:
    path = Path(file)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(field_name)), "")
