"""Max-SA as a module, and the transformer layer around it. NHWC in and out."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from maxattn.nn import gpu
from maxattn.nn.basic import ACTIVATIONS, token_norm, update
from maxattn.nn.checkpointing import Selective
from maxattn.nn.rel_pos import RelPosLogMLP, RelPosTable
from maxattn.ops.call import check_groups, window_pair
from maxattn.ops.contract import Axis
from maxattn.ops.max_sa import max_sa


class MaxAttention(nn.Module):
    """Multi-head self-attention within local blocks or over a dilated grid of the image (MaxViT paper, section 3.2).

    Args:
        width: channels.
        axis: "block" or "grid".
        window: tokens of a group, an int or `(P_h, P_w)`.
        head_dim: channels of a head; must divide `width`.
        rel_pos: relative position bias: "table", "log_mlp" or "none".
        scale: factor on `q k^T`: "head_dim" or "width" for that to the power -0.5, or a number.
        attn_drop, proj_drop: dropout of attention weights, and after the output projection.
        backend: name or comma list that must compute the attention; None: chosen for each call.

    Shapes: `x (B, H, W, width)` to the same, for any H and W.

    Raises:
        ValueError: if `head_dim` does not divide `width`, or for an invalid axis, window, scale or rel_pos.

    Example:
        >>> import torch, maxattn
        >>> attention = maxattn.nn.MaxAttention(64, axis="grid", window=7)
        >>> attention(torch.randn(2, 20, 31, 64)).shape
        torch.Size([2, 20, 31, 64])
    """

    def __init__(
        self,
        width: int,
        axis: Axis = "block",
        window: int | tuple[int, int] = (7, 7),
        *,
        head_dim: int = 32,
        rel_pos: Literal["table", "log_mlp", "none"] = "table",
        rel_pos_hidden: int = 512,
        scale: Literal["head_dim", "width"] | float = "head_dim",
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if head_dim < 1 or width % head_dim:
            raise ValueError(f"head_dim must be a positive int that divides the width {width}, not {head_dim}")
        if isinstance(scale, str) and scale not in ("head_dim", "width"):
            raise ValueError(f"scale must be 'head_dim', 'width' or a number, not {scale!r}")
        self.axis: Axis = axis
        self.window = window_pair(window)
        check_groups(self.axis, self.window)
        self.heads = width // head_dim
        self.scale = {"head_dim": head_dim**-0.5, "width": width**-0.5}[scale] if isinstance(scale, str) else scale
        self.attn_drop = attn_drop
        self.backend = backend
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.rel_pos = _rel_pos(rel_pos, self.heads, self.window, rel_pos_hidden)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_drop)

    def project(self, x_BHWC: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `max_sa` is given: qkv `(B, H, W, 3, heads, head_dim)`, and the bias `(heads, N, N)` or None."""
        return self.split(self.qkv(x_BHWC))

    def split(self, qkv_BHWC: Tensor) -> tuple[Tensor, Tensor | None]:
        """The same, of what `qkv` makes."""
        bias = None if self.rel_pos is None else self.rel_pos()
        return qkv_BHWC.unflatten(-1, (3, self.heads, -1)), bias

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.attend(*self.project(x_BHWC))

    def attend(self, qkv_BHW3hd: Tensor, bias: Tensor | None) -> Tensor:
        """The rest of `forward`, of what `project` returns."""
        dropout_p = self.attn_drop if self.training else 0.0
        out_BHWhd = max_sa(qkv_BHW3hd, self.axis, self.window, bias, self.scale, dropout_p, self.backend)
        return self.proj_drop(self.proj(out_BHWhd.flatten(-2)))

    def set_window(self, window: tuple[int, int]) -> None:
        """Take another window; a table of relative positions is resized bilinearly."""
        if self.rel_pos is not None:
            self.rel_pos.resize(window)
        self.window = window

    def extra_repr(self) -> str:
        return f"axis={self.axis!r}, window={self.window}, heads={self.heads}, backend={self.backend!r}"


