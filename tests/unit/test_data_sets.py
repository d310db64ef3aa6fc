"""Digits, and CIFAR and Tiny ImageNet from small archives in their published formats."""

import hashlib
import io
import pickle
import shutil
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import write_cifar10
from PIL import Image

import utils
from utils import Scenario


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Accept files with other checksums than the published ones."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


def load(name, folder, **options):
    return utils.load_data(name, str(folder), device=torch.device("cpu"), **options)


# ---------------------------------------------------------------- digits and fingerprints


def test_digits_are_divided_as_ever(digits):
    """Other training images would change every published result."""
    assert (len(digits.train), len(digits.held_out)) == (797, 1000)
    assert digits.classes == list("0123456789") and digits.tag == "digits"
    pixels = digits.train.pixels
    assert pixels.shape[1:] == (3, 8, 8) and pixels.dtype == torch.uint8 and pixels.max() == 255
    assert digits.fingerprint == "c6af5a0512cbb62e91ee918a85732b16"


def changed(images, name, position):
    tensor = getattr(images, name).clone()
    tensor.view(-1)[position] += 1
    return replace(images, **{name: tensor})


@pytest.mark.parametrize("name", ["pixels", "labels"])
@pytest.mark.parametrize("subset", ["train", "held_out"])
@pytest.mark.parametrize("position", [0, 377, -1])
def test_any_changed_pixel_or_label_changes_the_fingerprint(name, subset, position, digits):
    other = {subset: changed(getattr(digits, subset), name, position)}
    assert replace(digits, **other, fingerprint="").fingerprint != digits.fingerprint


def test_num_classes_other_than_that_of_the_data_are_refused():
    with pytest.raises(utils.UserError, match="--num_classes 100.* 10 "):
        load("digits", "unused", num_classes=100)


# ---------------------------------------------------------------- CIFAR


def test_cifar10_images_and_labels_are_read_as_published(tmp_path):
    write_cifar10(tmp_path)
    data = load("cifar10", tmp_path)
    batch = pickle.loads((tmp_path / "cifar-10-batches-py/data_batch_1").read_bytes())
    assert data.train.pixels.shape == (150, 3, 32, 32) and data.train.pixels.dtype == torch.uint8
    assert data.train.pixels[3].flatten().tolist() == batch["data"][3].tolist()
    assert data.train.labels[:30].tolist() == batch["labels"] and data.classes[9] == "truck"
    assert len(data.held_out) == 200 and data.train.spec.mean == (0.4914, 0.4822, 0.4465)


@pytest.fixture
def cifar100(tmp_path):
    """400 images whose superclasses are not those of the published archive."""
    fine = np.arange(400) % 100
    coarse = (fine * 7) % 20
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, low in (("train", 0), ("test", 7)):
        pixels = (np.arange(len(fine) * 3072).reshape(len(fine), 3072) + low).astype(np.uint8)
        labels = {"fine_labels": fine.tolist(), "coarse_labels": coarse.tolist()}
        (folder / name).write_bytes(pickle.dumps({"data": pixels, **labels}))
    names = {
        "fine_label_names": [f"fine {number}" for number in range(100)],
        "coarse_label_names": [f"coarse {number}" for number in range(20)],
    }
    (folder / "meta").write_bytes(pickle.dumps(names))
    return tmp_path, fine, coarse


def test_cifar20_has_the_superclasses_of_its_archive(cifar100):
    folder, fine, coarse = cifar100
    plain, data = load("cifar100", folder), load("cifar20", folder)
    assert plain.train.labels.tolist() == fine.tolist() and plain.train.subclasses is None
    assert plain.held_out.pixels[0].flatten()[:3].tolist() == [7, 8, 9]
    assert data.classes == [f"coarse {number}" for number in range(20)]
    for images in (data.train, data.held_out):
        assert images.labels.tolist() == coarse.tolist()
        assert images.subclasses.tolist() == fine.tolist()


@pytest.mark.parametrize("text", ["fine 42", "42"])
def test_subclass_of_cifar20_is_forgotten(text, cifar100):
    folder, fine, _ = cifar100
    data = load("cifar20", folder)
    split = utils.make_split(data, Scenario("subclass", forget_class=text))
    assert split.folder == "subclass_42"
    assert split.forget.tolist() == np.flatnonzero(fine == 42).tolist()
    subclasses = data.held_out.subclasses
    assert subclasses[split.forget_test].eq(42).all() and subclasses[split.test].ne(42).all()
    assert split.is_forgotten.equal(subclasses[split.calibration] == 42)


def test_cifar_that_cannot_be_downloaded_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.CIFAR10.url", "http://127.0.0.1:9/none.tar.gz")
    with pytest.raises(utils.UserError, match=f"--data_name cifar10 --data_dir {tmp_path}"):
        load("cifar10", tmp_path)


