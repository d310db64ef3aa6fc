"""--forget_list: a UTF-8 text file with one training index or class/file name per line."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

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


@given(st.lists(st.integers(0, 5), unique=True), st.data())
def test_any_mixture_of_names_and_indices_is_read(tmp_path_factory, chosen, draw):
    path = tmp_path_factory.mktemp("list") / "request.txt"
    lines = [draw.draw(st.sampled_from([str(index), NAMES[index]])) for index in chosen]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert utils.read_forget_list(path, data_set()).tolist() == chosen


@pytest.mark.parametrize(
    ("content", "line", "entry"),
    [
        ("0\n6\n", 2, "6"),
        ("-1\n", 1, "-1"),
        ("# x\n\nant/9.png\n", 3, "ant/9.png"),
        ("Ant/1.png\n", 1, "Ant/1.png"),
        ("1.png\n", 1, "1.png"),
        ("train/ant/1.png\n", 1, "train/ant/1.png"),
        ("1, 2\n", 1, "1, 2"),
        ("1 # one\n", 1, "1 # one"),
        ("1\nbee/1.png\n1\n", 3, "1"),
        ("ant/1.png\n1\n0\n", 3, "0"),
        ("cafe\u0301/1.png\n", 1, "cafe"),
    ],
)
def test_unknown_or_doubled_entry_is_refused_with_its_line(content, line, entry, read):
    with pytest.raises(utils.UserError, match=f"--forget_list .*line {line}: {entry}"):
        read(content)


def test_list_for_data_without_file_names_takes_indices_only(read):
    unnamed = data_set(names=None)
    assert read("3\n", unnamed) == [3]
    with pytest.raises(utils.UserError, match="line 1: ant/1.png"):
        read("ant/1.png\n", unnamed)


@pytest.mark.parametrize("content", [b"\xff\xfe1\x00\n\x00", b"caf\xe9/1.png\n"])
def test_list_that_is_not_utf8_is_refused(content, read):
    with pytest.raises(utils.UserError, match=r"--forget_list .*request\.txt"):
        read(content)


def test_list_that_cannot_be_opened_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.txt"):
        with pytest.raises(utils.UserError, match=f"--forget_list {path}"):
            utils.read_forget_list(path, data_set())


# ---------------------------------------------------------------- splits of lists


def split_of(path, content):
    path.write_text(content)
    return utils.make_split(data_set(), Scenario("list", forget_list=str(path)))


def test_list_forgetting_takes_exactly_the_listed_images(tmp_path):
    split = split_of(tmp_path / "request.txt", "# to delete\n5\n\n1\n")
    assert split.forget.tolist() == [1, 5] and split.retain.tolist() == [0, 2, 3, 4]
    again = split_of(tmp_path / "request.txt", "ant/2 b.png\nbee/sub/4.png\n")
    assert again.folder == split.folder and again.fingerprint == split.fingerprint


def test_folder_names_the_list_and_its_content(tmp_path):
    first, reordered, other = (
        split_of(tmp_path / f"{name}.txt", text).folder
        for name, text in (("a", "1\n2\n"), ("b", "2\n1\n"), ("a", "1\n3\n"))
    )
    assert first[:7] == "list_a_" and len(first) == 7 + 8
    assert first[7:] == reordered[7:] != other[7:]
    long = split_of(tmp_path / f"{'n' * 150}.txt", "1\n").folder
    assert long[:-9] == "list_" + "n" * 100 and long[-9] == "_"
    assert "\\" not in split_of(tmp_path / "a\\b.txt", "1\n").folder


@pytest.mark.parametrize(("content", "count"), [("# none\n", 0), ("0\n1\n2\n3\n4\n5\n", 6)])
def test_list_of_no_or_all_images_is_refused(content, count, tmp_path):
    with pytest.raises(utils.UserError, match=f"--unlearn_type list .*: {count} of 6"):
        split_of(tmp_path / "request.txt", content)
