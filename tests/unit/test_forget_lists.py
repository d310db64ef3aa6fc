"""--forget_list: a UTF-8 text file with one training index or class/file name per line."""

import pytest
import torch

import utils
from utils import Scenario

NAMES = [
    "ant/1.png",
    "ant/2 b.png",
    "bee/1.png",
    "bee/caf\u00e9.png",
    "bee/#3.png",
    "bee/sub/4.png",
]


def data_set(names=NAMES, count=6):
    def images(count, names=None):
        pixels = torch.zeros(count, 3, 1, 1, dtype=torch.uint8)
        return utils.Images(pixels, torch.arange(count) % 2, None, 1, names=names)

    return utils.Data(images(count, names), images(12), ["ant", "bee"], "test")


@pytest.fixture
def read(tmp_path):
    """The indices that a list with this content (text or bytes) selects."""

    def read(content, data=None):
        path = tmp_path / "request.txt"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return utils.read_forget_list(path, data or data_set()).tolist()

    return read


@pytest.mark.parametrize(
    ("content", "indices"),
    [
        ("2\n0\n", [2, 0]),
        ("ant/1.png\n", [0]),
        ("  bee/caf\u00e9.png  \n\n# a comment\n  # another\nbee/#3.png\n", [3, 4]),
        ("ant/2 b.png\r\nbee/sub/4.png", [1, 5]),
        (b"\xef\xbb\xbf5\n", [5]),
        ("#bee/1.png\n1\n", [1]),
        ("", []),
    ],
)
def test_indices_and_names_are_read_in_order_without_comments(content, indices, read):
    assert read(content) == indices


@pytest.mark.parametrize(
    ("content", "line", "entry"),
    [
        ("0\n6\n", 2, "6"),
        ("-1\n", 1, "-1"),
        ("# x\n\nant/9.png\n", 3, "ant/9.png"),
        ("1.png\n", 1, "1.png"),
        ("1, 2\n", 1, "1, 2"),
        ("1\nbee/1.png\n1\n", 3, "1"),
        ("ant/1.png\n1\n0\n", 3, "0"),
    ],
)
def test_unknown_or_doubled_entry_is_refused_with_its_line(content, line, entry, read):
    with pytest.raises(utils.UserError, match=f"--forget_list .*line {line}: {entry}"):
        read(content)


# ---------------------------------------------------------------- splits of lists


def split_of(path, content):
    path.write_text(content)
    return utils.make_split(data_set(), Scenario("list", forget_list=str(path)))


def test_list_forgetting_takes_exactly_the_listed_images(tmp_path):
    split = split_of(tmp_path / "request.txt", "# to delete\n5\n\n1\n")
    assert split.forget.tolist() == [1, 5] and split.retain.tolist() == [0, 2, 3, 4]
    again = split_of(tmp_path / "request.txt", "ant/2 b.png\nbee/sub/4.png\n")
    assert again.folder == split.folder and again.fingerprint == split.fingerprint
    assert split.folder.startswith("list_request_")
    assert split_of(tmp_path / "request.txt", "1\n").folder != split.folder


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"# none\n", "0 of 6"), (b"0\n1\n2\n3\n4\n5\n", "6 of 6"), (b"\xff\xfe1\0", "request.txt")],
)
def test_list_of_no_or_all_images_or_of_another_encoding_is_refused(content, words, tmp_path):
    path = tmp_path / "request.txt"
    path.write_bytes(content)
    with pytest.raises(utils.UserError, match=f"list.* {words}|{words}"):
        utils.make_split(data_set(), Scenario("list", forget_list=str(path)))
