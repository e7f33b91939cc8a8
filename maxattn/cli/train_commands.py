"""`maxattn train`, `maxattn eval` and `maxattn predict`: classifiers on folders of images."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from maxattn import use_backend
from maxattn.cli.memory import let_segments_grow
from maxattn.cli.output import JsonOption, print_json, print_table
from maxattn.train import Classifier, TrainingDiverged, TrainingInterrupted, load_config
from maxattn.train import train as run_training
from maxattn.train.classifier import find_device
from maxattn.train.data import SUFFIXES, ImageFolder, Images, find_images
from maxattn.train.engine import WEIGHTS
from maxattn.train.progress import SILENT, Bar, track

INTERRUPTED = 130
WORKERS = 4


class DeviceName(StrEnum):
    """A device as a choice of the command line."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


DeviceOption = Annotated[DeviceName, typer.Option(help="Where to compute; auto: the GPU if there is one.")]
BackendOption = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="Backend of the attention, or a comma list in order of preference."),
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Images computed at once.")]
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL.safetensors", help="What 'maxattn train' wrote.")]


def register(app: typer.Typer) -> None:
    app.command()(train)
    app.command(name="eval")(evaluate)
    app.command()(predict)


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The network's spec and the recipe.")],
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with train/<class>/ and val/<class>/.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where to write; a new or empty folder.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the training in --out stopped.")] = False,
    device: DeviceOption = DeviceName.auto,
) -> None:
    """Train a classifier on folders of images, a folder a class.

    CONFIG.yaml may be as short as 'spec: nano'; the number of classes follows the images:

    \b
      spec: {preset: nano, in_chans: 1}
      recipe: {epochs: 12, lr: 0.003, shift: 2}

    Ctrl-C or SIGTERM writes a checkpoint and ends with exit code 130; the same command with --resume goes on as if
    nothing had happened. After each epoch --out holds checkpoint.pt, metrics.jsonl, config.yaml and
    model.safetensors, the weights of the last epoch.

    \b
    Example:
      $ maxattn train digits.yaml data --out runs/digits
      $ maxattn train digits.yaml data --out runs/digits --resume
      $ maxattn eval runs/digits/model.safetensors data
    """
    settings = load_config(config)
    if find_device(device).type == "cuda":
        let_segments_grow()
    try:
        history = run_training(settings, data, out, resume=resume, device=device, console=Console())
    except TrainingInterrupted as interruption:
        command = shlex.join(["maxattn", "train", str(config), str(data), "--out", str(out), "--resume"])
        typer.echo(f"{interruption}\nto go on: {command}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except TrainingDiverged as divergence:
        typer.echo(f"Error: {divergence}", err=True)
        raise typer.Exit(1) from None
    typer.echo(f"{history[-1]['val_accuracy']:.2%} of the held-out images are right; the weights: {out / WEIGHTS}")


def evaluate(
    model: ModelArgument,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Folder with val/<class>/, or with <class>/ itself.")],
    backend: BackendOption = None,
    batch_size: BatchSizeOption = 256,
    device: DeviceOption = DeviceName.auto,
    as_json: JsonOption = False,
) -> None:
    """Measure a classifier's accuracy and loss on folders of images, and how many it does in a second.

    \b
    Example:
      $ maxattn eval runs/digits/model.safetensors data
      $ maxattn eval runs/digits/model.safetensors data --backend naive
      $ MAXATTN_BACKEND=naive maxattn eval runs/digits/model.safetensors data --json
    """
    classifier = Classifier.open(model, find_device(device))
    folder = ImageFolder.find(data / "val" if (data / "val").is_dir() else data, classifier.classes)
    console = _console(as_json)
    images = Images(folder, classifier.model.spec, WORKERS, console)
    with use_backend(backend), Bar(console, len(images)) as bar:
        bar.advance(0, description=f"evaluating on {folder.folder}")
        started = time.perf_counter()
        totals = classifier.evaluate(images, batch_size, bar.advance)
        seconds = time.perf_counter() - started
    facts = {
        "model": str(model),
        "data": str(folder.folder),
        "images": totals.images,
        "accuracy": totals.accuracy,
        "loss": totals.loss,
        "images_per_second": totals.images / seconds,
    }
    if as_json:
        print_json(facts)
        return
    typer.echo(
        f"{totals.accuracy:.2%} of {totals.images:,} images in {folder.folder} are right; "
        f"loss {totals.loss:.4f}; {totals.images / seconds:,.0f} images/s"
    )


def predict(
    model: ModelArgument,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to name for each image.")] = 3,
    backend: BackendOption = None,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = DeviceName.auto,
    as_json: JsonOption = False,
) -> None:
    """Name the most probable classes of images.

    \b
    Example:
      $ maxattn predict runs/digits/model.safetensors three.png
      $ maxattn predict runs/digits/model.safetensors scans/ --top 1 --json
    """
    classifier = Classifier.open(model, find_device(device))
    files = _image_files(images)
    top = min(top, len(classifier.classes))
    found = []
    with use_backend(backend):
        results = classifier.predict(files, batch_size)
        for file, probabilities in track(results, "predicting", len(files), _console(as_json)):
            values, indices = probabilities.topk(top)
            named = [(classifier.classes[i], value) for i, value in zip(indices.tolist(), values.tolist(), strict=True)]
            found.append((file, named))
    if as_json:
        print_json(
            [
                {"image": str(file), "predictions": [{"class": name, "probability": value} for name, value in named]}
                for file, named in found
            ]
        )
        return
    header = ["image", *(f"{place}." for place in range(1, top + 1))]
    print_table(header, [[str(file), *(f"{name} {value:.1%}" for name, value in named)] for file, named in found])


def _console(as_json: bool) -> Console:
    """Where progress is shown: beside the facts, never among them."""
    return SILENT if as_json else Console(stderr=True)


def _image_files(paths: Sequence[Path]) -> list[Path]:
    """The files named, and those in the folders named."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no image {path}")
        found = find_images(path) if path.is_dir() else [path]
        if not found:
            raise ValueError(f"no images in {path}; images end in {', '.join(sorted(SUFFIXES))}")
        files += found
    return files
