"""What only a GPU has: streams and graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from maxattn.testing.budget import collect
from maxattn.testing.case import Case
from maxattn.testing.observe import verify, within_budget
from maxattn.testing.registry import check, on
from maxattn.testing.subject import NO_GRADIENT, Subject

CYCLES = 100_000_000
"""About 0.05 s of a GPU's time: long enough that work on another stream would overtake."""


@check("kernels are launched on the current stream", on("cuda"))
def current_stream(subject: Subject) -> None:
    def check(case: Case) -> None:
        attend = subject.attend(case)

        def on_another_stream(qkv: Tensor, bias: Tensor | None) -> Tensor:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                torch.cuda._sleep(CYCLES)
                late = qkv * 1
                out = attend(late, bias)
            torch.cuda.current_stream().wait_stream(stream)
            return out

        verify(on_another_stream, case)

    subject.try_each(subject.variants({}), check)


@check("a CUDA graph captures the call, and the backward pass, and replays them with new numbers", on("cuda"))
def cuda_graph(subject: Subject) -> None:
    subject.try_each(subject.variants({}, NO_GRADIENT), lambda case: _check_cuda_graph(subject, case))


def _check_cuda_graph(subject: Subject, case: Case) -> None:
    inputs, attend = case.tensors(), subject.attend(case)

    def results() -> dict[str, Tensor]:
        with torch.set_grad_enabled(case.problem.differentiated):
            return collect(attend(inputs.qkv, inputs.bias), inputs.leaves, inputs.grad_out)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            results()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results()
    for seed in (case.seed + 1, case.seed + 2):
        inputs.overwrite(case.but(seed=seed).tensors())
        graph.replay()
        within_budget(captured, inputs, case)
