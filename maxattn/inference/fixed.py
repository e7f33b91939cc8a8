"""Modules whose tensors are fixed: whoever has made something of them is told when they are moved or loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from maxattn.nn.basic import LayerNorm2d


class Changes:
    """How often tensors of one network were moved or loaded. All its modules count in the same one."""

    def __init__(self) -> None:
        self.count = 0


class Fixed(nn.Module):
    """A part of a network for inference that has tensors."""

    changes: Changes | None = None

    def _changed(self) -> None:
        """Tensors were moved or loaded: what was made of them is no longer theirs."""
        if self.changes is not None:
            self.changes.count += 1

    def _apply(self, fn: Any, recurse: bool = True) -> Fixed:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._changed()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._changed()


class FixedNorm(Fixed):
    """A norm that keeps its weights, for they cannot be folded: of MBConvs without batch norms, and the head's."""

    def __init__(self, norm: nn.Module) -> None:
        take_over(self, norm)


class FixedGroupNorm(FixedNorm, nn.GroupNorm):
    pass


class FixedLayerNorm(FixedNorm, nn.LayerNorm):
    pass


class FixedLayerNorm2d(FixedNorm, LayerNorm2d):
    pass


FIXED_NORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.GroupNorm: FixedGroupNorm,
    nn.LayerNorm: FixedLayerNorm,
    LayerNorm2d: FixedLayerNorm2d,
}


def take_over(to: nn.Module, module: nn.Module) -> None:
    """Make `to`, whose own `__init__` has not run, a module with all that `module` has."""
    nn.Module.__init__(to)
    vars(to).update(vars(module))
