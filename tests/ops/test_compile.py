"""`torch.compile(fullgraph=True)`: the choice is made while tracing, guarded, and the graph holds only its outcome."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from recording import BIAS, QKV, Recording, recording
from torch import Tensor, nn
from torch.fx import GraphModule

import maxattn
from maxattn import Backend, Capabilities, Problem, Reason
from maxattn.ops.contract import Axis
from maxattn.ops.registry import registered

# Where there is no C++ compiler, PyTorch's own cannot run on the CPU; then only its frontend is tested.
DEFAULT_COMPILER = "inductor" if shutil.which("c++") or shutil.which("g++") else "aot_eager"


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Graphs:
    """A compiler that runs what it is given and keeps the names of the functions called, a list a compilation."""

    def __init__(self) -> None:
        self.called: list[list[str]] = []

    def __call__(self, graph: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.called.append([node.target.__name__ for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward


def results(attend: Callable[..., Tensor], qkv: Tensor, bias: Tensor) -> list[Tensor]:
    qkv, bias = qkv.detach().requires_grad_(), bias.detach().requires_grad_()
    out = attend(qkv, bias)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), (qkv, bias))]


def assert_compiled_equals_eager(attend: Callable[..., Tensor], compiled: Callable[..., Tensor], *sizes: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        qkv = torch.randn(*size, 3, 2, 4, generator=generator, dtype=torch.float64)
        bias = BIAS.double()
        for actual, expected in zip(results(compiled, qkv, bias), results(attend, qkv, bias), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


FULL, OTHER_BATCH, RAGGED = (5, 8, 8), (6, 8, 8), (6, 9, 10)


@pytest.mark.parametrize("axis", ["block", "grid"])
@pytest.mark.parametrize(
    ("backend", "dynamic", "sizes"),
    [
        pytest.param("naive", False, [FULL, RAGGED], id="naive, static"),
        pytest.param("naive", None, [FULL, OTHER_BATCH], id="naive, automatic"),
        pytest.param("sdpa", False, [FULL, RAGGED], id="sdpa, static"),
        pytest.param("sdpa", None, [FULL, OTHER_BATCH, RAGGED], id="sdpa, automatic"),
        pytest.param("sdpa", True, [RAGGED, FULL, OTHER_BATCH], id="sdpa, dynamic"),
    ],
)
def test_equals_eager(backend: str, dynamic: bool | None, sizes: list[tuple[int, int, int]], axis: Axis) -> None:
    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        return maxattn.max_sa(qkv, axis, 4, bias, backend=backend)

    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    assert_compiled_equals_eager(attend, compiled, *sizes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_equals_eager_with_the_default_compiler() -> None:
    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        return maxattn.max_sa(qkv, "grid", 4, bias)

    compiled = torch.compile(attend, fullgraph=True, backend=DEFAULT_COMPILER)
    assert_compiled_equals_eager(attend, compiled, (2, 9, 8))


def test_another_batch_is_served_by_the_same_graph_and_another_height_by_its_own() -> None:
    graphs = Graphs()
    compiled = torch.compile(lambda qkv: maxattn.max_sa(qkv, window=4), fullgraph=True, dynamic=True, backend=graphs)
    for batch, height, compilations in ((5, 8, 1), (6, 8, 1), (7, 8, 1), (7, 12, 2), (5, 12, 2), (5, 8, 2)):
        qkv = torch.randn(batch, height, 8, 3, 2, 4)
        torch.testing.assert_close(compiled(qkv), maxattn.max_sa(qkv, window=4))
        assert len(graphs.called) == compilations


@torch.library.custom_op("maxattn_tests::attend", mutates_args=())
def attend_op(qkv: Tensor, bias: Tensor | None, axis: str, window: list[int]) -> Tensor:
    return maxattn.max_sa(qkv, axis, tuple(window), bias, backend="naive")


@attend_op.register_fake
def _(qkv: Tensor, bias: Tensor | None, axis: str, window: list[int]) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], *qkv.shape[4:])


class Op(Backend):
    """As backends with kernels of their own are: one operator of `torch.library`."""

    name = "op"
    capabilities = Capabilities(backward=False)

    def relative_speed(self, problem: Problem) -> float:
        return 9.0

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        return attend_op(qkv, bias, problem.axis, problem.window)


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_the_graph_holds_just_the_op_of_the_chosen_backend(dynamic: bool | None) -> None:
    graphs = Graphs()
    compiled = torch.compile(
        lambda qkv, bias: maxattn.max_sa(qkv, "grid", 4, bias), fullgraph=True, dynamic=dynamic, backend=graphs
    )
    with registered(Op()):
        out = compiled(QKV, BIAS)
    assert torch.equal(out, maxattn.max_sa(QKV, "grid", 4, BIAS, backend="naive"))
    (called,) = graphs.called
    assert called == ["attend.default"]


def used(graphs: Graphs) -> str:
    """The backend that the latest graph is made of."""
    called = graphs.called[-1]
    return "sdpa" if "scaled_dot_product_attention" in called else "naive" if "matmul" in called else "op"


def test_use_backend_compiles_anew_and_going_back_does_not() -> None:
    graphs = Graphs()
    compiled = torch.compile(lambda qkv: maxattn.max_sa(qkv, window=4), fullgraph=True, backend=graphs)
    compiled(QKV)
    assert used(graphs) == "sdpa"
    with maxattn.use_backend("naive"):
        compiled(QKV)
        assert used(graphs) == "naive"
        with maxattn.use_backend(None):
            compiled(QKV)
        compiled(QKV)
    compiled(QKV)
    assert len(graphs.called) == 2


def test_use_backend_works_inside_of_compiled_code() -> None:
    graphs = Graphs()

    @torch.compile(fullgraph=True, backend=graphs)
    def attend(qkv: Tensor) -> Tensor:
        with maxattn.use_backend("naive"):
            return maxattn.max_sa(qkv, window=4)

    assert torch.equal(attend(QKV), maxattn.max_sa(QKV, window=4, backend="naive"))
    assert used(graphs) == "naive"
    assert maxattn.explain(QKV, window=4).asked_by == "automatic"
    torch.compile(lambda qkv: maxattn.max_sa(qkv, window=4), fullgraph=True, backend=graphs)(QKV)
    assert used(graphs) == "sdpa"


def test_blocks_that_overlap_without_nesting_leave_no_override_behind() -> None:
    """As two tasks of one thread do."""
    graphs, first, second = Graphs(), maxattn.use_backend("naive"), maxattn.use_backend("naive")
    for step in (
        first.__enter__,
        second.__enter__,
        *(partial(each.__exit__, None, None, None) for each in (first, second)),
    ):
        step()
    torch.compile(lambda qkv: maxattn.max_sa(qkv, window=4), fullgraph=True, backend=graphs)(QKV)
    assert used(graphs) == "sdpa"


def test_the_environment_is_read_while_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = Graphs()
    monkeypatch.setenv("MAXATTN_BACKEND", "naive")
    torch.compile(lambda qkv: maxattn.max_sa(qkv, window=4), fullgraph=True, backend=graphs)(QKV)
    assert used(graphs) == "naive"


def test_a_change_of_what_the_choice_depends_on_compiles_anew() -> None:
    class Hasty(Op):
        capabilities = Capabilities(backward=False, deterministic=False, dtypes=frozenset({torch.float32}))

    graphs = Graphs()
    compiled = torch.compile(lambda qkv: maxattn.max_sa(qkv, window=4), fullgraph=True, backend=graphs)
    with registered(Hasty()):
        compiled(QKV)
        assert used(graphs) == "op"
        compiled(QKV.double())
        assert used(graphs) == "sdpa"
        compiled(QKV.clone().requires_grad_())
        assert used(graphs) == "sdpa"
        torch.use_deterministic_algorithms(True)
        try:
            compiled(QKV)
        finally:
            torch.use_deterministic_algorithms(False)
        assert used(graphs) == "sdpa"
        assert len(graphs.called) == 4
        compiled(QKV)
        with torch.no_grad():
            compiled(QKV.clone().requires_grad_())
        assert used(graphs) == "op"


def test_a_backend_learns_that_it_is_compiled() -> None:
    problems = []

    class Asked(Recording):
        def unsupported(self, problem: Problem) -> list[Reason]:
            problems.append(problem)
            return []

    with registered(Asked("asked")):
        torch.compile(lambda qkv: maxattn.max_sa(qkv, window=4), fullgraph=True, dynamic=True, backend="eager")(
            QKV.repeat(2, 1, 1, 1, 1, 1)
        )
    (problem,) = problems
    assert problem.compiling
    assert not problem.exporting
    assert (problem.batch, problem.height, problem.width) == (None, None, None)


def test_forced_and_unable_does_not_fall_back() -> None:
    unable = Recording("unable", Reason("moon", "the moon is not full"))
    compiled = torch.compile(
        lambda qkv: maxattn.max_sa(qkv, window=4, backend="unable"), fullgraph=True, backend="eager"
    )
    with recording(unable), pytest.raises(RuntimeError, match="unable: the moon is not full"):
        compiled(QKV)
    assert unable.used == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"qkv": QKV[0]}, r"qkv must be \(B, H, W, 3, heads, head_dim\), not \(8, 8, 3, 2, 4\)"),
        ({"bias": BIAS[:, :3, :3]}, r"bias must be \(heads, N, N\) = \(2, 16, 16\)"),
        ({"window": 0}, "window must be at least 1 x 1 token"),
        ({"window": 4.0}, "window must be an int or two ints"),
        ({"axis": "blocks"}, "axis must be 'block' or 'grid', not 'blocks'"),
    ],
)
def test_a_wrong_argument_is_named(wrong: dict[str, Any], message: str) -> None:
    arguments = {"qkv": QKV, "axis": "block", "window": 4, "bias": BIAS} | wrong
    compiled = torch.compile(lambda: maxattn.max_sa(**arguments), fullgraph=True, backend="eager")
    with pytest.raises(RuntimeError, match=message):
        compiled()


class Attention(nn.Module):
    """Arguments of every kind as attributes, as modules have them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(2, 16, 16))
        self.window = [4, 4]
        self.axis = "grid"
        self.scale = 0.3

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(-1, (3, 2, 4))
        return maxattn.max_sa(qkv, self.axis, self.window, self.bias, self.scale).flatten(3)


