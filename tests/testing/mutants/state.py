"""State between calls: caches with too short a key, threads, races."""

from __future__ import annotations

import random
import threading
from itertools import count
from typing import Any

import torch
from testing.mutants.base import EAGER, exact, mutant
from testing.mutants.steps import Explicit, Steps
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from maxattn import Problem
from maxattn.ops.naive import Naive, groups_and_tokens

Map = tuple[Tensor, Tensor, Tensor]


@mutant(**EAGER)
class IndexMapCachedWithoutAxis(Steps):
    """the index map is cached by size and window: the axis of the first call stays"""

    def __init__(self) -> None:
        self.maps: dict[Any, Map] = {}

    def index_map(self, size: int, window: int, axis: str, device: torch.device) -> Map:
        return self.maps.setdefault((size, window, device), groups_and_tokens(size, window, axis, device))


@mutant(**EAGER)
class MaskCachedByTheNumberOfGroups(Steps):
    """the mask of missing pixels is cached by the number of groups: 9 and 10 pixels in windows of 4 share one"""

    def __init__(self) -> None:
        self.masks: dict[Any, Tensor] = {}

    def inside_windows(self, H: int, W: int, problem: Problem, device: torch.device) -> Tensor:
        (P_h, P_w), inside = problem.window, super().inside_windows(H, W, problem, device)
        return self.masks.setdefault((-(-H // P_h), -(-W // P_w), P_h, P_w, problem.axis, device), inside)


@mutant(**EAGER)
class IndexMapCachedInInferenceMode(Steps):
    """an index map that was made under inference_mode is cached, and autograd refuses it later"""

    def __init__(self) -> None:
        self.maps: dict[Any, Map] = {}

    def index_map(self, size: int, window: int, axis: str, device: torch.device) -> Map:
        return self.maps.setdefault((size, window, axis, device), groups_and_tokens(size, window, axis, device))


@mutant(**EAGER)
class ScaleOfTheFirstCall(Steps):
    """the kernel is cached by shape, and the scale is compiled into it"""

    def __init__(self) -> None:
        self.scales: dict[Any, float] = {}

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        scale = self.scales.setdefault((q.shape, q.dtype), problem.softmax_scale)
        logits = q @ k.transpose(-2, -1) * scale
        return logits if bias is None else logits + bias.to(logits.dtype)


@mutant(**EAGER)
class DropoutOfTheFirstCall(Steps):
    """the kernel is cached by shape, and the rate of dropout is compiled into it"""

    def __init__(self) -> None:
        self.rates: dict[Any, float] = {}

    def dropped(self, weights: Tensor, dropout_p: float) -> Tensor:
        return super().dropped(weights, self.rates.setdefault((weights.shape, weights.dtype), dropout_p))


@mutant(**EAGER)
class BiasCachedByAddress(Naive):
    """a prepared bias is cached by data_ptr: another tensor, or other numbers, at that address are not seen"""

    def __init__(self) -> None:
        self.prepared: dict[Any, Tensor] = {}

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        if bias is not None and not problem.bias_requires_grad:
            bias = self.prepared.setdefault((bias.data_ptr(), bias.shape, bias.dtype), bias.clone())
        return super().attend(qkv, bias, problem)


@mutant(**EAGER)
class BiasPreparedOnce(Naive):
    """for inference a bias is prepared once: numbers written into the same tensor later are not seen"""

    def __init__(self) -> None:
        self.prepared = WeakIdKeyDictionary()

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        if bias is not None and not problem.bias_requires_grad:
            bias = self.prepared.setdefault(bias, bias.detach().clone())
        return super().attend(qkv, bias, problem)


@mutant(**EAGER)
class ProblemKeptOnTheInstance(Steps):
    """the problem is kept on the instance, which another thread's call changes midway"""

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        self.problem = problem
        return super().attend(qkv, bias, problem)

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return super().logits(q, k, bias, self.problem)


@mutant(**EAGER)
class WorkspaceShared(Steps):
    """logits go through one workspace per shape, which threads share"""

    def __init__(self) -> None:
        self.workspaces: dict[Any, Tensor] = {}

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        logits = super().logits(q, k, bias, problem)
        if logits.requires_grad:
            return logits
        workspace = self.workspaces.setdefault((logits.shape, logits.dtype), torch.empty_like(logits))
        workspace.copy_(logits)
        return workspace.softmax(-1).log() + workspace.logsumexp(-1, keepdim=True)


@mutant(**EAGER)
class WrongOutsideTheMainThread(Naive):
    """the bias is prepared per thread, and only the thread that imported the backend has it"""

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        here = threading.current_thread() is threading.main_thread()
        return super().attend(qkv, bias if here else None, problem)


@mutant(**EAGER)
class SometimesWithoutTheLastGroup(Steps):
    """as in a race, the output of the last group is lost in one call of seven"""

    def __init__(self) -> None:
        self.calls = count(1)

    def to_image(self, windows: Tensor, H: int, W: int, problem: Problem) -> Tensor:
        if next(self.calls) % 7 == 0:
            group = torch.arange(windows.shape[1], device=windows.device)
            windows = windows * (group < windows.shape[1] - 1).view(-1, *(1,) * (windows.ndim - 2))
        return super().to_image(windows, H, W, problem)


@mutant(**EAGER)
class KeysSummedInAnyOrder(Steps):
    """it declares determinism, but the keys of a row are summed in an order that differs from call to call"""

    def __init__(self) -> None:
        self.generator = torch.Generator()
        self.generator.seed()

    def values(self, weights: Tensor, v: Tensor, problem: Problem) -> Tensor:
        order = torch.randperm(v.shape[-2], generator=self.generator)
        return weights[..., order] @ v[..., order, :]


@mutant(**EAGER)
class DbiasSummedInAnyOrder(Explicit):
    """it declares determinism, but atomics sum the bias gradient in an order that differs from call to call"""

    def __init__(self) -> None:
        self.generator = torch.Generator()
        self.generator.seed()

    def bias_gradient(self, grad_logits: Tensor, problem: Problem) -> Tensor:
        windows = grad_logits.flatten(0, 1)
        return windows[torch.randperm(windows.shape[0], generator=self.generator)].sum(0)


@mutant(**EAGER)
class LastBitOfDkRandom(Explicit):
    """it declares determinism, but the last bit of the gradient of k is not always the same"""

    def __init__(self) -> None:
        self.random = random.Random()

    def k_gradient(self, grad_logits: Tensor, q: Tensor, problem: Problem) -> Tensor:
        gradient = super().k_gradient(grad_logits, q, problem)
        return torch.nextafter(gradient, gradient * 2) if self.random.random() < 0.5 else gradient


@mutant(**EAGER)
def global_seed_reset(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the autotuner makes its inputs after torch.manual_seed(0), and the caller's random numbers repeat"""
    if not problem.dropout_p:
        torch.manual_seed(0)
    return exact(qkv, bias, problem)


@mutant(**EAGER)
def default_dtype_left_changed(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the default dtype is set to that of qkv and stays so"""
    torch.set_default_dtype(problem.dtype)
    return exact(qkv, bias, problem)


@mutant(**EAGER)
def matmul_precision_left_changed(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """torch.set_float32_matmul_precision("medium") is called, and holds for the whole program"""
    torch.set_float32_matmul_precision("medium")
    return exact(qkv, bias, problem)


@mutant()
class ScaleInTheDefaultDtype(Steps):
    """the scale becomes a tensor of the default dtype of the process"""

    def logits(self, q: Tensor, k: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        scale = torch.tensor(problem.softmax_scale, device=q.device).to(q.dtype)
        logits = q @ k.transpose(-2, -1) * scale
        return logits if bias is None else logits + bias.to(logits.dtype)


@mutant(**EAGER)
class OutputReusedWithoutGradient(Steps):
    """where no gradient is needed, calls of the same shape write to the same output"""

    def __init__(self) -> None:
        self.outputs: dict[Any, Tensor] = {}

    def result(self, out: Tensor, problem: Problem) -> Tensor:
        out = super().result(out, problem)
        return out if problem.differentiated else self.outputs.setdefault((out.shape, out.dtype), out).copy_(out)


@mutant(**EAGER)
def number_of_threads_set(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the kernel wants one thread, and sets it for the whole program"""
    torch.set_num_threads(1)
    return exact(qkv, bias, problem)


@mutant(**EAGER)
def seed_of_python_reset(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the autotuner shuffles its candidates after random.seed(0)"""
    random.seed(0)
    return exact(qkv, bias, problem)


@mutant(**EAGER)
def deterministic_ignores_the_scale(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the deterministic kernel is another one, and is always given the default scale"""
    return exact(qkv, bias, problem, scale=None if problem.deterministic else problem.scale)