class MLP(nn.Module):
    """Linear, activation, Linear over the channels."""

    def __init__(self, width: int, hidden: int, act: str = "gelu_tanh", dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = ACTIVATIONS[act]()
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.activated(self.fc1(x))))

    def activated(self, y: Tensor) -> Tensor:
        """What comes between the Linears."""
        return self.drop(self.act(y))


class AttentionLayer(Selective):
    """Norm, Max-SA, add; norm, MLP, add. `(B, H, W, width)` to the same; `mlp_ratio` 0 leaves the MLP out."""

    def __init__(
        self,
        attention: MaxAttention,
        *,
        mlp_ratio: float = 4.0,
        act: str = "gelu_tanh",
        norm: str = "layer_norm",
        norm_eps: float = 1e-5,
        layer_scale: float = 0.0,
        drop_path: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        width = attention.proj.out_features
        self.norm1 = token_norm(norm, width, norm_eps)
        self.attn = attention
        self.update1 = update(width, layer_scale, drop_path)
        self.norm2, self.mlp, self.update2 = None, None, None
        if mlp_ratio:
            self.norm2 = token_norm(norm, width, norm_eps)
            self.mlp = MLP(width, max(1, int(width * mlp_ratio)), act, proj_drop)
            self.update2 = update(width, layer_scale, drop_path)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        x_BHWC, y_BHWC = self._attended(x_BHWC)
        x_BHWC = x_BHWC + self.update1(y_BHWC)
        if self.mlp is None or self.norm2 is None or self.update2 is None:
            return x_BHWC
        x_BHWC, y_BHWC = self._fed(x_BHWC, self.norm2, self.mlp)
        return x_BHWC + self.update2(y_BHWC)

    def _attended(self, x_BHWC: Tensor) -> tuple[Tensor, Tensor]:
        """x again, and its update."""
        if type(self.attn) is not MaxAttention or not gpu.unchanged(self.attn):
            return x_BHWC, self.attn(self.norm1(x_BHWC))
        if gpu.serves_norm_linear(self.norm1, self.attn.qkv, x_BHWC):
            x_BHWC, y_BHWC = gpu.norm_linear(self.norm1, self.attn.qkv, x_BHWC)  # type: ignore[arg-type]
        else:
            y_BHWC = self.part(self._projected, x_BHWC)
        return x_BHWC, self.attn.attend(*self.attn.split(y_BHWC))

    def _projected(self, x_BHWC: Tensor) -> Tensor:
        return self.attn.qkv(self.light(self.norm1, x_BHWC))

    def _fed(self, x_BHWC: Tensor, norm: nn.Module, mlp: MLP) -> tuple[Tensor, Tensor]:
        """x again, and its update."""
        if type(mlp) is not MLP or not gpu.unchanged(mlp):
            return x_BHWC, mlp(norm(x_BHWC))
        random = mlp.drop.p > 0
        if gpu.serves_mlp(norm, mlp.fc1, mlp.act, mlp.drop, mlp.fc2, x_BHWC):
            return gpu.mlp(norm, mlp.fc1, mlp.act, mlp.fc2, x_BHWC)  # type: ignore[arg-type]

        def hidden(x_BHWC: Tensor) -> Tensor:
            return mlp.fc1(self.light(norm, x_BHWC))

        def second(y_BHWC: Tensor) -> Tensor:
            return mlp.fc2(self.light(mlp.activated, y_BHWC, random=random))

        return x_BHWC, mlp.drop(self.part(second, self.part(hidden, x_BHWC), random=random))


def _rel_pos(kind: str, heads: int, window: tuple[int, int], hidden: int) -> RelPosTable | RelPosLogMLP | None:
    if kind == "table":
        return RelPosTable(heads, window)
    if kind == "log_mlp":
        return RelPosLogMLP(heads, window, hidden)
    if kind == "none":
        return None
    raise ValueError(f"rel_pos must be 'table', 'log_mlp' or 'none', not {kind!r}")
