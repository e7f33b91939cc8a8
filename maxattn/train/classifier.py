"""A trained classifier: the network with the names of its classes and the normalisation of its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from maxattn.nn import MaxViT
from maxattn.spec import pair
from maxattn.tasks import classification
from maxattn.train.augment import normalise
from maxattn.train.data import Images, image_mode, read_image
from maxattn.weights import open_model, save_weights


def find_device(name: str) -> torch.device:
    """The device of a name; "auto" is the GPU if there is one, else the CPU.

    Raises:
        ValueError: for a device that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: this PyTorch sees no GPU here; cpu works")
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, not {name!r}")
    return torch.device(name)


@dataclass(frozen=True)
class Classifier:
    """A network, the names of its classes, and the mean and standard deviation of its input's pixels.

    Example:
        >>> import maxattn
        >>> digits = Classifier(maxattn.build("nano"), tuple("0123456789"), mean=(0.5,), std=(0.5,))
        >>> digits.logits(torch.zeros(2, 3, 28, 28, dtype=torch.uint8)).shape
        torch.Size([2, 10])
    """

    model: MaxViT
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def open(cls, path: str | Path, device: torch.device) -> Classifier:
        """A classifier from the file that `save` wrote.

        Raises:
            ValueError: if the file has no class names or no normalisation inside, or is no weights file.
            OSError: if it cannot be read.
        """
        model, extra = open_model(path)
        missing = {"classes", "mean", "std"} - extra.keys()
        if missing:
            raise ValueError(
                f"{path} lacks {', '.join(sorted(missing))}, which 'maxattn train' writes beside the weights; add "
                "them: maxattn.save_weights(model, path, extra={'classes': [...], 'mean': [...], 'std': [...]})"
            )
        return cls(model.to(device), *(tuple(extra[name]) for name in ("classes", "mean", "std")))

    def save(self, path: Path) -> None:
        save_weights(self.model, path, {"classes": self.classes, "mean": self.mean, "std": self.std})

    def prepare(self, images: Tensor) -> Tensor:
        """uint8 images `(B, C, H, W)`, on any device, as the network takes them."""
        return normalise(images.to(next(self.model.parameters()).device), self.mean, self.std)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Logits `(B, classes)` of uint8 images `(B, C, H, W)`, in eval mode."""
        return self.model.eval()(self.prepare(images))

    def evaluate(
        self, images: Images, batch_size: int, on_batch: Callable[[int], None] = lambda images: None
    ) -> classification.Totals:
        """Accuracy and mean cross-entropy; `on_batch` is called with the size of each batch that is done."""
        totals = classification.Totals()
        for pixels, labels in images.batches(images.in_order(batch_size)):
            logits = self.logits(pixels).cpu()
            totals.add(logits, labels, classification.loss(logits, labels).item())
            on_batch(len(labels))
        return totals

    def predict(self, files: Sequence[Path], batch_size: int = 64) -> Iterator[tuple[Path, Tensor]]:
        """Each file with the probabilities of the classes, `(classes)`.

        Raises:
            ValueError: for a file that cannot be read, naming it.
        """
        mode, size = image_mode(self.model.spec), pair(self.model.spec.img_size)
        for start in range(0, len(files), batch_size):
            some = files[start : start + batch_size]
            images = torch.stack([read_image(file, mode, size) for file in some])
            yield from zip(some, self.logits(images).float().softmax(-1).cpu(), strict=True)
