"""What became of weights that were loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

SHOWN = 5


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did; `str()` is readable, `to_dict()` is plain data.

    Attributes:
        source: the path, or "the state dict".
        naming: "maxattn", "timm", "torchvision" or "tensorflow".
        loaded: the model's tensors that have been set.
        resized: those of them, tables of relative positions, that came from another window: `{name: (from, to)}`.
        folded: those whose q was multiplied by a factor, for the model's attention scale is another.
        missing: the model's tensors that the weights do not have; they are as they were.
        unexpected: names in the weights that nothing in the model takes.
        mismatched: the model's tensors whose weights do not fit, and why; they are as they were.
        ignored: how many entries of the weights are known to be of no use, such as index buffers.
        num_classes: of the weights' classifier; None if they have none.
    """

    source: str
    naming: str
    loaded: tuple[str, ...]
    resized: Mapping[str, tuple[tuple[int, int], tuple[int, int]]]
    folded: Mapping[str, float]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    mismatched: Mapping[str, str]
    ignored: int
    num_classes: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"loaded {len(self.loaded)} tensors of {self.source}, in {self.naming}'s naming"]
        if self.resized:
            windows = sorted({f"{old[0]} x {old[1]} to {new[0]} x {new[1]}" for old, new in self.resized.values()})
            lines.append(f"resized {len(self.resized)} tables of relative positions: window {', '.join(windows)}")
        if self.folded:
            factors = sorted({f"{factor:.4g}" for factor in self.folded.values()})
            lines.append(f"multiplied q by {', '.join(factors)} in {len(self.folded)}: another attention scale")
        lines += self.problems()
        if self.ignored:
            lines.append(f"ignored {self.ignored} entries that are of no use")
        return "\n".join(lines)

    def problems(self) -> list[str]:
        """A line for each way in which weights and model differ."""
        mismatched = [f"{name} ({why})" for name, why in self.mismatched.items()]
        lines = {
            "missing in the weights": self.missing,
            "not in the model": self.unexpected,
            "of another shape": mismatched,
        }
        return [f"{len(names)} {what}: {listed(names)}" for what, names in lines.items() if names]


def listed(names: Iterable[str]) -> str:
    """The first few, separated by commas."""
    first = list(names)
    return ", ".join(first[:SHOWN]) + (", ..." if len(first) > SHOWN else "")
