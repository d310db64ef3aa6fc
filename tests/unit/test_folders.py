"""Image folders: which files are read, the decoded array that is kept, and the fingerprint."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as transforms

import utils

CPU = torch.device("cpu")


def save_picture(path, value=0, side=4, kind="PNG"):
    """Save a picture of one grey value and make its folders. Names need not be UTF-8."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(file, kind)
    return path


@pytest.fixture(autouse=True)
def torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch"


@pytest.fixture
def root(tmp_path):
    """Two classes with three training and two test images each, of different grey values."""
    folder = tmp_path / "pictures"
    for subset, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("ant", "bee")):
            for number in range(count):
                value = 100 * label + 10 * number + (subset == "test")
                save_picture(folder / subset / name / f"{number}.png", value)
    return folder


def load(root, **options):
    return utils.load_data("image_folder", os.fspath(root), device=CPU, **options)


def refused(root, *words, **options):
    with pytest.raises(utils.UserError) as caught:
        load(root, **options)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def grey(images):
    return images.pixels[:, 0, 0, 0].tolist()


def swap(first, second):
    first.rename(first.with_name("third"))
    second.rename(first)
    first.with_name("third").rename(second)


def arrays(root):
    """The decoded arrays that are kept in the folder."""
    return sorted((root / ".decoded").glob("*.npy"))


# ---------------------------------------------------------------- files that are read


def test_folder_is_read_like_torchvision(root):
    save_picture(root / "train/ant/sub/deep/0.png", 55)
    save_picture(root / "train/ant/10.jpg", 44, kind="JPEG")
    data, expected = load(root), ImageFolder(root / "train")
    paths = [os.path.relpath(path, root / "train") for path, _ in expected.samples]
    assert data.train.names == paths and data.classes == expected.classes
    assert data.train.labels.tolist() == expected.targets and data.train.labels.dtype == torch.int64
    pictures = [transforms.pil_to_tensor(image) for image, _ in expected]
    assert data.train.pixels.equal(torch.stack(pictures))
    assert grey(data.held_out) == [1, 11, 101, 111] and data.tag == "image_folder-pictures"


@pytest.mark.parametrize("name", ["picture", "picture.unknown", "9.PNG", "9.txt"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "PPM"])
def test_picture_without_a_known_extension_is_read(name, kind, root):
    save_picture(root / "train/bee" / name, 222, kind=kind)
    data = load(root)
    assert dict(zip(data.train.names, grey(data.train), strict=True))[f"bee/{name}"] == 222


@pytest.mark.parametrize("name", ["train/.cache/1.png", "train/ant/.1.png", "test/bee/.x/1.png"])
def test_names_that_begin_with_a_dot_are_left_out_at_any_depth(name, root):
    fingerprint = load(root).fingerprint
    save_picture(root / name)
    assert load(root).fingerprint == fingerprint


def test_folder_inside_a_hidden_folder_is_read(root, tmp_path):
    hidden = tmp_path / ".data/pictures"
    shutil.copytree(root, hidden)
    assert load(hidden).fingerprint == load(root).fingerprint


def test_images_are_resized_by_the_shorter_side_and_centre_cropped(root):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 31, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(root / "train/ant/0.png")
    whole = torch.from_numpy(pixels).permute(2, 0, 1)
    expected = transforms.center_crop(transforms.resize(whole, [9], antialias=True), [9])
    assert load(root, image_size=9).train.pixels[0].equal(expected)


@pytest.mark.parametrize(
    ("options", "pixels", "size"),
    [({}, 4, 4), ({"native_side": 6}, 4, 6), ({"image_size": 3, "native_side": 6}, 3, 3)],
)
def test_equal_squares_keep_their_size_unless_image_size_is_given(options, pixels, size, root):
    data = load(root, **options)
    assert data.train.pixels.shape[-2:] == (pixels, pixels) and data.train.size == size


@pytest.mark.parametrize(("options", "side"), [({}, 64), ({"native_side": 6}, 6)])
def test_images_of_several_sizes_get_the_side_of_the_model_or_64(options, side, root):
    save_picture(root / "test/bee/1.png", side=5)
    assert load(root, **options).train.pixels.shape[-2:] == (side, side)


@pytest.mark.skipif(os.name == "nt", reason="names of other bytes than UTF-8 need a POSIX system")
def test_names_that_are_not_utf8_are_escaped(root):
    try:
        save_picture(os.fsencode(root) + b"/train/ant/caf\xe9.png")
    except OSError:
        pytest.skip("the file system refuses names that are not UTF-8")
    assert "ant/caf\\xe9.png" in load(root).train.names


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda root: shutil.rmtree(root), ["train"]),
        (lambda root: shutil.rmtree(root / "test"), ["test"]),
        (lambda root: shutil.rmtree(root / "test/bee"), ["2", "1", "bee"]),
        (lambda root: (root / "test/bee").rename(root / "test/Bee"), ["bee", "Bee"]),
        (lambda root: [shutil.rmtree(root / f"{s}/bee") for s in ("train", "test")], ["1"]),
        (lambda root: [shutil.rmtree(root / f"{s}/bee") for s in ("train", "test")]
            + [shutil.rmtree(root / f"{s}/ant") for s in ("train", "test")], ["train"]),
        (lambda root: (shutil.rmtree(root / "train/bee"), (root / "train/bee").mkdir()), ["bee"]),
    ],
)  # fmt: skip
def test_wrong_layout_is_refused(change, words, root):
    change(root)
    refused(root, "--data_dir", str(root), *words)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("content", [b"", b"<html>", "truncated", "16-bit RGB"])
