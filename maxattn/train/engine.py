"""`train`: a network on folders of images, on one device; stopped at any step, it goes on exactly where it was."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from maxattn.build import build
from maxattn.tasks import classification
from maxattn.train.augment import random_flip, random_shift
from maxattn.train.checkpoint import load_checkpoint, random_state, save_checkpoint, set_random_state
from maxattn.train.classifier import Classifier, find_device
from maxattn.train.data import ImageFolder, Images
from maxattn.train.progress import SILENT, Bar
from maxattn.train.recipe import TrainConfig
from maxattn.train.stop import StopAsked, StopSignals
from maxattn.weights.files import replacing

CHECKPOINT, METRICS, WEIGHTS, CONFIG = "checkpoint.pt", "metrics.jsonl", "model.safetensors", "config.yaml"


class TrainingInterrupted(Exception):  # noqa: N818 - no error
    """A signal stopped the training after it had written `checkpoint`."""

    def __init__(self, checkpoint: Path, epoch: int, step: int) -> None:
        super().__init__(f"stopped in epoch {epoch + 1} after step {step}; everything is in {checkpoint}")
        self.checkpoint = checkpoint


class TrainingDiverged(Exception):  # noqa: N818 - named after what happened
    """The loss or its gradient is no longer finite; the last checkpoint is as it was."""


def train(
    config: TrainConfig,
    data: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    device: str = "auto",
    console: Console = SILENT,
) -> list[dict[str, float]]:
    """Train a classifier on `data/train/<class>/` and evaluate it on `data/val/<class>/` after each epoch.

    `out` receives, each written whole or not at all: `config.yaml`, what is run; and after each epoch
    `checkpoint.pt`, to resume from; `metrics.jsonl`, a line an epoch; `model.safetensors`, the weights as they are
    then (not those of the best epoch: a best one picked on held-out images would flatter them), with the names of the
    classes and the normalisation, for `Classifier.open`.

    Args:
        resume: go on from `out/checkpoint.pt`; the config and the images must be the same.
        device: "auto", "cpu" or "cuda".
        console: shows the progress; by default nothing does.

    Returns:
        The metrics of each epoch: `epoch`, `lr`, `train_loss` (with label smoothing), `train_accuracy` (under
        augmentation), `val_loss`, `val_accuracy`, `images_per_second`, `seconds`.

    Raises:
        ValueError: for images that cannot be used, a folder `out` with files in it, or a checkpoint of another run.
        FileNotFoundError: if a folder, or the checkpoint to resume from, is missing.
        TrainingInterrupted: after SIGINT or SIGTERM, with a checkpoint written.
        TrainingDiverged: if the loss or its gradient is not finite.
    """
    data, out, target = Path(data), Path(out), find_device(device)
    checkpoint = load_checkpoint(out / CHECKPOINT) if resume else None
    if not resume and out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: --resume goes on with the training there; a new one needs a new folder")
    train_folder = ImageFolder.find(data / "train")
    val_folder = ImageFolder.find(data / "val", train_folder.classes)
    config = config.with_classes(len(train_folder.classes))
    if checkpoint is not None:
        _check_same_run(checkpoint, config, train_folder, out)
    workers = config.recipe.workers
    images = Images(train_folder, config.spec, workers, console), Images(val_folder, config.spec, workers, console)
    run = _Run(config, train_folder, *images, target)
    if checkpoint is not None:
        run.restore(checkpoint)
    out.mkdir(parents=True, exist_ok=True)
    with Bar(console, run.images_to_go()) as bar, StopSignals() as stop:
        try:
            while run.epoch < config.recipe.epochs:
                bar.print(_line(run.run_epoch(bar, stop.check), config.recipe.epochs))
                run.save(out)
                run.write_results(out)
        except StopAsked:
            run.save(out)
            raise TrainingInterrupted(out / CHECKPOINT, run.epoch, run.step) from None
    run.write_results(out)
    return run.history


def compile_mode(device: torch.device) -> str | None:
    """The mode of `torch.compile` for training: on a GPU CUDA graphs, for a step's kernels are faster than their host.

    Example:
        >>> compile_mode(torch.device("cuda")), compile_mode(torch.device("cpu"))
        ('reduce-overhead', None)
    """
    return "reduce-overhead" if device.type == "cuda" else None


def lr_factor(step: int, steps: int, warmup: float) -> float:
    """The share of the peak learning rate at a step: linear growth over the share `warmup` of the steps, then a cosine.

    Example:
        >>> [round(lr_factor(step, 8, 0.25), 2) for step in range(8)]
        [0.5, 1.0, 1.0, 0.93, 0.75, 0.5, 0.25, 0.07]
    """
    growing = round(warmup * steps)
    if step < growing:
        return (step + 1) / growing
    return 0.5 + 0.5 * math.cos(math.pi * (step - growing) / (steps - growing))


class _Outcome(NamedTuple):
    """What a step gave: on the device its loss, the norm of its gradient, and how many images were classified right."""

    step: int
    images: int
    values: torch.Tensor


class _Run:
    """A training and where it stands: in epoch `epoch`, after `step` of its steps."""

    def __init__(
        self, config: TrainConfig, folder: ImageFolder, train_images: Images, val_images: Images, device: torch.device
    ) -> None:
        recipe = config.recipe
        self.config, self.recipe, self.folder, self.device = config, recipe, folder, device
        self.train_images, self.val_images = train_images, val_images
        self.batch_size = min(recipe.batch_size, len(train_images))
        self.steps = len(train_images) // self.batch_size
        torch.manual_seed(recipe.seed)
        model = build(config.spec).to(device)
        if recipe.compile:
            model.compile(mode=compile_mode(device))
        self.classifier = Classifier(model, folder.classes, recipe.mean, recipe.std)
        groups = model.param_groups(lr=recipe.lr, weight_decay=recipe.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.epoch, self.step = 0, 0
        self.totals = classification.Totals()
        self.unread: _Outcome | None = None
        self.history: list[dict[str, float]] = []

    def run_epoch(self, bar: Bar, check: Callable[[], None]) -> dict[str, float]:
        """The rest of the epoch and the evaluation after it. `check` is called between steps, and may raise."""
        model, started, first = self.classifier.model.train(), time.perf_counter(), self.step
        if self.recipe.compile and not self.history:
            bar.advance(0, description=f"{self._where()}, compiling")
        for pixels, labels in self.train_images.batches(self._epoch_indices()[self.step :]):
            check()
            self._step(model, pixels, labels)
            facts = f"loss {self.totals.loss:.3f}  accuracy {self.totals.accuracy:.1%}"
            bar.advance(len(labels), description=self._where(), facts=facts)
        check()
        self.read()
        trained = time.perf_counter() - started

        def on_batch(count: int) -> None:
            bar.advance(count, description=f"{self._where()}, held-out images")
            check()

        held_out = self.classifier.evaluate(self.val_images, self.batch_size, on_batch)
        if not math.isfinite(held_out.loss):
            raise self._diverged(f"the loss on held-out images is {held_out.loss}", self.step)
        metrics = {
            "epoch": self.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": self.totals.loss,
            "train_accuracy": self.totals.accuracy,
            "val_loss": held_out.loss,
            "val_accuracy": held_out.accuracy,
            "images_per_second": (self.step - first) * self.batch_size / trained,
            "seconds": time.perf_counter() - started,
        }
        self.history.append(metrics)
        self.epoch, self.step, self.totals = self.epoch + 1, 0, classification.Totals()
        return metrics

    def images_to_go(self) -> int:
        """Images still to be trained on and evaluated."""
        epochs = self.recipe.epochs - self.epoch
        return epochs * (self.steps * self.batch_size + len(self.val_images)) - self.step * self.batch_size

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as tensors and plain data."""
        return {
            "config": self.config.to_dict(),
            "classes": list(self.folder.classes),
            "images": len(self.train_images),
            "epoch": self.epoch,
            "step": self.step,
            "totals": vars(self.totals),
            "history": self.history,
            "model": self.classifier.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": random_state(self.device),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.classifier.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step, self.history = state["epoch"], state["step"], state["history"]
        self.totals = classification.Totals(**state["totals"])
        set_random_state(state["random"], self.device)

    def save(self, out: Path) -> None:
        """Only with a checkpoint is the folder one to resume in; a run that fails before leaves nothing in the way."""
        self.read()
        save_checkpoint(out / CHECKPOINT, self.state())
        _write(out / CONFIG, self.config.to_yaml())

    def write_results(self, out: Path) -> None:
        _write(out / METRICS, "".join(json.dumps(metrics) + "\n" for metrics in self.history))
        self.classifier.save(out / WEIGHTS)

    def _epoch_indices(self) -> list[list[int]]:
        """The images of each step of the epoch, in an order that follows from the seed and the epoch alone."""
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.train_images), generator=generator)
        return order[: self.steps * self.batch_size].view(self.steps, self.batch_size).tolist()

    def _step(self, model: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> None:
        recipe = self.recipe
        factor = lr_factor(self.epoch * self.steps + self.step, recipe.epochs * self.steps, recipe.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr * factor
        pixels, labels = self._there(pixels), self._there(labels)
        pixels = random_shift(pixels, recipe.shift) if recipe.shift else pixels
        pixels = random_flip(pixels) if recipe.flip else pixels
        with torch.autocast(self.device.type, torch.bfloat16, enabled=recipe.amp == "bf16"):
            logits = model(self.classifier.prepare(pixels))
        loss = classification.loss(logits, labels, recipe.label_smoothing)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        values = [value.detach().to(loss.dtype) for value in (loss, norm, classification.right(logits, labels))]
        self.read()
        self.unread = _Outcome(self.step, len(labels), torch.stack(values))
        self.step += 1

    def read(self) -> None:
        """Count the last step. That is done a step late: a host that reads its loss at once waits for the device."""
        if self.unread is None:
            return
        (step, images, values), self.unread = self.unread, None
        loss, norm, correct = values.tolist()
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise self._diverged(f"the loss is {loss}, the norm of its gradient {norm}", step)
        self.totals.count(images, int(correct), loss)

    def _there(self, x: torch.Tensor) -> torch.Tensor:
        """On the device; from pinned memory, which the host need not wait for."""
        return x.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else x.to(self.device)

    def _where(self) -> str:
        return f"epoch {self.epoch + 1}/{self.recipe.epochs}, step {self.step}/{self.steps}"

    def _diverged(self, what: str, step: int) -> TrainingDiverged:
        last = f"what was saved after epoch {self.epoch} is kept" if self.epoch else "nothing was saved before"
        return TrainingDiverged(
            f"{what} in epoch {self.epoch + 1}, step {step + 1}; {last}; a lower lr than {self.recipe.lr:g}, a "
            "longer warmup or a smaller clip_grad may help"
        )


def _check_same_run(checkpoint: dict[str, Any], config: TrainConfig, folder: ImageFolder, out: Path) -> None:
    """Raise ValueError unless the checkpoint is of this config, whatever its workers, and of these images."""
    there, here = checkpoint["config"], config.to_dict()
    differing = [
        f"{part}.{name} is {there[part].get(name)!r} there, {here[part].get(name)!r} now"
        for part in here
        for name in sorted(there[part].keys() | here[part].keys())
        if name != "workers" and there[part].get(name) != here[part].get(name)
    ]
    if checkpoint["classes"] != list(folder.classes) or checkpoint["images"] != len(folder.files):
        differing.append(
            f"the images are {checkpoint['images']} of {len(checkpoint['classes'])} classes there, "
            f"{len(folder.files)} of {len(folder.classes)} now"
        )
    if differing:
        raise ValueError(
            f"the training in {out} cannot be resumed, it is another one: {'; '.join(differing)}; give another folder "
            "to start a new one"
        )


def _line(metrics: dict[str, float], epochs: int) -> str:
    width = len(str(epochs))
    return (
        f"epoch {metrics['epoch']:{width}}/{epochs}  loss {metrics['train_loss']:.3f}  "
        f"accuracy {metrics['train_accuracy']:.1%}  held-out loss {metrics['val_loss']:.3f}  "
        f"accuracy {metrics['val_accuracy']:.2%}  {metrics['images_per_second']:,.0f} images/s"
    )


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