# ---------------------------------------------------------------- Tiny ImageNet


WNIDS = ["n03", "n01", "n02"]


@pytest.fixture
def tiny_imagenet(tmp_path, monkeypatch):
    """A folder with the archive of Tiny ImageNet, with three classes and 20 + 10 images each.

    The download address is unreachable.
    """
    rng = np.random.default_rng(0)
    published = tmp_path / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(published, "w") as archive:
        root = "tiny-imagenet-200"
        words = "n01\tcrane, a bird\nn02\tcrane, a machine\nn03\tgoldfish\nn09\tnone"
        archive.writestr(f"{root}/words.txt", words)
        archive.writestr(f"{root}/train/n01/n01_boxes.txt", "not a picture")
        rows = []
        for index in range(90):
            wnid, subset = WNIDS[index % 3], "train" if index < 60 else "val"
            picture = io.BytesIO()
            pixels = rng.integers(0, 99, size=(64, 64, 3)) + 70 * int(wnid[-1]) - 70
            image = Image.fromarray(pixels.astype(np.uint8))
            image.convert("L" if index == 3 else "RGB").save(picture, "JPEG")
            name = f"{wnid}_{index}.JPEG" if subset == "train" else f"val_{index}.JPEG"
            folder = f"train/{wnid}" if subset == "train" else "val"
            archive.writestr(f"{root}/{folder}/images/{name}", picture.getvalue())
            if subset == "val":
                rows.append(f"{name}\t{wnid}\t0\t0\t62\t62")
        archive.writestr(f"{root}/val/val_annotations.txt", "\n".join(rows))
    monkeypatch.setattr(utils, "TINY_IMAGENET_URL", "http://127.0.0.1:9/tiny-imagenet-200.zip")
    checksum = hashlib.md5(published.read_bytes()).hexdigest()
    monkeypatch.setattr(utils, "TINY_IMAGENET_MD5", checksum)
    return tmp_path


def test_tiny_imagenet_is_unpacked_and_read_as_published(tiny_imagenet):
    data = load("tiny_imagenet", tiny_imagenet)
    assert data.classes == ["crane (n01)", "crane (n02)", "goldfish"]
    assert data.train.pixels.shape == (60, 3, 64, 64) and data.train.size == 64
    assert data.train.labels.tolist() == [0] * 20 + [1] * 20 + [2] * 20
    assert data.train.names[0] == "n01/images/n01_1.JPEG" and data.tag == "tiny_imagenet"
    for images in (data.train, data.held_out):
        brightness = images.pixels.float().mean((1, 2, 3))
        for number in range(3):  # each class is brighter: the labels are those of the annotations
            of_class = brightness[images.labels == number]
            assert (of_class - (50 + 70 * number)).abs().max() < 10
    again = load("tiny_imagenet", tiny_imagenet, image_size=32)
    assert again.fingerprint == data.fingerprint and again.train.size == 32
    assert again.train.pixels.shape[-1] == 64


def test_changed_annotations_of_tiny_imagenet_are_noticed(tiny_imagenet):
    before = load("tiny_imagenet", tiny_imagenet)
    path = tiny_imagenet / "tiny-imagenet-200/val/val_annotations.txt"
    path.write_text(path.read_text().replace("val_60.JPEG\tn03", "val_60.JPEG\tn01"))
    after = load("tiny_imagenet", tiny_imagenet)
    assert after.fingerprint != before.fingerprint
    assert (after.held_out.labels != before.held_out.labels).sum() == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: shutil.rmtree(root / "train/n02"),
        lambda root: [path.unlink() for path in (root / "train/n02/images").iterdir()],
        lambda root: (root / "words.txt").unlink(),
        lambda root: (root / "val/val_annotations.txt").write_text("n01_0.JPEG\tn99\n"),
        lambda root: (root / "val/val_annotations.txt").write_text("n01_0.JPEG\n"),
        lambda root: (root / "val/images/val_61.JPEG").unlink(),
        lambda root: (root / "val/images/val_61.JPEG").write_bytes(b"\xff\xd8\xff"),
    ],
)
def test_incomplete_tiny_imagenet_is_refused(damage, tiny_imagenet):
    load("tiny_imagenet", tiny_imagenet)
    damage(tiny_imagenet / "tiny-imagenet-200")
    with pytest.raises(utils.UserError, match="tiny-imagenet-200|--data_name tiny_imagenet"):
        load("tiny_imagenet", tiny_imagenet)


def test_tiny_imagenet_archive_with_another_checksum_is_refused(tiny_imagenet, monkeypatch):
    monkeypatch.setattr(utils, "TINY_IMAGENET_MD5", "0" * 32)
    with pytest.raises(utils.UserError, match="--data_name tiny_imagenet"):
        load("tiny_imagenet", tiny_imagenet)
    assert not (tiny_imagenet / "tiny-imagenet-200").exists()