def test_file_that_cannot_be_read_is_named(content, workers, root):
    path = root / "test/ant/1.png"
    if content == "truncated":
        content = path.read_bytes()[:50]
    elif content == "16-bit RGB":
        Image.fromarray(np.zeros((4, 4), np.uint16)).save(path, "TIFF")
        content = path.read_bytes()
    path.write_bytes(content)
    for number in range(150):
        save_picture(root / f"train/ant/n{number}.png")
    refused(root, str(path), image_size=4, workers=workers)
    assert not arrays(root) and len(list((root / ".decoded").iterdir())) <= 1  # the lock


@pytest.mark.parametrize(
    ("link", "target"),
    [("test/ant/9.png", "train/ant/1.png"), ("train/bee/9.png", "train/ant/1.png")],
)
@pytest.mark.parametrize("make", [os.symlink, os.link])
def test_link_that_puts_an_image_in_two_places_is_refused(make, link, target, root):
    make(root / target, root / link)
    refused(root, link, target)


def test_loop_of_links_is_refused(root):
    (root / "train/ant/loop").symlink_to(root / "train/ant")
    refused(root, "0.png")


def test_link_to_an_image_elsewhere_is_read_and_a_broken_one_named(root, tmp_path):
    (root / "train/ant/9.png").symlink_to(save_picture(tmp_path / "elsewhere/9.png", 77))
    assert 77 in grey(load(root).train)
    (root / "train/bee/9.png").symlink_to("nowhere.png")
    refused(root, "train/bee/9.png")


# ---------------------------------------------------------------- the array that is kept


@pytest.mark.parametrize("workers", [0, 2])
def test_all_images_are_read_in_order_by_any_number_of_workers(workers, root):
    for number in range(200):
        save_picture(root / f"train/bee/n{number:03}.png", number)
    state = torch.get_rng_state()
    data = load(root, workers=workers)
    assert grey(data.train) == [0, 10, 20, 100, 110, 120, *range(200)]
    assert torch.get_rng_state().equal(state)  # dropout draws from it


def test_second_load_reads_the_kept_array_only(root):
    first = load(root)
    (path,) = arrays(root)
    kept = np.load(path)
    kept[0] = 99  # a mark, to see what is read
    np.save(path, kept)
    second = load(root)
    assert grey(second.train) == [99, *grey(first.train)[1:]]
    assert second.fingerprint == first.fingerprint and second.train.names == first.train.names
    second.train.pixels[0] = 7  # of the copy in memory
    assert np.load(path)[0, 0, 0, 0] == 99


def test_changed_file_is_decoded_again_and_the_stale_array_removed(root):
    before, stale = load(root), arrays(root)
    save_picture(root / "train/ant/0.png", 200)
    after = load(root)
    assert grey(after.train)[0] == 200 and after.fingerprint != before.fingerprint
    assert len(arrays(root)) == 1 and arrays(root) != stale


def test_arrays_of_several_sizes_are_kept_together(root):
    sizes = [load(root, image_size=size).train.pixels.shape[-1] for size in (3, 5, 3)]
    assert sizes == [3, 5, 3] and len(arrays(root)) == 2
    assert load(root, image_size=3).fingerprint == load(root, image_size=5).fingerprint


def test_runs_that_start_together_get_the_same_images(root):
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(load, [root] * 8))
    assert len({data.fingerprint for data in loaded}) == 1 and len(arrays(root)) == 1
    assert all(data.train.pixels.equal(loaded[0].train.pixels) for data in loaded)


def test_read_only_folder_is_decoded_into_the_cache_of_torch(root, torch_home):
    expected = load(root)
    shutil.rmtree(root / ".decoded")
    (root / ".decoded").write_text("a file, so that no folder can be made")
    data = load(root)
    assert data.fingerprint == expected.fingerprint
    assert data.train.pixels.equal(expected.train.pixels)
    assert len(list(torch_home.rglob("*.npy"))) == 1


# ---------------------------------------------------------------- fingerprint


def test_fingerprint_ignores_place_time_and_size_of_the_arrays(root, tmp_path):
    fingerprint = load(root).fingerprint
    shutil.copytree(root, tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*.png"):
        os.utime(path, (1, 1))
    assert load(tmp_path / "copy", image_size=2, workers=1).fingerprint == fingerprint
    int(fingerprint, 16)


@pytest.mark.parametrize(
    "change",
    [
        lambda root: save_picture(root / "train/ant/0.png", 201),
        lambda root: save_picture(root / "test/bee/1.png", 201),
        lambda root: (root / "train/ant/0.png").rename(root / "train/ant/00.png"),
        lambda root: (root / "train/ant/2.png").rename(root / "train/bee/9.png"),
        lambda root: (root / "train/ant/2.png").rename(root / "test/ant/2.png"),
        lambda root: swap(root / "train/ant/0.png", root / "train/bee/1.png"),
        lambda root: (root / "test/bee/0.png").unlink(),
        lambda root: save_picture(root / "train/ant/4.png"),
    ],
)
def test_fingerprint_changes_with_bytes_names_and_classes(change, root):
    before = load(root).fingerprint
    change(root)
    assert load(root).fingerprint != before


def test_changed_byte_inside_a_large_picture_changes_the_fingerprint(root):
    """An uncompressed picture keeps its size; the modification time shows the change."""
    path = save_picture(root / "train/ant/0.png", 9, side=200, kind="BMP")
    before, status, content = load(root), path.stat(), bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load(root).fingerprint == before.fingerprint  # not noticed: size and time are equal
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    after = load(root)
    assert after.fingerprint != before.fingerprint
    assert not after.train.pixels.equal(before.train.pixels)
