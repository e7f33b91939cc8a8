"""The generations of flash-attn: which is installed, which GPUs each is for, and what each can do."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of

import torch

from maxattn.ops.contract import Problem, Reason
from maxattn.ops.libraries import has_module

MULTIPLE = 8
"""Head dims that the kernels take are multiples of this."""

MULTIPLE_IN_4 = 32
"""As it was run on an H200. For some other head dims on 9.x the backward pass of 4.0.0b36 was reported to give
a wrong gradient of q (https://github.com/Dao-AILab/flash-attention/pull/2896), and does not compile for 104 and 112."""

LARGEST_HEAD_DIM = 256
LARGEST_UNRESTRICTED = 192
"""Above, 3 refuses determinism, of 4 it is not known, and 2 has no backward pass with dropout in `SMALL_MEMORY`."""

SMALL_MEMORY = ((8, 6), (8, 9), (12, 0), (12, 1))
"""Compute capabilities of chips with 99 KB of shared memory a block."""

HAS_IT = "flash-attn 2 has it: pip install flash-attn"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """A generation of flash-attn: the module and the distribution it is found by, and its facts."""

    number: int
    module: str
    distribution: str
    oldest: tuple[int, int] = (0, 0)
    multiple: int = MULTIPLE
    dropout: bool = False
    compile: bool = False
    compiler: str = ""
    """The distribution that compiles its kernels."""
    compiler_for_gradients: dict[int, tuple[int, int]] = field(default_factory=dict)
    """By the major compute capability: the oldest compiler with which its backward pass was seen to return."""

    @property
    def name(self) -> str:
        return f"flash-attn {self.number}"

    def head_dim(self, channels: int, capability: tuple[int, int] | None) -> int | None:
        """The smallest head dim of its kernels that holds `channels`; None if there is none."""
        dim = -(-channels // self.multiple) * self.multiple
        major = major_of(capability)
        if self.number == 4 and major >= 10 and dim > 128:
            return LARGEST_HEAD_DIM if major < 12 and dim <= LARGEST_HEAD_DIM else None
        return dim if dim <= LARGEST_HEAD_DIM else None

    def reasons(self, problem: Problem, channels: int) -> list[Reason]:
        """Why it cannot serve `problem`, which takes so many channels a head."""
        dim = self.head_dim(channels, problem.compute_capability)
        if dim is None:
            return [self._too_wide(problem, channels)]
        found = []
        oldest = self.compiler_for_gradients.get(major_of(problem.compute_capability))
        if problem.differentiated and oldest and older(installed_version(self.compiler), oldest):
            named = f"{self.compiler} {'.'.join(map(str, oldest))}"
            told = f"before {named} {self.name} was seen not to return from its backward pass on this kind of GPU"
            found.append(
                Reason("backward", told, f"pip install --upgrade {self.compiler} quack-kernels, or no gradient")
            )
        if problem.dropout_p > 0 and not self.dropout:
            found.append(Reason("dropout", f"{self.name} has no dropout", HAS_IT))
        elif problem.dropout_p > 0 and problem.differentiated and self._lacks_memory(problem, dim):
            told = f"{self.name} has no backward pass with dropout for head dim {dim} on this GPU"
            found.append(Reason("dropout", told, f"head dims up to {LARGEST_UNRESTRICTED}, the bias included"))
        if problem.deterministic and problem.differentiated and not self._deterministic(problem, dim):
            lacking = "is not known to have a" if self.number == 4 else "has no"
            told = f"{self.name} {lacking} deterministic backward pass for head dim {dim} on this GPU"
            found.append(Reason("deterministic", told, HAS_IT))
        if problem.compiling and not self.compile:
            found.append(Reason("compile", f"{self.name} is not traced by torch.compile", HAS_IT))
        return found

    def _too_wide(self, problem: Problem, channels: int) -> Reason:
        if problem.bias is None:
            return Reason("head_dim", f"{self.name} has no kernel for head dim {channels} on this GPU", HAS_IT)
        told = f"a bias of {problem.tokens} tokens takes {channels} channels a head, too many for {self.name} here"
        fitting = [
            n for n in range(1, problem.tokens) if self.head_dim(problem.head_dim + n, problem.compute_capability)
        ]
        hint = f"windows of up to {fitting[-1]} tokens, or no bias" if fitting else "no bias"
        return Reason("window", told, hint)

    def _lacks_memory(self, problem: Problem, dim: int) -> bool:
        return dim > LARGEST_UNRESTRICTED and problem.compute_capability in SMALL_MEMORY

    def _deterministic(self, problem: Problem, dim: int) -> bool:
        on_consumer_blackwell = major_of(problem.compute_capability) == 12
        return self.number == 2 or (dim <= LARGEST_UNRESTRICTED and not on_consumer_blackwell)


TWO = Generation(
    number=2, module="flash_attn_2_cuda", distribution="flash-attn", oldest=(2, 7), dropout=True, compile=True
)
THREE = Generation(number=3, module="flash_attn_interface", distribution="flash-attn-3")
FOUR = Generation(
    number=4,
    module="flash_attn.cute",
    distribution="flash-attn-4",
    multiple=MULTIPLE_IN_4,
    compiler="nvidia-cutlass-dsl",
    compiler_for_gradients={9: (4, 8)},  # 4.0.0b36 on an H200: not with 4.6.2 and 4.6.3, but with 4.8.1
)
ALL = (TWO, THREE, FOUR)
PREFERRED = {8: (TWO,), 9: (FOUR, THREE, TWO), 10: (FOUR, TWO), 11: (FOUR, TWO), 12: (TWO, FOUR)}
"""By the major compute capability: the generations for it, in the order in which they are tried.

On 9.x 4 is the one that was run."""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def installed() -> tuple[tuple[int, str], ...]:
    """The generations that are installed, each by its number and version, "" where that is not known.

    4 only under its own name: distributions of 2 hold an early `flash_attn.cute`, which does not work.
    """
    return _installed()


@cache
def _installed() -> tuple[tuple[int, str], ...]:
    found = [(one, installed_version(one.distribution)) for one in ALL if has_module(one.module)]
    return tuple((one.number, version) for one, version in found if version or one is not FOUR)


def major_of(capability: tuple[int, int] | None) -> int:
    """The major compute capability; 0 where it is not known.

    Example:
        >>> major_of((9, 0)), major_of(None)
        (9, 0)
    """
    return capability[0] if capability else 0


def older(version: str, oldest: tuple[int, int]) -> bool:
    """Whether a version, if it is known, is older than that.

    Example:
        >>> older("2.6.3", (2, 7)), older("2.8.3.post1", (2, 7)), older("", (2, 7))
        (True, False, False)
    """
    known = re.match(r"(\d+)\.(\d+)", version)
    return known is not None and (int(known[1]), int(known[2])) < oldest


@cache
def installed_version(distribution: str) -> str:
    """The version of a distribution; "" if it is not installed."""
    try:
        return version_of(distribution)
    except PackageNotFoundError:
        return ""
