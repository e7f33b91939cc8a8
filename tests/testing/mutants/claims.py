"""What a backend says of itself: able where it is not, unable where it says it is, and answers of the wrong kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import count
from typing import Any

import torch
from testing.mutants.base import EAGER, exact, mutant
from torch import Tensor

from maxattn import Capabilities, Problem, Reason
from maxattn.ops.naive import Naive


class AlwaysAble(Capabilities):
    def unsupported(self, problem: Problem) -> list[Reason]:
        return []


class Eager(Naive):
    """`naive`, which the mutants below declare less or more of."""

    capabilities = Capabilities(**EAGER)


@mutant()
class NeverUnable(Naive):
    """it declares head dims from 16 to 64, and says able to all problems"""

    capabilities = AlwaysAble(head_dims=(16, 64), **EAGER)


@mutant()
class NeverUnableAndWrong(Naive):
    """it declares no dropout, says able to it, and drops nothing"""

    capabilities = AlwaysAble(dropout=False, **EAGER)

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return exact(qkv, bias, problem, dropout_p=0.0)


@mutant()
class TakesWhateverIsGiven(Eager):
    """attend takes **kwargs: a misspelt argument would be ignored"""

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem, **kwargs: Any) -> Tensor:
        return super().attend(qkv, bias, problem)


@mutant()
class RefusesEverything(Eager):
    """it declares everything and refuses every problem"""

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        return [Reason("driver", "the driver is too old")]


@mutant()
class RefusesDropout(Eager):
    """it declares dropout and refuses it"""

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        return [Reason("dropout", "dropout is not supported")] if problem.dropout_p else ()


@mutant()
class RefusesBf16(Eager):
    """it declares bf16 and refuses it"""

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        return [Reason("dtype", "bf16 is too coarse")] if problem.dtype == torch.bfloat16 else ()


@mutant()
class RefusesRagged(Eager):
    """it declares ragged images and refuses them"""

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        return [Reason("ragged", "the image must be full")] if problem.ragged else ()


@mutant()
class RefusesBiasGradients(Eager):
    """it declares the gradient of the bias and refuses it"""

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        return [Reason("bias_gradient", "the bias is frozen")] if problem.bias_requires_grad else ()


@mutant()
class RefusesWithoutASentence(Eager):
    """it refuses more than 8 heads, and its reason is empty"""

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        return [Reason("heads", "")] if problem.heads > 8 else ()


@mutant()
class AnswersInStrings(Eager):
    """its reasons are strings"""

    def unsupported(self, problem: Problem) -> Any:
        return ["more than 8 heads"] if problem.heads > 8 else ()


@mutant()
class AnswersNone(Eager):
    """unsupported returns None for able"""

    def unsupported(self, problem: Problem) -> Any:
        return None


@mutant()
class AnswersOneReason(Eager):
    """unsupported returns a reason instead of a list of them"""

    def unsupported(self, problem: Problem) -> Any:
        return Reason("heads", "more than 8 heads") if problem.heads > 8 else ()


@mutant()
class AnswersOnce(Eager):
    """unsupported is a generator that is kept: asked a second time, it has no reasons left"""

    def __init__(self) -> None:
        self.reasons = iter([Reason("heads", "more than 8 heads")])

    def unsupported(self, problem: Problem) -> Any:
        return self.reasons if problem.heads > 8 else ()


@mutant()
class RaisesWhenAsked(Eager):
    """unsupported raises for windows that are not square"""

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        assert problem.window[0] == problem.window[1], "square windows only"
        return ()


@mutant(export=False)
class RaisesForUnknownSizes(Naive):
    """unsupported computes with a height that is None where a compiler holds it as a symbol"""

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        too_many = problem.batch * problem.height * problem.width > 2**31
        return [Reason("size", "more than 2 ** 31 pixels")] if too_many else ()


@mutant()
class ChangesItsMind(Eager):
    """it refuses every third time that it is asked"""

    def __init__(self) -> None:
        self.times = count(1)

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        return () if next(self.times) % 3 else [Reason("memory", "the workspace is taken")]


@mutant()
class AsksTheGlobalGradMode(Eager):
    """it refuses ragged images where a gradient is needed, but looks at the global grad mode instead of the problem"""

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        refused = problem.ragged and torch.is_grad_enabled()
        return [Reason("ragged", "ragged images have no backward pass")] if refused else ()


@mutant()
class SpeedIsNan(Eager):
    """relative_speed is not a number"""

    def relative_speed(self, problem: Problem) -> float:
        return math.nan


@mutant()
class SpeedRaises(Eager):
    """relative_speed divides by the number of full windows, which can be 0"""

    def relative_speed(self, problem: Problem) -> float:
        return 1.0 if problem.height is None else 1 / (problem.height // problem.window[0])


@mutant()
class KernelRaises(Eager):
    """kernel raises for problems of the grid"""

    def kernel(self, problem: Problem) -> str:
        return {"block": "tiled"}[problem.axis]


@mutant(**EAGER)
def raises_for_the_grid(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the grid is declared, and raises when it is called"""
    if problem.axis == "grid":
        raise NotImplementedError("grid attention")
    return exact(qkv, bias, problem)


@mutant(**EAGER)
def raises_above_512_channels(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """more than 512 channels are declared, and fail when they are called"""
    if problem.heads * problem.head_dim > 512:
        raise RuntimeError("out of resource: shared memory")
    return exact(qkv, bias, problem)


@mutant(**EAGER)
def raises_for_a_bias_of_another_dtype(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """a bias of another dtype than qkv's is declared, and raises"""
    if bias is not None and bias.dtype != qkv.dtype:
        raise RuntimeError("expected scalar type to match")
    return exact(qkv, bias, problem)


@mutant(**EAGER)
def raises_for_fp64(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """fp64 is declared, as it is by default, and raises"""
    if problem.dtype == torch.float64:
        raise RuntimeError("not implemented for 'Double'")
    return exact(qkv, bias, problem)


@mutant(**EAGER)
def no_backward_though_declared(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """a backward pass is declared, and the output requires no gradient"""
    return exact(qkv.detach(), None if bias is None else bias.detach(), problem)


@mutant(bias_gradient=True, **EAGER)
def no_bias_gradient_though_declared(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """a gradient of the bias is declared, and the bias is detached"""
    return exact(qkv, None if bias is None else bias.detach(), problem)


@mutant(double_backward=True, **EAGER)
def no_double_backward_though_declared(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """second derivatives are declared, and raise"""
    from testing.mutants.steps import Explicit

    return Explicit().attend(qkv, bias, problem)
