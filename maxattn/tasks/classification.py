"""Classification: cross-entropy, and the share of images whose class has the largest logit."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


def loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of `logits (B, classes)` with `labels (B)`, in fp32 at least."""
    return F.cross_entropy(logits if logits.itemsize >= 4 else logits.float(), labels, label_smoothing=label_smoothing)


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of `logits (B, classes)` are largest at their label `(B)`, on their device."""
    return (logits.argmax(-1) == labels).sum()


@dataclass
class Totals:
    """Sums over images, from which `loss` and `accuracy` follow.

    Example:
        >>> import torch
        >>> totals = Totals()
        >>> totals.add(torch.tensor([[2.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 0]), 1.5)
        >>> totals.accuracy, totals.loss
        (0.5, 1.5)
    """

    images: int = 0
    correct: int = 0
    summed_loss: float = 0.0

    def add(self, logits: Tensor, labels: Tensor, loss: float) -> None:
        """Count a batch: `logits (B, classes)`, `labels (B)` and its mean loss."""
        self.count(len(labels), int(right(logits, labels)), loss)

    def count(self, images: int, correct: int, loss: float) -> None:
        """Count a batch of so many images, of which so many are classified correctly, and its mean loss."""
        self.images += images
        self.correct += correct
        self.summed_loss += loss * images

    @property
    def accuracy(self) -> float:
        return self.correct / self.images if self.images else 0.0

    @property
    def loss(self) -> float:
        return self.summed_loss / self.images if self.images else 0.0
