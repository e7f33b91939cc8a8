"""Images in folders, a folder a class, as batches of uint8."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from maxattn.spec import MaxViTSpec, pair
from maxattn.train.progress import track

LAYOUT = "images lie in DATA/train/<class>/ and DATA/val/<class>/"
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}

KEPT_BYTES = 2**30
"""Decoded images up to this size in all are read once and kept in memory; more are read again for each batch."""


@dataclass(frozen=True)
class ImageFolder:
    """The image files below `folder/<class>/`, in order; `labels` are positions in `classes`."""

    folder: Path
    classes: tuple[str, ...]
    files: tuple[Path, ...]
    labels: tuple[int, ...]

    @classmethod
    def find(cls, folder: Path, classes: Sequence[str] | None = None) -> ImageFolder:
        """Look for images; `classes` are those there may be, by default the names of the folders, sorted.

        Raises:
            FileNotFoundError: if there is no such folder.
            ValueError: if it has no class folders, one without images, or one that is not in `classes`.
        """
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}; {LAYOUT}")
        found = {path.name: find_images(path) for path in sorted(folder.iterdir()) if _is_class(path)}
        if not found:
            loose = sum(_is_image(path) for path in folder.iterdir())
            seen = f"{loose} images but no folder" if loose else "no folder"
            raise ValueError(f"{folder} has {seen} of a class; {LAYOUT}")
        empty = [name for name, files in found.items() if not files]
        if empty:
            suffixes = ", ".join(sorted(SUFFIXES))
            raise ValueError(f"no images in {folder} for {', '.join(empty)}; images end in {suffixes}")
        classes = tuple(found) if classes is None else tuple(classes)
        unknown = [name for name in found if name not in classes]
        if unknown:
            known = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
            raise ValueError(f"{folder} has images of {', '.join(unknown)}, but the known classes are {known}")
        pairs = [(path, classes.index(name)) for name, files in found.items() for path in files]
        files, labels = zip(*pairs, strict=True)
        return cls(folder, classes, files, labels)


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Labelled image files as `(B, C, H, W)` uint8 and `(B)` int64, of the size and channels of a spec.

    Larger images are scaled down, smaller ones up, and what does not fit the shape is cut off on both sides.

    Raises:
        ValueError: for a file that cannot be read, naming it, or a number of channels that images do not have.
    """

    def __init__(
        self, folder: ImageFolder, spec: MaxViTSpec, workers: int, console: Console, kept_bytes: int = KEPT_BYTES
    ) -> None:
        self.files = folder.files
        self.labels = torch.tensor(folder.labels)
        self.mode, self.size = image_mode(spec), pair(spec.img_size)
        self.workers = workers
        self.kept: Tensor | None = None
        shape = (len(self), spec.in_chans, *self.size)
        if np.prod(shape) <= kept_bytes:
            kept = torch.empty(shape, dtype=torch.uint8)
            with ThreadPoolExecutor(max(1, workers)) as pool:
                images = pool.map(self._read, self.files)
                for index, image in enumerate(
                    track(images, f"reading {folder.folder.name} images", len(self), console)
                ):
                    kept[index] = image
            self.kept, self.workers = kept, 0

    def __len__(self) -> int:
        return len(self.files)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor] | ValueError:
        """A batch. An error is returned: raised in a worker, it would come with the worker's traceback as its text."""
        if self.kept is not None:
            return self.kept[indices], self.labels[indices]
        try:
            return torch.stack([self._read(self.files[index]) for index in indices]), self.labels[indices]
        except ValueError as error:
            return error

    def batches(self, indices: Sequence[list[int]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The images and labels of each list of indices. Draws nothing from the global random state."""
        loader = DataLoader(
            self,
            batch_sampler=indices,
            num_workers=min(self.workers, len(indices)),
            collate_fn=_unchanged,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, ValueError):
                raise batch
            yield batch

    def in_order(self, batch_size: int) -> list[list[int]]:
        """Indices of all images, for `batches`; the last batch may be smaller."""
        return [part.tolist() for part in torch.arange(len(self)).split(batch_size)]

    def _read(self, file: Path) -> Tensor:
        return read_image(file, self.mode, self.size)


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder, in order; hidden ones are left out."""
    return sorted(path for path in folder.rglob("*") if _is_image(path))


def image_mode(spec: MaxViTSpec) -> str:
    """Pillow's mode for the spec's channels."""
    if spec.in_chans not in MODES:
        raise ValueError(f"image files have 1, 3 or 4 channels, the spec's in_chans is {spec.in_chans}")
    return MODES[spec.in_chans]


def read_image(file: Path, mode: str, size: tuple[int, int]) -> Tensor:
    """An image file as `(C, H, W)` uint8 in Pillow's `mode`, scaled to cover `size` and cut to it around the middle.

    Raises:
        ValueError: for a file that is no image or is damaged, naming it.
    """
    try:
        with Image.open(file) as opened:
            image: Image.Image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16"):
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image.convert(mode)
        if image.size != (size[1], size[0]):
            image = ImageOps.fit(image, (size[1], size[0]), Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(image))
    except Exception as error:  # Pillow's readers raise whatever their formats' parsers do
        raise ValueError(f"cannot read the image {file}: {error}") from error
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _is_class(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _unchanged(batch: Iterable[Tensor]) -> Iterable[Tensor]:
    return batch


def _ignore_interrupt(worker: int) -> None:
    """A terminal sends Ctrl-C to workers too; the process that runs them decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
