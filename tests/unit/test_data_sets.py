"""CIFAR and Tiny ImageNet are read from small archives in their published formats."""

import hashlib
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import flags, write_cifar10
from PIL import Image

import utils


@pytest.fixture(autouse=True)
def unchecked(monkeypatch):
    """Accept files with other checksums than the published ones."""
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)


def load(**chosen):
    return utils.load_data(flags(**chosen), torch.device("cpu"))


def test_cifar10_images_and_labels_are_read_as_published(tmp_path):
    write_cifar10(tmp_path)
    data = load(data_name="cifar10", data_dir=str(tmp_path))
    batch = pickle.loads((tmp_path / "cifar-10-batches-py/data_batch_1").read_bytes())
    assert data.train.pixels.shape == (150, 3, 32, 32) and data.train.pixels.dtype == torch.uint8
    assert data.train.pixels[3].flatten().tolist() == batch["data"][3].tolist()
    assert data.train.labels[:30].tolist() == batch["labels"] and data.classes[9] == "truck"


def write_cifar100(folder, fine, coarse, names):
    """Write identical training and test images. Returns the pixels."""
    folder = folder / "cifar-100-python"
    folder.mkdir()
    pixels = np.arange(len(fine) * 3072).reshape(len(fine), 3072).astype(np.uint8)
    for name in ("train", "test"):
        batch = {"data": pixels, "fine_labels": list(fine), "coarse_labels": list(coarse)}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps(names))
    return pixels


def test_cifar100_images_and_labels_are_read_as_published(tmp_path):
    labels = [0, 99, 42, 7] * 10
    names = {"fine_label_names": [f"class {number}" for number in range(100)]}
    pixels = write_cifar100(tmp_path, labels, [0] * 40, names)
    data = load(data_name="cifar100", data_dir=str(tmp_path))
    assert data.train.labels.tolist() == labels and len(data.classes) == 100
    assert data.held_out.pixels[5].flatten().tolist() == pixels[5].tolist()


@pytest.fixture
def cifar20(tmp_path):
    """400 images whose superclasses are not those of the published archive."""
    fine = np.arange(400) % 100
    coarse = (fine * 7) % 20
    names = {
        "fine_label_names": [f"fine {number}" for number in range(100)],
        "coarse_label_names": [f"coar {number}" for number in range(20)],
    }
    write_cifar100(tmp_path, fine.tolist(), coarse.tolist(), names)
    chosen = {"data_name": "cifar20", "data_dir": str(tmp_path), "unlearn_type": "subclass"}
    return chosen | {"forget_class": "fine 42"}, fine, coarse, names


def test_cifar20_has_the_superclasses_of_its_archive(cifar20):
    chosen, _, coarse, names = cifar20
    data = load(**chosen)
    assert data.classes == names["coarse_label_names"]
    assert data.train.labels.tolist() == coarse.tolist()
    with pytest.raises(utils.UserError, match="--num_classes 100: cifar20 has 20"):
        load(**chosen, num_classes=100)


def test_subclass_of_cifar20_is_forgotten(cifar20):
    chosen, fine, *_ = cifar20
    data = load(**chosen)
    split = utils.make_split(data, flags(**chosen))
    assert split.folder == "subclass_42"
    assert split.forget.tolist() == np.flatnonzero(fine == 42).tolist()
    subclasses = data.held_out.subclasses
    assert subclasses[split.forget_test].eq(42).all()
    assert subclasses[split.test].ne(42).all()
    assert split.calibration.numel() == 80
    assert split.is_forgotten.equal(subclasses[split.calibration] == 42)
    by_number = utils.make_split(data, flags(**chosen | {"forget_class": "42"}))
    assert by_number.fingerprint == split.fingerprint