def test_arguments_may_be_attributes_of_a_module_and_the_window_a_list() -> None:
    module, x = Attention(), torch.randn(2, 9, 8, 8)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    compiled(x).square().sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    module(x).square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_scale_and_dropout_may_be_symbols() -> None:
    compiled = torch.compile(
        lambda qkv, scale, dropout_p: maxattn.max_sa(qkv, window=4, scale=scale, dropout_p=dropout_p),
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for scale in (0.3, 0.4):
        torch.testing.assert_close(compiled(QKV, scale, 0.0), maxattn.max_sa(QKV, window=4, scale=scale))
    ones = torch.ones(2, 8, 8, 3, 2, 4)
    for dropout_p in (0.25, 0.5):
        dropped = compiled(ones, 0.3, dropout_p)
        kept = dropped * 16 * (1 - dropout_p)
        torch.testing.assert_close(kept, kept.round(), rtol=0.0, atol=1e-4)
        assert abs(kept.mean() / 16 - (1 - dropout_p)) < 0.1
        assert not torch.equal(compiled(ones, 0.3, dropout_p), dropped)


@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(autocast_dtype: torch.dtype) -> None:
    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        return maxattn.max_sa(qkv, window=4, bias=bias)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", autocast_dtype):
        out = compiled(QKV, BIAS)
    assert out.dtype == torch.float32
    assert torch.equal(out, attend(QKV, BIAS))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    def attend(qkv: Tensor, bias: Tensor) -> Tensor:
        return maxattn.max_sa(qkv, "grid", 4, bias)

    def checkpointed(qkv: Tensor, bias: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(attend, qkv, bias, use_reentrant=False)

    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    assert_compiled_equals_eager(attend, compiled, (2, 9, 8))
