"""Training: what it writes, and that stopping it anywhere changes nothing."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from tiny_training import CLASSES, RECIPE, SPEC, write_stripes
from torch import Tensor
from torch import _dynamo as compiler

import maxattn
from maxattn.ops import registry
from maxattn.ops.contract import Problem
from maxattn.ops.sdpa import Sdpa
from maxattn.tasks import classification
from maxattn.train import Classifier, TrainConfig, TrainingDiverged, TrainingInterrupted, engine, load_config, train
from maxattn.train.data import ImageFolder, Images
from maxattn.train.engine import lr_factor
from maxattn.train.progress import SILENT

STEPS, EVALUATIONS, LAYERS = 4, 2, 4
"""Steps of an epoch, batches of the evaluation after it, and calls of Max-SA in each."""
RESULTS = ("checkpoint.pt", "config.yaml", "metrics.jsonl", "model.safetensors")


def configure(**recipe: Any) -> TrainConfig:
    return TrainConfig.read({"spec": SPEC, "recipe": {**RECIPE, **recipe}})


def metrics(out: Path) -> list[dict[str, float]]:
    """What was measured, without how long it took."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in line if name not in ("seconds", "images_per_second")} for line in lines]


def weights(out: Path) -> dict[str, Tensor]:
    return maxattn.open_model(out / "model.safetensors")[0].state_dict()


def assert_same_result(out: Path, other: Path) -> None:
    assert metrics(out) == metrics(other)
    theirs = weights(other)
    for name, tensor in weights(out).items():
        assert tensor.equal(theirs[name]), name


class Acting(Sdpa):
    """`sdpa`, which does something to its result at the call `number`, counted from 0."""

    name = "acting"

    def __init__(self, number: int, act: Callable[[Tensor], Tensor]) -> None:
        self.number, self.act = number, act

    def attend(self, qkv: Tensor, bias: Tensor | None, problem: Problem) -> Tensor:
        out = super().attend(qkv, bias, problem)
        self.number -= 1
        return self.act(out) if self.number == -1 else out


def train_acting(number: int, act: Callable[[Tensor], Tensor], config: TrainConfig, data: Path, out: Path) -> None:
    backend = Acting(number, act)
    with registry.registered(backend), maxattn.use_backend("acting"):
        train(config, data, out)


def train_interrupted(number: int, config: TrainConfig, data: Path, out: Path, stop: int = signal.SIGINT) -> None:
    def interrupt(out: Tensor) -> Tensor:
        signal.raise_signal(stop)
        return out

    with pytest.raises(TrainingInterrupted):
        train_acting(number, interrupt, config, data, out)