@pytest.fixture
def tiny_imagenet(tmp_path, monkeypatch):
    """An archive in the format of Tiny ImageNet, with three classes.

    It is already in --data_dir, and its download address is unreachable.
    """
    wnids, rng = ["n03", "n01", "n02"], np.random.default_rng(0)
    published = tmp_path / "data/tiny-imagenet-200.zip"
    published.parent.mkdir()
    with zipfile.ZipFile(published, "w") as archive:
        root = "tiny-imagenet-200"
        archive.writestr(f"{root}/wnids.txt", "\n".join(wnids))
        words = "n01\tcrane, a bird\nn02\tcrane, a machine\nn03\tgoldfish\nn09\tnone"
        archive.writestr(f"{root}/words.txt", words)
        rows = []
        for index in range(90):
            wnid, subset = wnids[index % 3], "train" if index < 60 else "val"
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
    return flags(data_name="tiny_imagenet", data_dir=str(tmp_path / "data"))


def test_tiny_imagenet_is_unpacked_and_read_as_published(tiny_imagenet):
    data = utils.load_data(tiny_imagenet, torch.device("cpu"))
    assert data.classes == ["crane (n01)", "crane (n02)", "goldfish"]
    assert data.train.pixels.shape == (60, 3, 64, 64) and data.train.size == 64
    assert len(data.held_out) == 30
    brightness = data.held_out.pixels.float().mean((1, 2, 3))
    for number in range(3):  # each class is brighter: the labels are those of the annotations
        of_class = brightness[data.held_out.labels == number]
        assert (of_class - (50 + 70 * number)).abs().max() < 10
    assert data.train.names[0] == "n01/images/n01_1.JPEG"
    listed = Path(tiny_imagenet.data_dir) / "request.txt"
    listed.write_text("train/n03/images/n03_6.JPEG\nn02/images/n02_5.JPEG\n")
    split = utils.make_split(data, flags(unlearn_type="list", forget_list=str(listed)))
    names = {data.train.names[index] for index in split.forget}
    assert names == {"n03/images/n03_6.JPEG", "n02/images/n02_5.JPEG"}


def test_tiny_imagenet_beyond_memory_is_read_from_disk(tiny_imagenet):
    in_memory = utils.load_data(tiny_imagenet, torch.device("cpu"))
    assert torch.is_tensor(in_memory.train.pixels)
    streamed = flags(**vars(tiny_imagenet) | {"memory_gb": 0, "workers": 2})
    on_disk = utils.load_data(streamed, torch.device("cpu"))
    assert not torch.is_tensor(on_disk.train.pixels)
    assert on_disk.fingerprint == in_memory.fingerprint
    assert on_disk.train.names == in_memory.train.names
    for subset in ("train", "held_out"):
        from_disk, kept = getattr(on_disk, subset), getattr(in_memory, subset)
        orders = torch.randperm(len(kept), generator=utils.generator(1, "order")).split(16)
        augmented = (
            images.batches(orders, utils.generator(1, "augmentation"))
            for images in (from_disk, kept)
        )
        assert from_disk.labels.equal(kept.labels)
        assert all(batch.equal(other) for batch, other in zip(*augmented, strict=True))


def test_unreadable_picture_of_tiny_imagenet_is_skipped(tiny_imagenet, capsys):
    whole = utils.load_data(tiny_imagenet, torch.device("cpu"))
    broken = Path(tiny_imagenet.data_dir) / "tiny-imagenet-200/val/images/val_61.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    for memory_gb in (8, 0):
        chosen = {"memory_gb": memory_gb, "workers": 0, "skip_corrupt": True}
        skipping = flags(**vars(tiny_imagenet) | chosen)
        data = utils.load_data(skipping, torch.device("cpu"))
        output = capsys.readouterr().out
        assert "1 unreadable image:" in output and "val/images/val_61.JPEG" in output
        left = [name for name in whole.held_out.names if not name.endswith("val_61.JPEG")]
        assert data.held_out.names == left and len(data.held_out.labels) == 29


def test_tiny_imagenet_archive_with_another_checksum_is_refused(tiny_imagenet, monkeypatch):
    monkeypatch.setattr(utils, "TINY_IMAGENET_MD5", "0" * 32)
    with pytest.raises(utils.UserError, match="tiny_imagenet: not in .* the download failed"):
        utils.load_data(tiny_imagenet, torch.device("cpu"))
