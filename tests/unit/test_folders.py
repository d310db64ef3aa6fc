"""Image folders: files that are read or skipped, explanations of layouts, and the fingerprint."""

import json
import os
import shutil
import socket
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import ImageFolder

import utils
from models import checkpoint

CPU = torch.device("cpu")


def save_picture(path, value=0, side=4):
    """Save a picture of one grey value and make its folders. Names need not be UTF-8."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        extension = os.path.splitext(os.fsdecode(path))[1].lower()
        kind = Image.registered_extensions().get(extension, "PNG")
        Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(file, kind)
    return path


@pytest.fixture
def root(tmp_path):
    """Two classes with three training and two test images each."""
    folder = tmp_path / "pictures"
    for subfolder, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("ant", "bee")):
            for number in range(count):
                save_picture(
                    folder / subfolder / name / f"{number}.png",
                    100 * label + 10 * number + (subfolder == "test"),
                )
    return folder


def load(root, **values):
    return utils.load_data(flags(data_name="image_folder", data_dir=os.fspath(root), **values), CPU)


def refusal(root, **values):
    """The error message that refuses the folder. It is one line."""
    with pytest.raises(utils.UserError) as caught:
        load(root, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def grey(images):
    return images.pixels[:, 0, 0, 0].tolist()


# ---------------------------------------------------------------- files that are read


def test_plain_folder_is_read_like_torchvision(root, capsys):
    save_picture(root / "train/ant/more/0.png", 7)
    save_picture(root / "train/ant/more-0.png", 8)
    save_picture(root / "train/ant/more-/1.png", 9)
    data, theirs = load(root), ImageFolder(root / "train")
    assert data.train.names == [os.path.relpath(path, root / "train") for path, _ in theirs.samples]
    assert data.train.labels.tolist() == theirs.targets and data.classes == theirs.classes
    assert data.train.pixels.dtype == torch.uint8
    assert grey(data.train) == [np.asarray(Image.open(path))[0, 0, 0] for path, _ in theirs.samples]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name",
    ["9.gif", "9.jfif", "9.PNG", "9.jp2", "9.qoi", "9.tga", "9.avif", "9", "9.dat", "9.JPeG"],
)
def test_picture_of_any_format_of_pillow_is_read(name, root):
    save_picture(root / "train/ant" / name, 200)
    data = load(root)
    assert f"ant/{name}" in data.train.names
    assert abs(grey(data.train)[data.train.names.index(f"ant/{name}")] - 200) <= 2


@pytest.mark.parametrize(
    "name",
    [
        *(".ipynb_checkpoints/1.png", ".1.png", "._1.png", "@eaDir/1.png", "__MACOSX/1.png"),
        *("Thumbs.db", "desktop.ini", ".DS_Store", "1.png~", "1.png.bak"),
        *("more/.hidden/1.png", "more/@eaDir/1.png"),
    ],
)
def test_hidden_system_and_backup_files_are_skipped_and_reported(name, root, capsys):
    plain = load(root)
    if "more" in name:
        save_picture(root / "train/ant/more/7.png")
        plain = load(root)
    save_picture(root / "train/ant" / name)
    data = load(root)
    (line,) = capsys.readouterr().out.splitlines()
    assert data.train.names == plain.train.names and data.fingerprint == plain.fingerprint
    assert "left out 1 hidden, system or backup" in line and "train/ant" in line


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git"])
def test_hidden_and_system_folders_are_not_classes(name, root, capsys):
    save_picture(root / "train" / name / "1.png")
    assert load(root).classes == ["ant", "bee"]
    assert f"1 hidden, system or backup files or folders (train/{name})" in capsys.readouterr().out


def test_files_that_are_not_pictures_are_skipped_and_reported_in_one_line(root, capsys):
    (root / "train/ant/labels.csv").write_text("a,b\n")
    (root / "train/ant/notes.txt").write_text("P5 notes\n")
    (root / "test/bee/8.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (root / "train/ant/broken").symlink_to("nowhere")
    np.save(root / "train/ant/features.npy", np.zeros(3))
    save_picture(root / "train/loose.png")
    data = load(root)
    (line,) = capsys.readouterr().out.splitlines()
    assert "5 files that are not pictures, or of a format that Pillow cannot read (" in line
    assert ", ...)" in line
    assert "1 not in a class folder (train/loose.png)" in line and len(data.train) == 6


def test_raw_photograph_is_not_read_for_its_thumbnail(root, capsys):
    save_picture(root / "thumbnail.tif", 5).rename(root / "train/ant/9.dng")
    assert "ant/9.dng" not in load(root).train.names
    assert "train/ant/9.dng" in capsys.readouterr().out
    save_picture(root / "scan.tif", 5).rename(root / "train/ant/9")
    assert "ant/9" in load(root).train.names


def test_folders_other_than_train_and_test_are_ignored(root, capsys):
    before = load(root).fingerprint
    save_picture(root / "val/cat/1.png")
    save_picture(root / "Train/cat/1.png")
    assert load(root).fingerprint == before and load(root).classes == ["ant", "bee"]


# ---------------------------------------------------------------- links


def test_loop_of_links_adds_no_images(root, capsys):
    before = load(root)
    for number, target in enumerate((".", "../ant")):
        (root / "train/ant" / f"loop{number}").symlink_to(target)
    data = load(root)
    assert data.train.names == before.train.names and data.fingerprint == before.fingerprint
    assert "2 links to folders that are read already" in capsys.readouterr().out


def test_link_to_itself_is_skipped(root, capsys):
    (root / "train/ant/me").symlink_to("me")
    assert len(load(root).train) == 6 and "train/ant/me" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("link", "target", "words"),
    [
        ("train/ant/up", "..", ["two classes", "train/bee/0.png", "train/ant/up/bee/0.png"]),
        ("train/ant/top", "../..", ["the same file (a link)"]),
        ("train/ant/other", "../bee", ["two classes", "train/ant/other/0.png"]),
        ("train/ant/held_out", "../../test/ant", ["training and test image", "test/ant/0.png"]),
        (
            "train/ant/9.png",
            "../../test/ant/1.png",
            ["train/ant/9.png and test/ant/1.png", "training and test image"],
        ),
        ("train/ant/9.png", "../bee/1.png", ["train/ant/9.png and train/bee/1.png", "two classes"]),
        ("train/wasp", "bee", ["two classes"]),
    ],
)
def test_link_that_puts_an_image_in_two_places_is_refused(link, target, words, root):
    (root / link).symlink_to(target)
    if link == "train/wasp":
        save_picture(root / "test/wasp/0.png")
    message = refusal(root)
    assert all(word in message for word in words), message


def test_test_images_as_training_images_are_refused(root):
    shutil.rmtree(root / "test")
    (root / "test").symlink_to("train")
    assert "training and test image" in refusal(root)


def test_second_link_to_an_image_of_the_class_counts_once(root, capsys):
    (root / "train/ant/again.png").symlink_to("0.png")
    os.link(root / "train/ant/1.png", root / "train/ant/hard.png")
    assert len(load(root).train) == 6
    assert (
        "2 links to pictures that are read already (train/ant/again.png, train/ant/hard.png)"
        in capsys.readouterr().out
    )


def test_folders_and_images_that_are_links_to_elsewhere_are_read(root, tmp_path, capsys):
    before = load(root)
    (root / "train/ant").rename(tmp_path / "elsewhere")
    (root / "train/ant").symlink_to(tmp_path / "elsewhere")
    (root / "test").rename(tmp_path / "held out")
    (root / "test").symlink_to(tmp_path / "held out")
    (root / "train/bee/0.png").rename(tmp_path / "object")
    (root / "train/bee/0.png").symlink_to(tmp_path / "object")
    data = load(root)
    assert (data.fingerprint, data.train.names) == (before.fingerprint, before.train.names)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- files that cannot be read


def test_pipes_sockets_and_broken_links_with_picture_names_are_unreadable(
    root, monkeypatch, capsys
):
    os.mkfifo(root / "train/ant/pipe.png")
    assert "pipe.png: cannot read image (not a regular file)" in refusal(root)
    (root / "train/bee/gone.png").symlink_to("nowhere.png")
    monkeypatch.chdir(root / "train/ant")  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        for memory_gb in (8, 0):
            data = load(root, skip_corrupt=True, memory_gb=memory_gb, workers=0)
            assert len(data.train) == 6
            skipped = "ant/pipe.png, ant/socket.png, bee/gone.png"
            assert f"skipping 3 unreadable images: {skipped}" in capsys.readouterr().out


def test_pipe_without_extension_is_skipped(root, capsys):
    os.mkfifo(root / "train/ant/pipe")
    assert len(load(root).train) == 6 and "train/ant/pipe" in capsys.readouterr().out


@pytest.mark.parametrize("refused", ["", "train", "train/ant", "test/bee"])
def test_folder_without_permission_is_named_with_the_reason(refused, root, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if Path(path) == root / refused:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    if not refused:
        shutil.rmtree(root / "train")
    monkeypatch.setattr(os, "scandir", refuse)
    assert refusal(root) == f"{root / refused}: cannot be read (Permission denied)"


def test_file_whose_status_cannot_be_read_is_named(root, monkeypatch):
    plain = os.stat

    def refuse(path, *arguments, **options):
        if Path(path) == root / "train/ant/0.png":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    assert "train/ant/0.png: cannot read image (Permission denied)" in refusal(root)
    assert load(root, skip_corrupt=True).train.names[:2] == ["ant/1.png", "ant/2.png"]


def test_file_without_permission_is_refused_or_skipped(root, monkeypatch, capsys):
    plain = Image.open

    def refuse(path, *arguments, **options):
        if os.fspath(path).endswith("train/bee/1.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    monkeypatch.setattr(Image, "open", refuse)
    assert "train/bee/1.png: cannot read image (Permission denied)" in refusal(root)
    assert len(load(root, skip_corrupt=True).train) == 5
    assert "skipping 1 unreadable image: bee/1.png" in capsys.readouterr().out


@pytest.mark.parametrize("memory_gb", [8, 0])
@pytest.mark.parametrize("subfolder", ["train", "test"])
def test_class_whose_images_are_all_unreadable_is_named(subfolder, memory_gb, root):
    for path in (root / subfolder / "bee").iterdir():
        path.write_text("no picture")
    message = refusal(root, skip_corrupt=True, memory_gb=memory_gb, workers=0)
    assert "--skip_corrupt: no image of the class of bee/0.png" in message


@pytest.mark.parametrize("memory_gb", [8, 0])
def test_too_many_open_files_skip_no_image(memory_gb, root, monkeypatch):
    def refuse(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Image, "open", refuse)
    message = refusal(root, skip_corrupt=True, memory_gb=memory_gb, workers=0, image_size=4)
    assert "cannot be opened (Too many open files)" in message


def test_image_deleted_while_reading_is_named_with_the_reason(root):
    data = load(root, memory_gb=0, workers=0)
    (root / "train/ant/2.png").unlink()
    with pytest.raises(
        utils.UserError, match=r"ant/2\.png: cannot read image \(No such file or directory\)"
    ):
        list(data.train.batches([torch.tensor([2])]))


@pytest.mark.parametrize("length", [300, 5000])
def test_too_long_path_is_refused_in_one_line(length):
    assert "File name too long" in refusal("x" * length)


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize(
    ("moves", "words"),
    [
        ({"test": "val"}, ["no folder test/", "found val/: rename it to test/"]),
        ({"test": "valid"}, ["found valid/: rename it to test/"]),
        ({"test": "Test"}, ["found Test/: rename it to test/"]),
        ({"train": "TRAIN"}, ["no folder train/", "found TRAIN/: rename it to train/"]),
        (
            {"train": "training", "test": "validation"},
            ["found training/: rename it to train/", "found validation/"],
        ),
        ({"train": "trn", "test": "other"}, ["no folder train/ and test/", "found trn/"]),
        (
            {"test": "other"},
            ["no folder test/", "found other/, train/", "put held-out images of every class there"],
        ),
        ({"train": "other"}, ["no folder train/", "found other/, test/"]),
        (
            {"train": "inner/train", "test": "inner/test"},
            ["are inside inner/", "--data_dir ", "/pictures/inner"],
        ),
        (
            {"train/ant": "ant", "train/bee": "bee", "train": "", "test": ""},
            ["ant/, bee/", "if these are the classes"],
        ),
    ],
)  # fmt: skip
def test_wrong_folder_layout_is_explained(moves, words, root):
    for old, new in moves.items():
        if new:
            (root / new).parent.mkdir(exist_ok=True)
            (root / old).rename(root / new)
        else:
            shutil.rmtree(root / old)
    message = refusal(root)
    assert all(word in message for word in words), message


def test_ambiguous_validation_and_test_folders_are_named(root):
    (root / "test").rename(root / "val")
    save_picture(root / "Test/ant/1.png")
    assert "found Test/ and val/: rename one of them to test/" in refusal(root)


def test_train_folder_as_data_dir_is_explained(root):
    assert f"use --data_dir {root}" in refusal(root / "train")


def test_folder_named_test_with_other_contents_is_explained(root):
    (root / "train").rename(root.parent / "test")
    assert "if these are the classes" in refusal(root.parent / "test")
    (root / "test").rename(root / "images")
    (root.parent / "train").mkdir()
    assert "only images/" in refusal(root)


def test_single_class_is_refused_and_named(root):
    for subfolder in ("train", "test"):
        shutil.rmtree(root / subfolder / "bee")
    assert "train/ has one class (ant); a classifier needs at least two" in refusal(root)


def test_five_of_many_names_are_shown():
    assert utils._some(list("abcde")) == "a, b, c, d, e"
    assert utils._some(list("abcdef")) == "a, b, c, d, e, ..."


def test_files_without_class_folders_are_explained(root):
    for subfolder in ("train", "test"):
        shutil.rmtree(root / subfolder)
    assert "the folder is empty" in refusal(root)
    save_picture(root / "1.png")
    assert "1 files but no folders" in refusal(root)
    save_picture(root / "train/1.png")
    save_picture(root / "test/1.png")
    message = refusal(root)
    assert "no class folders" in message and "at least two classes" in message


def test_file_where_a_folder_is_expected_is_named(root, tmp_path):
    assert "is a file or a broken link, not a folder" in refusal(root / "train/ant/0.png")
    assert "no such folder" in refusal(tmp_path / "nowhere")
    shutil.rmtree(root / "test")
    (root / "test").write_text("")
    assert "test is a file or a broken link" in refusal(root)


def test_empty_test_folder_is_refused_in_one_line(root):
    shutil.rmtree(root / "test")
    (root / "test").mkdir()
    assert "only train/ has ant, bee" in refusal(root)


def test_class_without_pictures_is_named_with_its_skipped_files(root):
    (root / "train/cat").mkdir()
    (root / "train/cat/1.txt").write_text("no picture")
    message = refusal(root)
    assert "no pictures in train/cat" in message and "train/cat/1.txt" in message


@pytest.mark.parametrize(
    ("renamed", "words"),
    [
        ("Ant", ["'Ant'", "upper and lower case"]),
        ("ant ", ["'ant '", "blanks around the name"]),
        ("wasp", ["only train/ has ant", "only test/ has wasp"]),
    ],
)
def test_classes_that_differ_between_train_and_test_are_named_with_a_cause(renamed, words, root):
    (root / "test/ant").rename(root / "test" / renamed)
    message = refusal(root)
    assert "different classes" in message and all(word in message for word in words), message


def test_classes_that_differ_in_unicode_form_are_named(root):
    for subfolder, form in (("train", "NFC"), ("test", "NFD")):
        (root / subfolder / "ant").rename(root / subfolder / unicodedata.normalize(form, "café"))
    message = refusal(root)
    assert "Unicode form" in message and "café" in unicodedata.normalize("NFC", message)


# ---------------------------------------------------------------- fingerprint


def test_fingerprint_in_memory_equals_that_on_disk(root):
    prints = {
        load(root, memory_gb=size, image_size=side).fingerprint
        for size in (8, 0)
        for side in (None, 4, 9)
    }
    assert len(prints) == 1


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (
            lambda root: save_picture(root / "train/bee/2.png", 3),
            "training images of other content",
        ),
        (lambda root: save_picture(root / "test/bee/1.png", 3), "other held-out images"),
        (lambda root: save_picture(root / "test/bee/7.png", 3), "other held-out images"),
        (
            lambda root: (root / "test/bee/1.png").rename(root / "test/bee/7.png"),
            "other held-out images",
        ),
        (lambda root: save_picture(root / "train/bee/7.png", 3), "other training images"),
        (
            lambda root: (root / "train/bee/2.png").rename(root / "train/bee/7.png"),
            "other training images",
        ),
        (
            lambda root: (root / "train/bee/2.png").rename(root / "train/ant/7.png"),
            "other training images",
        ),
    ],
)
@pytest.mark.parametrize("memory_gb", [8, 0])
def test_changed_images_change_the_fingerprint_and_are_named(change, what, memory_gb, root):
    before = load(root, memory_gb=memory_gb, workers=0)
    change(root)
    after = load(root, memory_gb=memory_gb, workers=0)
    assert after.difference(before.fingerprint) == what
    assert before.difference(after.fingerprint) == what
    assert after.difference(after.fingerprint) is None


def test_two_swapped_images_change_the_fingerprint(root):
    before = load(root).fingerprint
    for old, new in (("0.png", "spare"), ("1.png", "0.png"), ("spare", "1.png")):
        (root / "train/ant" / old).rename(root / "train/ant" / new)
    assert load(root).fingerprint != before


def test_changed_pixels_in_memory_change_the_fingerprint(digits):
    def changed(image_set):
        images = {"train": digits.train, "held_out": digits.held_out}
        pixels = images[image_set].pixels.clone()
        pixels[5, 0, 3, 3] ^= 1
        images[image_set] = utils.Images(
            pixels, images[image_set].labels, images[image_set].spec, images[image_set].size
        )
        return utils.Data(**images, classes=digits.classes, tag="digits")

    assert changed("train").difference(digits.fingerprint) == "training images of other content"
    assert changed("held_out").difference(digits.fingerprint) == "other held-out images"
    same = utils.Data(digits.train, digits.held_out, digits.classes, "digits")
    assert same.fingerprint == digits.fingerprint


def test_changed_held_out_labels_change_the_fingerprint(digits):
    held_out = digits.held_out
    labels = held_out.labels.roll(1)
    other = utils.Data(
        digits.train,
        utils.Images(held_out.pixels, labels, held_out.spec, 8),
        digits.classes,
        "digits",
    )
    assert other.difference(digits.fingerprint) == "other held-out images"


@pytest.mark.parametrize("size", [0, 1, 32_767, 32_768, 32_769, 50_001, 1_000_000])
def test_changed_byte_or_size_of_a_file_changes_its_hash(size, tmp_path):
    path = tmp_path / "file"
    content = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    path.write_bytes(content.tobytes())
    hashes = [utils._hash_files([path])]
    for place in {0, size - 1, size // 2 if size <= 32_768 else 8191} - {-1} if size else ():
        changed = content.copy()
        changed[place] ^= 1
        path.write_bytes(changed.tobytes())
        hashes.append(utils._hash_files([path]))
    path.write_bytes(content.tobytes() + b"\0")
    hashes.append(utils._hash_files([path]))
    assert len(set(hashes)) == len(hashes)


def test_hash_of_many_files_depends_on_their_order(tmp_path):
    paths = []
    for number in range(300):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(bytes([number % 256, number // 256]))
    hashes = {
        utils._hash_files(paths),
        utils._hash_files(paths[::-1]),
        utils._hash_files(paths[:-1]),
    }
    assert len(hashes) == 3 and utils._hash_files(paths) in hashes


def old_fingerprint(data):
    """The fingerprint of earlier versions: labels and names of the training images only."""
    import hashlib

    digest = hashlib.sha256(data.train.labels.numpy().astype("<i8").tobytes())
    digest.update("\n".join(data.train.names or ()).encode())
    return digest.hexdigest()[:16]


def test_checkpoint_of_an_earlier_version_is_compared_by_labels_and_names(root, capsys):
    data = load(root)
    args = flags(data_name="image_folder", data_dir=str(root))
    checkpoint.check_meta("model.pth", {"data_fingerprint": old_fingerprint(data)}, args, data)
    assert "earlier version" in capsys.readouterr().out
    with pytest.raises(utils.UserError, match="model.pth: made on other training images"):
        checkpoint.check_meta("model.pth", {"data_fingerprint": "0" * 16}, args, data)
    checkpoint.check_meta("model.pth", {}, args, data)
    checkpoint.check_meta("model.pth", {"data_fingerprint": data.fingerprint}, args, data)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("actual", ["", "a-b", 5, ["x"], {"a": 1}, 2.5, True])
def test_malformed_fingerprint_is_that_of_another_data_set(actual, digits):
    assert digits.difference(actual) == "other training images"


# ---------------------------------------------------------------- names that are not UTF-8


def test_names_that_are_not_utf8_are_read_and_written_as_escapes(tmp_path, capsys):
    root = os.fsencode(tmp_path) + b"/pictur\xe9s"
    for subfolder in (b"train", b"test"):
        for name in (b"ant", b"caf\xe9"):
            for number in range(3):
                save_picture(os.path.join(root, subfolder, name, b"\xfc%d.png" % number), number)
    (Path(os.fsdecode(root)) / "train/ant/n\udcf6te.txt").write_text("")
    data = load(os.fsdecode(root))
    assert data.classes == ["ant", "caf\\xe9"] and data.train.names[-1] == "caf\\xe9/\\xfc2.png"
    assert data.tag == "image_folder-pictur-xe9s"
    assert "train/ant/n\\xf6te.txt" in capsys.readouterr().out
    for memory_gb in (8, 0):
        again = load(os.fsdecode(root), memory_gb=memory_gb, workers=0)
        assert again.fingerprint == data.fingerprint
        assert len(list(again.train.batches([torch.tensor([5, 0])]))[0]) == 2
    args = flags(
        data_name="image_folder",
        data_dir=os.fsdecode(root),
        unlearn_type="class",
        forget_class="caf\udce9",
    )
    split = utils.make_split(data, args)
    assert split.forget.tolist() == [3, 4, 5]
    names = json.dumps(data.train.names, ensure_ascii=False)
    text = f"{split.describe()} {utils.run_folder(args, data)} {names}"
    assert text.encode("utf-8").decode() == text


def test_unreadable_image_whose_name_is_not_utf8_is_one_encodable_line(tmp_path):
    root = os.fsencode(tmp_path) + b"/p"
    for subfolder in (b"train", b"test"):
        for name in (b"ant", b"b\xe9e"):
            save_picture(os.path.join(root, subfolder, name, b"1.png"))
    (Path(os.fsdecode(root)) / "train/b\udce9e/1.png").write_bytes(b"no picture")
    assert (
        "train/b\\xe9e/1.png: cannot read image"
        in refusal(os.fsdecode(root)).encode("utf-8").decode()
    )


def test_missing_folder_whose_name_is_not_utf8_is_one_encodable_line():
    assert "--data_dir n\\xe9: no such folder" in refusal("n\udce9").encode("utf-8").decode()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.text(st.characters(blacklist_characters="\0"), max_size=8), st.binary(max_size=8))
def test_printable_names_can_be_encoded_and_have_one_line(text, raw):
    for name in (text, os.fsdecode(raw.replace(b"\0", b""))):
        shown = utils.printable(name)
        assert shown.encode("utf-8").decode() == shown and not set(shown) & set(map(chr, range(32)))
        if name.isprintable():
            assert shown == name


# ---------------------------------------------------------------- memory


def test_too_many_pixels_for_the_machine_name_both_remedies(root, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("can't allocate memory: you tried to allocate 10 bytes")

    monkeypatch.setattr(torch, "zeros", refuse)
    message = refusal(root)
    words = ["--memory_gb 8", "lower it, or --image_size", "4×4"]
    assert all(word in message for word in words), message


def test_pixels_beyond_memory_gb_are_read_from_disk(root, capsys):
    """Ten images of 3×100×100 bytes are 0.0003 GB."""
    assert torch.is_tensor(load(root, image_size=100, memory_gb=0.000301).train.pixels)
    assert not capsys.readouterr().out
    assert isinstance(load(root, image_size=100, memory_gb=0.000299).train.pixels, utils.ImageFiles)
    assert (
        "0.00 GB of pixels, more than --memory_gb 0.000299; images are streamed from disk"
        in capsys.readouterr().out
    )


def test_pictures_of_several_sizes_are_reported_and_resized(root, capsys):
    save_picture(root / "train/ant/0.png", 50, side=9)
    data = load(root)
    assert data.train.pixels.shape == (6, 3, 64, 64)
    assert (
        "resizing and centre-cropping images of 2 sizes to 64×64 (--image_size)"
        in capsys.readouterr().out
    )
    assert load(root, image_size=7).train.pixels.shape == (6, 3, 7, 7)


def test_rotated_photograph_counts_with_its_upright_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for subfolder in ("train", "test"):
        for name in ("ant", "bee"):
            path = save_picture(tmp_path / subfolder / name / "1.png", 9)
            Image.new("RGB", (4, 8)).save(path.with_name("2.png"))
            Image.new("RGB", (8, 4)).save(path.with_name("3.jpg"), exif=exif)
            path.unlink()
    paths = sorted(tmp_path.rglob("*.*g"))
    assert {utils._upright_size(path) for path in paths} == {(4, 8)}


# ---------------------------------------------------------------- incomplete published data sets


@pytest.fixture
def tiny_imagenet(tmp_path):
    """The layout of Tiny ImageNet with two classes."""
    folder = tmp_path / "tiny-imagenet-200"
    for wnid in ("n01", "n02"):
        for number in range(3):
            save_picture(folder / f"train/{wnid}/images/{wnid}_{number}.JPEG", side=64)
            save_picture(folder / f"val/images/{wnid}_{number}.JPEG", 9, side=64)
    (folder / "wnids.txt").write_text("n01\nn02\n")
    (folder / "words.txt").write_text("n01\tant\nn02\tbee\n")
    rows = [
        f"{wnid}_{number}.JPEG\t{wnid}\t0\t0\t9\t9\n"
        for wnid in ("n01", "n02")
        for number in range(3)
    ]
    (folder / "val/val_annotations.txt").write_text("".join(rows))
    return folder


def load_tiny(folder, **values):
    return utils.load_data(
        flags(data_name="tiny_imagenet", data_dir=str(folder.parent), **values), CPU
    )


def test_tiny_imagenet_ignores_hidden_files_in_names_and_fingerprint(tiny_imagenet):
    data = load_tiny(tiny_imagenet)
    (tiny_imagenet / "train/n01/images/._n01_0.JPEG").write_bytes(b"x")
    assert load_tiny(tiny_imagenet).fingerprint == data.fingerprint
    assert data.classes == [
        "ant",
        "bee",
    ]
    assert load_tiny(tiny_imagenet, memory_gb=0, workers=0).fingerprint == data.fingerprint
    save_picture(tiny_imagenet / "val/images/n01_0.JPEG", 200, side=64)
    assert load_tiny(tiny_imagenet).difference(data.fingerprint) == "other held-out images"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda root: shutil.rmtree(root / "train/n02"), ["incomplete", "train/n02/images"]),
        (
            lambda root: [path.unlink() for path in (root / "train/n02/images").iterdir()],
            ["no images in train/n02"],
        ),
        (lambda root: (root / "wnids.txt").unlink(), ["incomplete", "wnids.txt"]),
        (lambda root: (root / "wnids.txt").write_bytes(b"\xff\xfe\0"), ["incomplete"]),
        (
            lambda root: (root / "val/val_annotations.txt").write_text("n01_0.JPEG\tn99\n"),
            ["incomplete", "n99"],
        ),
        (
            lambda root: (root / "val/val_annotations.txt").write_text("n01_0.JPEG\n"),
            ["incomplete"],
        ),
        (
            lambda root: (root / "val/val_annotations.txt").write_text(""),
            ["incomplete", "no images"],
        ),
        (lambda root: (root / "val/images/n02_1.JPEG").unlink(), ["n02_1.JPEG", "No such file"]),
    ],
)
def test_incomplete_tiny_imagenet_is_named(damage, words, tiny_imagenet):
    damage(tiny_imagenet)
    with pytest.raises(utils.UserError) as caught:
        load_tiny(tiny_imagenet)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value), str(
        caught.value
    )


def test_tiny_imagenet_without_permission_is_not_called_incomplete(tiny_imagenet, monkeypatch):
    plain = os.listdir

    def refuse(path):
        if "n02" in os.fspath(path):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(
        utils.UserError, match=r"train/n02/images: cannot be read \(Permission denied\)"
    ):
        load_tiny(tiny_imagenet)


CORRUPTED = RuntimeError("File not found or corrupted.")


@pytest.mark.parametrize(
    ("present", "error", "words"),
    [
        (False, CORRUPTED, ["batches-py is missing", "not found or corrupted"]),
        (True, CORRUPTED, ["is incomplete or damaged", "cifar-10-python.tar.gz"]),
        (True, PermissionError(13, "Permission denied"), ["(Permission denied)", "permissions"]),
        (False, OSError("<urlopen error no route>"), ["the download failed", "no route"]),
    ],
)  # fmt: skip
def test_cifar_that_is_missing_or_damaged_is_named(present, error, words, tmp_path, monkeypatch):
    from torchvision import datasets

    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(datasets.CIFAR10, "__init__", refuse)
    if present:
        (tmp_path / "cifar-10-batches-py").mkdir()
    with pytest.raises(utils.UserError) as caught:
        utils.load_data(flags(data_name="cifar10", data_dir=str(tmp_path)), CPU)
    assert all(word in str(caught.value) for word in words), str(caught.value)


# ---------------------------------------------------------------- other files


def ends_with(main, capsys):
    """(status, stderr) of a script whose main is given."""
    with pytest.raises(SystemExit) as ended:
        utils.run_script(main)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "call",
    [
        lambda: Path("x" * 300).exists(),
        lambda: Path("/proc/self/mem/none").read_text(),
        lambda: os.listdir("caf\udce9"),
    ],
)
def test_path_that_the_system_refuses_is_reported_in_one_line(call, capsys):
    status, output = ends_with(call, capsys)
    assert status == 2
    assert output.count("\n") == 1
    assert ": error: " in output
    assert "cannot be used (" in output


def test_bug_in_the_program_keeps_its_traceback(capsys):
    with pytest.raises(OSError, match="no file"):
        utils.run_script(lambda: (_ for _ in ()).throw(OSError("no file in it")))


def test_checkpoint_that_cannot_be_opened_is_named_with_the_reason(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    path.write_bytes(b"x")
    with pytest.raises(utils.UserError, match="not a file"):
        checkpoint.read(tmp_path)
    with pytest.raises(utils.UserError, match="none.pth: no such file; train it"):
        checkpoint.read(tmp_path / "none.pth", "train it")
    with pytest.raises(utils.UserError, match="x.pth: no such file"):
        checkpoint.read(path / "x.pth")
    with pytest.raises(utils.UserError, match=r"cannot be read \(File name too long\)"):
        checkpoint.read(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(utils.UserError, match="not a file"):
        checkpoint.read(tmp_path / "pipe.pth")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(utils.UserError, match=r"model.pth: cannot be read \(Permission denied\)"):
        checkpoint.read(path)


def test_written_files_contain_any_name_as_utf8(tmp_path):
    name = "caf\udce9 é 漢"
    utils.save_json(tmp_path / "record.json", {"data_dir": name})
    utils.save_text(tmp_path / "rows.csv", f"{name},1\n")
    assert json.loads((tmp_path / "record.json").read_text(encoding="utf-8")) == {"data_dir": name}
    assert (tmp_path / "rows.csv").read_text(encoding="utf-8") == "caf\\udce9 é 漢,1\n"
    args = flags(data_dir=name)
    checkpoint.save(tmp_path / "model.pth", {"a": torch.zeros(1)}, {"flags": vars(args)})
    assert checkpoint.read(tmp_path / "model.pth")[1]["flags"]["data_dir"] == name


def test_flags_in_records_can_be_encoded(digits):
    record = utils.describe_run(flags(data_dir="caf\udce9", num_classes=10), digits, CPU)
    assert record["flags"]["data_dir"] == "caf\\xe9" and record["flags"]["num_classes"] == 10


# ---------------------------------------------------------------- reading many images


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """150 pictures of the grey values 0 to 149, which are three batches."""
    folder = tmp_path_factory.mktemp("many")
    return [save_picture(folder / f"{value:03}.png", value) for value in range(150)]


@pytest.mark.parametrize("workers", [0, 2])
def test_all_images_are_read_in_order_by_any_number_of_workers(workers, many):
    files, pixels = utils.ImageFiles(many, 4, workers), torch.zeros(150, 3, 4, 4, dtype=torch.uint8)
    assert files.read_all(into=pixels) == {}
    expected = torch.arange(150, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    assert pixels.equal(expected)
    streamed = list(files.batches([torch.tensor([149, 0]), torch.tensor([], dtype=torch.int64)]))
    assert streamed[0].equal(expected[[149, 0]]) and streamed[1].shape == (0, 3, 4, 4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_images_are_skipped_in_a_single_pass(workers, in_memory, many, tmp_path):
    paths = list(many)
    paths[3], paths[100] = tmp_path / "a.png", tmp_path / "b.png"
    paths[3].write_bytes(b"no picture")
    files = utils.ImageFiles(paths, 4, workers)
    pixels = torch.full((150, 3, 4, 4), 7, dtype=torch.uint8) if in_memory else None
    unreadable = files.read_all(into=pixels, skip_corrupt=True)
    assert list(unreadable) == [3, 100]
    assert "a.png: cannot read image (its content" in str(unreadable[3])
    assert "b.png: cannot read image (No such file" in str(unreadable[100])
    if in_memory:
        expected = [0 if index in (3, 100) else index for index in range(150)]
        assert pixels[:, 0, 0, 0].tolist() == expected  # unreadable ones are black
    with pytest.raises(utils.UnreadableImage, match=r"a\.png"):
        files.read_all(into=pixels)
    with pytest.raises(utils.UnreadableImage, match=r"b\.png"):
        list(files.batches([torch.tensor([0, 100])]))


def test_error_not_caused_by_an_image_is_raised_despite_skip_corrupt(many, monkeypatch):
    def refuse(path, side):
        raise utils.UserError("too many open files")

    monkeypatch.setattr(utils, "_read_image", refuse)
    with pytest.raises(utils.UserError, match="too many open files"):
        utils.ImageFiles(many, 4, 0).read_all(skip_corrupt=True)


@pytest.mark.parametrize(("side", "largest"), [(4, 64), (295, 64), (297, 63), (1024, 5), (4096, 1)])
def test_waiting_batches_of_a_worker_have_at_most_16_mb(side, largest, monkeypatch):
    sizes = []

    def read(files, index_batches):
        for indices in index_batches:
            sizes.append(len(indices))
            yield utils.ReadBatch(np.zeros(1), {})

    monkeypatch.setattr(utils.ImageFiles, "_read", read)
    utils.ImageFiles(["x"] * 130, side, 2).read_all()
    assert max(sizes) == largest and sum(sizes) == 130


@pytest.mark.parametrize(
    ("workers", "batches", "in_this_process"), [(2, 2, False), (0, 2, True), (2, 1, True)]
)
def test_several_batches_are_read_by_worker_processes(
    workers, batches, in_this_process, many, monkeypatch
):
    """Each image is replaced by a flag: whether this process has read it."""
    parent = os.getpid()
    monkeypatch.setattr(utils, "_read_image", lambda path, side: os.getpid() == parent)
    files = utils.ImageFiles(many, 1, workers)
    read = list(files.batches([torch.tensor([0, 1])] * batches))
    assert all(bool(pixels.all()) == in_this_process for pixels in read) and len(read) == batches


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_images_leaves_the_global_generator_unchanged(workers, many):
    before = torch.get_rng_state()
    utils.ImageFiles(many, 4, workers).read_all()
    assert torch.get_rng_state().equal(before)
