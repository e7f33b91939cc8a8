"""Programs of torch.export: none, a wrong one, or one for a single batch."""

from __future__ import annotations

from operator import index

from testing.mutants.base import exact, mutant
from torch import Tensor

from maxattn import Problem


@mutant()
def exported_raises(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """export is declared, and fails"""
    if problem.exporting:
        raise NotImplementedError("this kernel cannot be exported")
    return exact(qkv, bias, problem)


@mutant()
def exported_as_blocks(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the exported graph holds the block axis only"""
    return exact(qkv, bias, problem, axis="block" if problem.exporting else problem.axis)


@mutant()
def exported_with_a_fixed_batch(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the batch becomes a plain int, which fixes every traced graph to one batch"""
    return exact(qkv[: index(qkv.shape[0])], bias, problem)


@mutant()
def exported_as_blocks_for_any_size(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """a graph for images of any size has no room for the grid's dilation, and holds blocks"""
    return exact(qkv, bias, problem, axis="block" if problem.height is None else problem.axis)


@mutant()
def exported_with_the_default_scale(qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
    """the exported graph holds the default scale"""
    return exact(qkv, bias, problem, scale=None if problem.exporting else problem.scale)
