"""What a backend is told (`Problem`), what it states (`Capabilities`) and what it answers (`Reason`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Axis = Literal["block", "grid"]
API_VERSION = (1, 0)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a backend cannot serve a problem: a stable `code`, a sentence, and what would work."""

    code: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Everything the choice of a backend may depend on, and all that `Backend.attend` needs to know.

    `batch`, `height` and `width` are None where a compiler traces them as symbols: the backend must then
    be able to serve any size. Sizes are in pixels, `window` in tokens `(P_h, P_w)`.

    Example:
        >>> problem = Problem(axis="grid", window=(7, 7), batch=2, height=56, width=50, heads=2, head_dim=32)
        >>> problem.tokens, problem.ragged
        (49, True)
    """

    axis: Axis
    window: tuple[int, int]
    batch: int | None
    height: int | None
    width: int | None
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    compute_capability: tuple[int, int] | None = None
    bias: torch.dtype | None = None
    requires_grad: bool = False
    bias_requires_grad: bool = False
    scale: float | None = None
    dropout_p: float = 0.0
    deterministic: bool = False
    compiling: bool = False
    exporting: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a full group, `N = P_h * P_w`."""
        return self.window[0] * self.window[1]

    @property
    def softmax_scale(self) -> float:
        """The factor on `q k^T`: `scale`, or `head_dim ** -0.5` where none was given."""
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def ragged(self) -> bool:
        """Whether some group is not full, or could be: a size is no multiple of its window or is not known."""
        return any(
            size is None or size % window != 0
            for size, window in zip((self.height, self.width), self.window, strict=True)
        )

    @property
    def differentiated(self) -> bool:
        """Whether a backward pass may follow."""
        return self.requires_grad or self.bias_requires_grad

    def __str__(self) -> str:
        size = "x".join("?" if n is None else str(n) for n in (self.batch, self.height, self.width))
        facts = [
            f"{self.axis} {self.window[0]}x{self.window[1]}",
            f"image {size}",
            f"{self.heads} heads of {self.head_dim}",
            dtype_name(self.dtype),
            self.device + (" sm{}{}".format(*self.compute_capability) if self.compute_capability else ""),
            "no bias" if self.bias is None else f"bias {dtype_name(self.bias)}",
        ]
        gradients = [name for name, on in (("qkv", self.requires_grad), ("bias", self.bias_requires_grad)) if on]
        facts.append(f"gradient of {' and '.join(gradients)}" if gradients else "no gradient")
        facts += [f"dropout {self.dropout_p:g}"] if self.dropout_p else []
        facts += [name for name in ("ragged", "deterministic", "compiling", "exporting") if getattr(self, name)]
        return ", ".join(facts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """The facts a backend states about itself; `None` means no limit. Ranges include both ends.

    `double_backward` is a statement for readers and for tests: nobody can know of it before the forward pass.
    """

    devices: frozenset[str] | None = None
    compute_capability: tuple[tuple[int, int], tuple[int, int] | None] | None = None
    dtypes: frozenset[torch.dtype] = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
    head_dims: tuple[int, int] | None = None
    head_dim_multiple: int = 1
    window_tokens: tuple[int, int] | None = None
    bias: bool = True
    bias_dtypes: frozenset[torch.dtype] | None = None
    bias_gradient: bool = True
    backward: bool = True
    dropout: bool = True
    deterministic: bool = True
    ragged: bool = True
    compile: bool = True
    export: bool = True
    double_backward: bool = False

    def __post_init__(self) -> None:
        for fact in ("devices", "dtypes", "bias_dtypes"):
            value = getattr(self, fact)
            if not isinstance(value, frozenset) and (value is not None or fact == "dtypes"):
                raise TypeError(f"{fact} of Capabilities must be a frozenset, not {value!r}")
            if value is not None and not value:
                raise ValueError(f"{fact} of Capabilities is empty: no problem could ever be served")
        if not isinstance(self.head_dim_multiple, int) or self.head_dim_multiple < 1:
            raise ValueError(f"head_dim_multiple of Capabilities must be 1 or more, not {self.head_dim_multiple!r}")
        for fact, step in (("head_dims", self.head_dim_multiple), ("window_tokens", 1)):
            _check_range(fact, getattr(self, fact), step)

    def unsupported(self, problem: Problem) -> list[Reason]:
        """The reasons why these facts exclude `problem`; an empty list means able.

        Example:
            >>> problem = Problem(axis="block", window=(7, 7), batch=1, height=7, width=7, heads=1, head_dim=20)
            >>> [reason.code for reason in Capabilities(head_dim_multiple=8).unsupported(problem)]
            ['head_dim']
        """
        return [*self._placement(problem), *self._shape(problem), *self._features(problem)]

    def _placement(self, problem: Problem) -> list[Reason]:
        reasons = []
        if self.devices is not None and problem.device not in self.devices:
            reasons.append(Reason("device", f"no support for {problem.device}", f"devices: {_names(self.devices)}"))
        elif self.compute_capability is not None and problem.device == "cuda":
            low, high = self.compute_capability
            seen = problem.compute_capability
            if seen is None:
                reasons.append(Reason("compute_capability", "the GPU's compute capability is not known"))
            elif seen < low:
                reasons.append(Reason("too_old", f"compute capability {_dot(seen)} is too old", f"from {_dot(low)}"))
            elif high is not None and seen > high:
                reasons.append(Reason("too_new", f"compute capability {_dot(seen)} is too new", f"up to {_dot(high)}"))
        if problem.dtype not in self.dtypes:
            reasons.append(Reason("dtype", f"no support for {problem.dtype}", f"dtypes: {_names(self.dtypes)}"))
        if problem.bias is not None and self.bias_dtypes is not None and problem.bias not in self.bias_dtypes:
            reasons.append(
                Reason("bias_dtype", f"no support for a {problem.bias} bias", f"dtypes: {_names(self.bias_dtypes)}")
            )
        return reasons

    def _shape(self, problem: Problem) -> list[Reason]:
        reasons = []
        if self.head_dims is not None and not self.head_dims[0] <= problem.head_dim <= self.head_dims[1]:
            hint = f"from {self.head_dims[0]} to {self.head_dims[1]}"
            reasons.append(Reason("head_dim", f"head_dim {problem.head_dim} is out of range", hint))
        elif problem.head_dim % self.head_dim_multiple:
            hint = f"a multiple of {self.head_dim_multiple}"
            reasons.append(Reason("head_dim", f"head_dim {problem.head_dim} does not fit", hint))
        if self.window_tokens is not None and not self.window_tokens[0] <= problem.tokens <= self.window_tokens[1]:
            hint = f"from {self.window_tokens[0]} to {self.window_tokens[1]}"
            reasons.append(Reason("window", f"a window of {problem.tokens} tokens is out of range", hint))
        if problem.ragged and not self.ragged:
            hint = f"height and width that are multiples of {problem.window[0]} and {problem.window[1]}"
            reasons.append(Reason("ragged", "windows that the image does not fill are not supported", hint))
        return reasons

    def _features(self, problem: Problem) -> list[Reason]:
        asked = [
            (problem.bias is not None, self.bias, "bias", "a relative position bias"),
            (problem.bias_requires_grad, self.bias_gradient, "bias_gradient", "a gradient of the bias"),
            (problem.differentiated, self.backward, "backward", "a backward pass"),
            (problem.dropout_p > 0, self.dropout, "dropout", "dropout of attention weights"),
            (problem.deterministic, self.deterministic, "deterministic", "deterministic algorithms"),
            (problem.compiling and not problem.exporting, self.compile, "compile", "torch.compile"),
            (problem.exporting, self.export, "export", "torch.export"),
        ]
        return [Reason(code, f"{what} is not supported") for wanted, able, code, what in asked if wanted and not able]


def _check_range(fact: str, ends: object, step: int) -> None:
    """Raise unless `ends` is None, or two numbers from 1 up with a multiple of `step` between them."""
    match ends:
        case None:
            return
        case (int(low), int(high)):
            if not 1 <= low <= high // step * step:
                multiple = f" with a multiple of {step} between them" if step > 1 else ""
                raise ValueError(f"{fact} of Capabilities must be (low, high), 1 <= low <= high{multiple}, not {ends}")
        case _:
            raise TypeError(f"{fact} of Capabilities must be (low, high), two integers, not {ends!r}")


class Backend(ABC):
    """One way to compute Max-SA. Stateless: the same instance serves every thread.

    A subclass gives `name`, `capabilities` and `attend`; it may add `unsupported` for what the declared facts
    cannot say, `relative_speed` to be preferred by the automatic choice, and `kernel` if it picks a kernel inside.
    Importing a backend must not import the library it adapts: that happens at first use.

    Example:
        >>> import maxattn
        >>> class Halved(maxattn.Backend):
        ...     name = "halved"
        ...     def attend(self, qkv, bias, problem):
        ...         return maxattn.max_sa(qkv, problem.axis, problem.window, bias, backend="naive") / 2
        >>> Halved().unsupported(None)
        ()
    """

    name: str
    api_version: tuple[int, int] = API_VERSION
    capabilities: Capabilities = Capabilities()

    def unsupported(self, problem: Problem) -> Sequence[Reason]:
        """Reasons beyond the declared facts why `problem` cannot be served; asked only if the facts allow it."""
        return ()

    def relative_speed(self, problem: Problem) -> float:
        """Expected speed on `problem` as a multiple of `sdpa`'s; the automatic choice takes the largest."""
        return 1.0

    def kernel(self, problem: Problem) -> str:
        """The kernel that would run inside, where the backend itself picks one; for `explain`."""
        return ""

    @abstractmethod
    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        """Max-SA of `qkv (B, H, W, 3, heads, head_dim)` with `bias (heads, N, N)`; differentiable.

        Returns a contiguous `(B, H, W, heads, head_dim)` in the dtype of `qkv`. Inputs are validated already, and
        must not be modified. `problem` carries the axis, window, scale and dropout.
        """


Speeds = tuple[tuple[float, float], ...]
"""Of windows of up to so many tokens: `(tokens, speed)`, by ascending tokens."""


@dataclass(frozen=True, kw_only=True)
class MeasuredSpeed:
    """How many times faster than `sdpa` a backend was measured to be, for its `relative_speed`.

    Raises:
        ValueError: for an empty table, or one whose tokens do not ascend.

    Example:
        >>> inference, training = ((64, 2.0), (float("inf"), 0.8)), ((float("inf"), 1.5),)
        >>> speed = MeasuredSpeed(
        ...     inference=inference,
        ...     training=training,
        ...     inference_without_bias=inference,
        ...     training_without_bias=training,
        ... )
        >>> speed.of(Problem(axis="block", window=(7, 7), batch=1, height=14, width=14, heads=2, head_dim=32))
        2.0
    """

    inference: Speeds
    training: Speeds
    inference_without_bias: Speeds
    training_without_bias: Speeds

    def __post_init__(self) -> None:
        for name, speeds in vars(self).items():
            tokens = [most for most, _ in speeds]
            if not tokens or tokens != sorted(set(tokens)):
                told = f"of ascending numbers of tokens, as ((64, 2.0), (inf, 0.8)) is, not of {tokens}"
                raise ValueError(f"{name} of MeasuredSpeed must be {told}")

    def of(self, problem: Problem) -> float:
        """The speed for windows of as many tokens; of more than the table has, that of the most."""
        if problem.differentiated:
            speeds = self.training_without_bias if problem.bias is None else self.training
        else:
            speeds = self.inference_without_bias if problem.bias is None else self.inference
        return next((speed for tokens, speed in speeds if problem.tokens <= tokens), speeds[-1][1])


def _dot(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def dtype_name(dtype: torch.dtype | str) -> str:
    """The name of a dtype, or of a device, without the library's.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def _names(values: frozenset[str] | frozenset[torch.dtype]) -> str:
    return ", ".join(sorted(map(dtype_name, values)))