@pytest.fixture(scope="module")
def uninterrupted(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training of `configure()`."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(configure(), stripes, out)
    return out


def test_a_network_learns_to_tell_images_apart(stripes: Path, tmp_path: Path) -> None:
    history = train(configure(epochs=8, batch_size=8, lr=0.01), stripes, tmp_path / "out")
    assert history[-1]["val_accuracy"] > 0.9
    assert history[-1]["train_loss"] < history[0]["train_loss"]


def test_a_training_writes_what_was_run_and_what_came_of_it(uninterrupted: Path, stripes: Path) -> None:
    assert sorted(path.name for path in uninterrupted.iterdir()) == sorted(RESULTS)
    assert load_config(uninterrupted / "config.yaml") == configure().with_classes(3)
    assert [line["epoch"] for line in metrics(uninterrupted)] == [1, 2, 3]
    classifier = Classifier.open(uninterrupted / "model.safetensors", torch.device("cpu"))
    assert classifier.classes == CLASSES
    images = Images(ImageFolder.find(stripes / "val"), classifier.model.spec, 0, SILENT)
    totals = classifier.evaluate(images, 7)
    last = metrics(uninterrupted)[-1]
    assert totals.accuracy == last["val_accuracy"]
    assert totals.loss == pytest.approx(last["val_loss"], rel=1e-5)


def test_what_was_run_can_be_run_again_with_the_same_result(uninterrupted: Path, stripes: Path, tmp_path: Path) -> None:
    train(load_config(uninterrupted / "config.yaml"), stripes, tmp_path / "again")
    assert_same_result(tmp_path / "again", uninterrupted)


def test_a_checkpoint_is_tensors_and_plain_data(uninterrupted: Path) -> None:
    state = torch.load(uninterrupted / "checkpoint.pt", weights_only=True)
    assert {"model", "optimizer", "random", "epoch", "step", "config", "classes"} <= state.keys()
    assert (state["epoch"], state["step"]) == (3, 0)


def test_the_seed_decides_the_result(uninterrupted: Path, stripes: Path, tmp_path: Path) -> None:
    train(configure(seed=1), stripes, tmp_path / "out")
    assert metrics(tmp_path / "out") != metrics(uninterrupted)


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(0, id="in the first step"),
        pytest.param((STEPS + EVALUATIONS) * LAYERS + LAYERS * 2 + 1, id="in the middle of the second epoch"),
        pytest.param((STEPS + EVALUATIONS) * LAYERS + LAYERS * STEPS - 1, id="in the last step of the second epoch"),
        pytest.param(STEPS * LAYERS, id="in the evaluation after the first epoch"),
        pytest.param((STEPS + EVALUATIONS) * LAYERS * 3 - 1, id="in the last evaluation"),
    ],
)
def test_an_interrupted_training_that_is_resumed_equals_an_uninterrupted_one(
    uninterrupted: Path, stripes: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "out"
    train_interrupted(number, configure(), stripes, out)
    torch.manual_seed(99)
    train(configure(workers=1), stripes, out, resume=True)
    assert_same_result(out, uninterrupted)


def test_a_training_can_be_interrupted_again_and_again(uninterrupted: Path, stripes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    train_interrupted(1, configure(), stripes, out, signal.SIGTERM)
    stops = 0
    while True:
        backend = Acting(5 * LAYERS, lambda out: (signal.raise_signal(signal.SIGTERM), out)[1])
        try:
            with registry.registered(backend), maxattn.use_backend("acting"):
                train(configure(), stripes, out, resume=True)
            break
        except TrainingInterrupted:
            stops += 1
    assert stops >= 2
    assert_same_result(out, uninterrupted)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C means what it does in a terminal, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_says_where_it_stopped(stripes: Path, tmp_path: Path) -> None:
    def interrupt(out: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return out

    with pytest.raises(TrainingInterrupted, match=r"stopped in epoch 1 after step 2; .* in .*checkpoint\.pt"):
        train_acting(LAYERS, interrupt, configure(), stripes, tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_stops_at_once(stripes: Path, tmp_path: Path) -> None:
    def interrupt_twice(out: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return out

    with pytest.raises(KeyboardInterrupt):
        train_acting(LAYERS, interrupt_twice, configure(), stripes, tmp_path / "out")
    assert not (tmp_path / "out/checkpoint.pt").exists()


def test_a_training_runs_in_a_thread(uninterrupted: Path, stripes: Path, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=(configure(), stripes, tmp_path / "out"))
    thread.start()
    thread.join()
    assert_same_result(tmp_path / "out", uninterrupted)


def test_resuming_a_finished_training_changes_nothing(uninterrupted: Path, stripes: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = train(configure(epochs=1), stripes, out)
    (out / "model.safetensors").unlink()
    assert train(configure(epochs=1), stripes, out, resume=True) == first
    assert Classifier.open(out / "model.safetensors", torch.device("cpu")).classes == CLASSES


def test_resuming_another_training_is_an_error_that_names_what_differs(
    uninterrupted: Path, stripes: Path, tmp_path: Path
) -> None:
    before = {name: (uninterrupted / name).read_bytes() for name in RESULTS}
    message = r"cannot be resumed, it is another one: recipe.lr is 0.005 there, 0.1 now; give another folder"
    with pytest.raises(ValueError, match=message):
        train(configure(lr=0.1), stripes, uninterrupted, resume=True)
    with pytest.raises(ValueError, match="the images are 72 of 3 classes there, 60 of 3 now"):
        train(configure(), write_stripes(tmp_path / "fewer", train=20), uninterrupted, resume=True)
    assert {name: (uninterrupted / name).read_bytes() for name in RESULTS} == before


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"there is no .*checkpoint\.pt to resume from; without --resume"),
        (b"", ValueError, r"checkpoint\.pt is no complete checkpoint"),
        (b"no checkpoint", ValueError, r"checkpoint\.pt is no complete checkpoint"),
        ("half", ValueError, r"checkpoint\.pt is no complete checkpoint"),
        ("other", ValueError, r"checkpoint\.pt is no checkpoint of this version of maxattn: its format is None, not 1"),
    ],
)
def test_resuming_without_a_whole_checkpoint_is_an_error(
    uninterrupted: Path, stripes: Path, tmp_path: Path, content: Any, error: type[Exception], message: str
) -> None:
    path = tmp_path / "checkpoint.pt"
    if content == "half":
        path.write_bytes((uninterrupted / "checkpoint.pt").read_bytes()[:10_000])
    elif content == "other":
        torch.save({"model": {}}, path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=message):
        train(configure(), stripes, tmp_path, resume=True)
    assert not (tmp_path / "config.yaml").exists()


def test_a_folder_with_files_in_it_is_not_written_to(stripes: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty: --resume goes on with the training there"):
        train(configure(), stripes, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_nothing_is_written_where_the_images_cannot_be_used(stripes: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*train"):
        train(configure(), stripes / "train", tmp_path / "out")
    data = write_stripes(tmp_path / "data", train=1, val=1)
    (data / "val/across").rename(data / "val/zigzag")
    with pytest.raises(ValueError, match="val has images of zigzag, but the known classes are across, down, slanted"):
        train(configure(), data, tmp_path / "out")
    with pytest.raises(ValueError, match="num_classes 4 but there are 3 classes"):
        train(TrainConfig.read({"spec": {**SPEC, "num_classes": 4}}), stripes, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def no_number(out: Tensor) -> Tensor:
    return out * float("nan")


def infinite_gradient(out: Tensor) -> Tensor:
    out.register_hook(lambda gradient: gradient * float("inf"))
    return out


@pytest.mark.parametrize(
    ("step", "act", "message"),
    [
        (
            STEPS + EVALUATIONS + 1,
            no_number,
            "the loss is nan.* in epoch 2, step 2; what was saved after epoch 1 is kept",
        ),
        (STEPS + EVALUATIONS + 1, infinite_gradient, "the norm of its gradient nan in epoch 2, step 2"),
        (2 * STEPS + EVALUATIONS, no_number, "the loss on held-out images is nan in epoch 2"),
    ],
)
def test_a_diverged_training_keeps_what_was_saved_while_it_was_well(
    stripes: Path, tmp_path: Path, step: int, act: Callable[[Tensor], Tensor], message: str
) -> None:
    train(configure(), stripes, tmp_path / "out")
    out = tmp_path / "out"
    for path in out.iterdir():
        path.unlink()
    with pytest.raises(TrainingDiverged, match=message):
        train_acting(step * LAYERS, act, configure(), stripes, out)
    assert [line["epoch"] for line in metrics(out)] == [1]
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in weights(out).values())


def test_a_training_that_diverges_at_once_saves_nothing(stripes: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDiverged, match=r"in epoch 1, step 1; nothing was saved before; a lower lr than 0.005"):
        train_acting(0, no_number, configure(), stripes, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_loss_of_a_step_is_read_once_the_next_step_is_under_way(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []
    read = engine._Run.read

    def noted(run: engine._Run) -> None:
        if run.unread is not None:
            seen.append((run.unread.step, run.step))
        read(run)

    monkeypatch.setattr(engine._Run, "read", noted)
    train(configure(), stripes, tmp_path / "out")
    epochs = len(metrics(tmp_path / "out"))
    assert seen == epochs * [(step, step + 1) for step in range(STEPS)]


def test_mixed_precision_computes_in_bf16_and_keeps_the_weights_in_fp32(stripes: Path, tmp_path: Path) -> None:
    seen: list[torch.dtype] = []

    def note(out: Tensor) -> Tensor:
        seen.append(out.dtype)
        return out

    train_acting(0, note, configure(epochs=1, amp="bf16"), stripes, tmp_path / "out")
    assert seen == [torch.bfloat16]
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32, torch.int64}


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")  # of the compiler, on a GPU
def test_a_compiled_network_learns_the_same(stripes: Path, tmp_path: Path) -> None:
    spec = {**SPEC, "drop_path_rate": 0.0, "stages": [{"width": 16, "depth": 1, "layers": ["block"]}]}
    compiler.reset()
    compiler.utils.counters.clear()
    results = []
    for asked in (False, True):
        recipe = {**RECIPE, "epochs": 1, "batch_size": 24, "compile": asked}
        results += train(TrainConfig.read({"spec": spec, "recipe": recipe}), stripes, tmp_path / str(asked))
        assert (compiler.utils.counters["frames"]["ok"] > 0) == asked
    plain, compiled = results
    assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)
    assert weights(tmp_path / "True").keys() == weights(tmp_path / "False").keys()


@pytest.mark.parametrize("recipe", [{"batch_size": 1000}, {"flip": True}, {"clip_grad": None}, {"warmup": 0.5}])
def test_every_setting_changes_the_result(stripes: Path, tmp_path: Path, recipe: dict[str, Any]) -> None:
    train(configure(epochs=1), stripes, tmp_path / "plain")
    train(configure(epochs=1, **recipe), stripes, tmp_path / "other")
    assert metrics(tmp_path / "plain") != metrics(tmp_path / "other")


def test_the_learning_rate_grows_linearly_and_falls_along_a_cosine(uninterrupted: Path) -> None:
    factors = [lr_factor(step, 100, 0.1) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * step for step in range(1, 11)])
    assert factors[55] == pytest.approx(0.5)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[99] < 1e-3
    assert metrics(uninterrupted)[-1]["lr"] == RECIPE["lr"] * lr_factor(11, 12, 0.1)


def test_a_line_an_epoch_is_all_that_appears_where_there_is_no_terminal(stripes: Path, tmp_path: Path) -> None:
    text = StringIO()
    train(configure(epochs=2), stripes, tmp_path / "out", console=Console(file=text))
    lines = text.getvalue().splitlines()
    assert [line[:10] for line in lines] == ["epoch 1/2 ", "epoch 2/2 "]
    assert all("accuracy" in line and "images/s" in line for line in lines)


def test_a_terminal_shows_epoch_step_loss_accuracy_and_speed(stripes: Path, tmp_path: Path) -> None:
    text = StringIO()
    train(configure(epochs=1), stripes, tmp_path / "out", console=Console(file=text, force_terminal=True, width=120))
    for part in ("epoch 1/1", f"step {STEPS}/{STEPS}, held-out images", "loss", "accuracy", "images/s", "0:00:0"):
        assert part in text.getvalue()


def test_loss_and_accuracy_are_means_over_images_not_over_batches() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(10, 4), torch.randint(0, 4, (10,))
    totals = classification.Totals()
    for part in (slice(0, 7), slice(7, 10)):
        totals.add(logits[part], labels[part], classification.loss(logits[part], labels[part]).item())
    assert totals.accuracy == (logits.argmax(-1) == labels).double().mean().item()
    assert totals.loss == pytest.approx(F.cross_entropy(logits, labels).item())


def test_a_training_that_fails_before_its_first_checkpoint_leaves_nothing_in_the_way(
    stripes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as environment:
        environment.setenv("MAXATTN_BACKEND", "nonesuch")
        with pytest.raises(maxattn.BackendUnavailableError, match="nonesuch"):
            train(configure(), stripes, out)
    assert not list(out.iterdir())
    assert train(configure(), stripes, out)
