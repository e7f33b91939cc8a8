"""Images in folders."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_training import CLASSES, SPEC, write_stripes

from maxattn.spec import MaxViTSpec
from maxattn.train.data import KEPT_BYTES, ImageFolder, Images, find_images, image_mode, read_image
from maxattn.train.progress import SILENT

TINY = MaxViTSpec.read(SPEC)


def load(folder: Path, *, kept: bool = True, workers: int = 0) -> Images:
    return Images(ImageFolder.find(folder), TINY, workers, SILENT, KEPT_BYTES if kept else 0)


def test_folders_are_classes_in_the_order_of_their_names(stripes: Path) -> None:
    folder = ImageFolder.find(stripes / "train")
    assert folder.classes == CLASSES
    assert [folder.classes[label] for label in folder.labels] == [file.parent.name for file in folder.files]
    assert len(folder.files) == 72


def test_hidden_files_and_folders_and_other_files_are_no_images(tmp_path: Path) -> None:
    data = write_stripes(tmp_path / "data", train=1, val=1) / "train"
    shutil.copy(data / "down/000.png", data / "down/._000.png")
    shutil.copytree(data / "down", data / ".checkpoints")
    (data / "down/notes.txt").write_text("no image")
    (data / "down/deeper").mkdir()
    shutil.copy(data / "down/000.png", data / "down/deeper/001.PNG")
    assert [str(file.relative_to(data)) for file in find_images(data / "down")] == [
        "down/000.png",
        "down/deeper/001.PNG",
    ]
    assert ImageFolder.find(data).classes == CLASSES


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_whether_images_are_kept_in_memory_or_read_again(stripes: Path, workers: int) -> None:
    indices = [[0, 30, 71], [5], [70, 2]]
    kept = list(load(stripes / "train").batches(indices))
    read = list(load(stripes / "train", kept=False, workers=workers).batches(indices))
    for (images, labels), (again, same), chosen in zip(kept, read, indices, strict=True):
        assert images.dtype == torch.uint8
        assert images.shape == (len(chosen), 1, 16, 16)
        assert images.equal(again)
        assert labels.equal(same)
        assert labels.tolist() == [index // 24 for index in chosen]


def test_in_order_covers_every_image_once(stripes: Path) -> None:
    batches = load(stripes / "val").in_order(10)
    assert [len(batch) for batch in batches] == [10, 10, 4]
    assert [index for batch in batches for index in batch] == list(range(24))


@pytest.mark.parametrize("kept", [True, False])
def test_batches_leave_the_global_random_state_alone(stripes: Path, kept: bool) -> None:
    images = load(stripes / "val", kept=kept)
    before = torch.get_rng_state()
    list(images.batches(images.in_order(8)))
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_image_gets_the_size_and_the_channels_of_the_spec(
    tmp_path: Path, mode: str, in_chans: int
) -> None:
    file = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.fromarray(np.full((20, 30), 200 * 256, dtype=np.uint16)).save(file)
    else:
        grey = Image.new("RGB", (30, 20), (200, 200, 200))
        grey.convert(mode, dither=Image.Dither.NONE, palette=Image.Palette.ADAPTIVE).save(file)
    image = read_image(file, image_mode(TINY.override(in_chans=in_chans)), (16, 24))
    assert image.shape == (in_chans, 16, 24)
    assert (image[:3] == (255 if mode == "1" else 200)).all()


def test_an_image_is_scaled_to_cover_the_size_and_cut_around_its_middle(tmp_path: Path) -> None:
    pixels = np.zeros((20, 60), dtype=np.uint8)
    pixels[:, 20:40] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", "L", (10, 10))[:, :, 1:-1] == 255).all()


def test_a_photo_is_turned_as_its_exif_says(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16), dtype=np.uint8)
    pixels[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # Orientation: rotated by 180 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    image = read_image(tmp_path / "turned.png", "L", (16, 16))[0]
    assert (image[8:] == 255).all()
    assert (image[:8] == 0).all()


def test_a_number_of_channels_that_no_image_file_has_is_an_error() -> None:
    with pytest.raises(ValueError, match="image files have 1, 3 or 4 channels, the spec's in_chans is 2"):
        image_mode(TINY.override(in_chans=2))


def break_folder(data: Path, how: str) -> Path:
    """Write images, spoil them, and return the folder to look into."""
    train = write_stripes(data, train=1, val=1) / "train"
    match how:
        case "missing":
            return data / "none"
        case "empty":
            shutil.rmtree(train)
            train.mkdir()
        case "loose":
            for file in find_images(train):
                file.rename(train / f"{file.parent.name}.png")
            for name in CLASSES:
                (train / name).rmdir()
        case "empty class":
            (train / "down/000.png").unlink()
        case "other suffix":
            (train / "down/000.png").rename(train / "down/000.png.bak")
    return train


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ("missing", FileNotFoundError, r"there is no folder .*none; images lie in DATA/train/<class>/"),
        ("empty", ValueError, r"train has no folder of a class; images lie in DATA/train/<class>/"),
        ("loose", ValueError, r"train has 3 images but no folder of a class"),
        ("empty class", ValueError, r"no images in .*train for down; images end in .*\.png"),
        ("other suffix", ValueError, r"no images in .*train for down; images end in .*\.png"),
    ],
)
def test_a_folder_without_images_is_an_error_that_says_what_is_missing(
    tmp_path: Path, how: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ImageFolder.find(break_folder(tmp_path / "data", how))


def test_classes_that_are_not_known_are_an_error(stripes: Path) -> None:
    with pytest.raises(ValueError, match="has images of down, slanted, but the known classes are across"):
        ImageFolder.find(stripes / "val", ["across"])
    assert ImageFolder.find(stripes / "val", ["zigzag", *CLASSES]).labels[0] == 1


@pytest.mark.parametrize(("kept", "workers"), [(True, 0), (False, 0), (False, 2)])
@pytest.mark.parametrize("content", [b"", b"no image", "truncated"])
def test_an_image_that_cannot_be_read_is_an_error_that_names_it(
    tmp_path: Path, kept: bool, workers: int, content: bytes | str
) -> None:
    data = write_stripes(tmp_path / "data", train=2, val=1) / "train"
    broken = data / "down/001.png"
    broken.write_bytes(content if isinstance(content, bytes) else broken.read_bytes()[:100])
    with pytest.raises(ValueError, match="^cannot read the image " + re.escape(str(broken))):
        list(load(data, kept=kept, workers=workers).batches([[0, 1], [2, 3], [4, 5]]))
