"""--forget_list and --forget_class: clear names in any spelling are read; others are errors."""

import codecs
import json
import os
import pickle
import unicodedata

import numpy as np
import pytest
import torch
from conftest import flags
from hypothesis import given, settings
from hypothesis import strategies as st

import utils

NAMES = [
    "ant/1.png",
    "ant/12",
    "ant/a,b.png",
    "ant/deep/1.png",
    "bee/1.png",
    "bee/café.png",
    "bee/two words.png",
]


def make_data(names=NAMES, folder=None, count=None):
    """A data set whose training images have these file names (or none: ``count`` images)."""
    count = len(names or ()) or count
    classes = sorted({name.partition("/")[0] for name in names or ()} | {"x", "y"})
    labels = torch.tensor(
        [classes.index(name.partition("/")[0]) for name in names] if names else [0] * count
    )
    spec = utils.SPECS["image_folder"]
    train = utils.Images(torch.zeros(count, 3, 2, 2, dtype=torch.uint8), labels, spec, 2, names)
    held_out = utils.Images(
        torch.zeros(9, 3, 2, 2, dtype=torch.uint8), torch.arange(9) % 2, spec, 2
    )
    return utils.Data(
        train, held_out, classes, "image_folder-p", None, folder and os.fspath(folder)
    )


@pytest.fixture
def read(tmp_path):
    """A function that reads a list (text or bytes) against a data set."""

    def call(content, data=None, name="list.txt"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return utils.read_forget_list(path, data or make_data()).tolist()

    return call


@pytest.fixture
def refusal(read):
    """A function that returns the one-line error message that refuses a list."""

    def call(content, data=None, name="list.txt"):
        with pytest.raises(utils.UserError) as caught:
            read(content, data, name)
        message = str(caught.value)
        assert "\n" not in message and message.startswith("--forget_list ") and message.encode()
        return message

    return call


# ---------------------------------------------------------------- spellings of one name


@pytest.mark.parametrize(
    ("line", "index"),
    [
        ("ant/1.png", 0),
        ("  ant/1.png \t", 0),
        ("./ant/1.png", 0),
        (".//ant/./1.png", 0),
        ("bee/../ant/1.png", 0),
        ("train/ant/1.png", 0),
        ("./train/ant/1.png", 0),
        ("ant\\1.png", 0),
        (".\\train\\ant\\1.png", 0),
        ('"ant/1.png"', 0),
        ("'ant/1.png'", 0),
        ('"ant/1.png",', 0),
        ("ant/1.png,", 0),
        ("ant/1.png ;", 0),
        ("ant/12", 1),
        ("ant/a,b.png", 2),
        ('"ant/a,b.png"', 2),
        ("a,b.png", 2),
        ("ant/deep/1.png", 3),
        ("ant\\deep\\1.png", 3),
        ("bee/caf\u00e9.png", 5),
        ("bee/cafe\u0301.png", 5),
        ("train/bee/cafe\u0301.png", 5),
        ("bee/two words.png", 6),
        ("two words.png", 6),
        ("3", 3),
        ("003", 3),
        ('"3"', 3),
        ("0", 0),
    ],
)
def test_name_is_read_in_every_spelling(line, index, read):
    assert read(line + "\n") == [index]


def test_nfd_names_on_disk_match_nfc_and_exact_names_come_first(read):
    forms = [f"ant/{unicodedata.normalize(form, 'é')}.png" for form in ("NFC", "NFD")]
    assert read(forms[0], make_data(forms[1:] + ["bee/1.png"])) == [0]
    assert [read(form, make_data(forms)) for form in forms] == [[0], [1]]


def test_names_with_leading_and_trailing_blanks_are_matched(read):
    data = make_data(["ant/ 1.png ", " bee/1.png", "bee/2.png"])
    assert read("ant/ 1.png \n bee/1.png\n  bee/2.png  \n", data) == [0, 1, 2]


def test_name_with_odd_line_separators_is_read_as_one_line(read):
    data = make_data(["ant/a\u2028b.png", "ant/c\x85d.png"])
    assert read("ant/a\u2028b.png\nant/c\x85d.png\n", data) == [0, 1]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n", "\r\n\r\n"])
def test_every_line_end_is_read(end, read):
    assert read(end.join(["ant/1.png", "", "# a comment", "5", "bee/1.png"]) + end) == [0, 5, 4]


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-16-le", b""),
        ("utf-16-be", b""),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", codecs.BOM_UTF32_BE),
        ("cp1252", b""),
    ],
)
@pytest.mark.parametrize(
    "lines", ["bee/café.png\r\nant/1.png\r\n", "5\r\n0\r\n", "bee/café.png\n#x\n0"]
)
def test_every_encoding_is_read(encoding, mark, lines, read):
    assert read(mark + lines.encode(encoding)) == [5, 0]


def test_names_that_are_not_utf8_are_matched(read):
    data = make_data(
        [utils.printable(name) for name in ("caf\udce9/1.png", "ant/\udcfc.png", "ant/1.png")]
    )
    assert read(b"caf\xe9/1.png\nant/\xfc.png\nant/1.png\n", data) == [0, 1, 2]
    assert read("caf\\xe9/1.png\n", data) == [0]


# ---------------------------------------------------------------- paths


def test_paths_from_anywhere_are_matched_by_their_file(read, tmp_path, monkeypatch):
    folder = tmp_path / "data/pictures/train"
    names = ["ant/1.png", "bee/1.png", "bee/2.png"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    (tmp_path / "alias").symlink_to(tmp_path / "data")
    (tmp_path / "bee.png").symlink_to(folder / "bee/2.png")
    monkeypatch.chdir(tmp_path)
    for given_folder in (folder, "data/pictures/train", tmp_path / "alias/pictures/train"):
        data = make_data(names, given_folder)
        prefixes = [f"{folder}/", f"{tmp_path}/alias/pictures/train/", "data/pictures/train/"]
        prefixes += ["pictures/train/", "./data/pictures/train/", "alias/pictures/train/"]
        for prefix in prefixes:
            assert read(f"{prefix}bee/1.png", data) == [1], (given_folder, prefix)
        assert read(f"{tmp_path}/bee.png", data) == [2]


def test_path_outside_of_the_training_images_is_refused(refusal, tmp_path):
    (tmp_path / "pictures/train/ant").mkdir(parents=True)
    (tmp_path / "1.png").write_text("")
    data = make_data(NAMES, tmp_path / "pictures/train")
    for line in (f"{tmp_path}/1.png", "/somewhere/train/ant/1.png"):
        message = refusal(line, data)
        assert "line 1" in message and f"no such file in {tmp_path}/pictures/train" in message


def test_test_image_in_a_list_is_refused(refusal):
    assert "a test image: only training images can be forgotten" in refusal("test/ant/1.png")


# ---------------------------------------------------------------- ambiguous names


def test_file_name_in_two_classes_needs_its_class(refusal):
    message = refusal("1.png")
    assert "could mean ant/1.png or ant/deep/1.png or bee/1.png" in message
    assert "class/image.png" in message


def test_number_that_is_a_file_and_an_index_is_refused(refusal, read):
    names = [f"ant/{number}" for number in range(20, 0, -1)]
    message = refusal("12", make_data(names))
    assert "ant/12" in message and "training image number 12 (ant/8)" in message
    assert read("ant/12\n20\n", make_data(names)) == [8, 0]
    assert read("10\n", make_data(["ant/x"] * 10 + ["ant/10"])) == [10]


def test_path_in_a_class_named_train_is_matched_or_ambiguous(read, refusal):
    assert read("train/1.png", make_data(["ant/1.png", "train/1.png"])) == [1]
    assert read("train/train/1.png", make_data(["ant/1.png", "train/1.png"])) == [1]
    message = refusal("train/ant/1.png", make_data(["ant/1.png", "train/ant/1.png"]))
    assert "could mean ant/1.png or train/ant/1.png" in message


def test_class_that_begins_with_a_number_sign_is_matched(read, refusal):
    data = make_data(["#tag/1.png", "ant/1.png"])
    assert read("# a comment\n#tag/1.png\n#note/2\n#tag\n", data) == [0]
    assert read("#tag\\1.png\n", data) == [0]
    assert "line 2" in refusal("ant/1.png\n#tag/9.png\n", data)


# ---------------------------------------------------------------- tables and JSON


@pytest.mark.parametrize(
    "text",
    [
        "filename\nant/1.png\nbee/1.png\n",
        '"File_Name"\n"ant/1.png"\n"bee/1.png"\n',
        "ant/1.png,0\nbee/1.png,1\n",
        "ant/1.png;0\nbee/1.png;1\n",
        "ant/1.png\t0\nbee/1.png\t1\n",
        "file,label\nant/1.png,ant\nbee/1.png,bee\n",
        ",path,label\n0,ant/1.png,0\n1,bee/1.png,1\n",
        '"path","label"\r\n"train/ant/1.png","0"\r\n"train/bee/1.png","1"\r\n',
        "ant/1.png, 0,\nbee/1.png, 1,\n",
        '["ant/1.png", "bee/1.png"]',
        '\n [\n"ant/1.png",\n 4]\n',
        "[0, 4]",
        "index,label\n0,7\n4,8\n",
    ],
)
def test_tables_with_one_column_of_names_and_json_lists_are_read(text, read):
    assert read(text, name="list.csv") == [0, 4]


@pytest.mark.parametrize(
    "text", ["filename\nbee/1.png\n", "file,label\nbee/1.png,bee\n", "index,label\n4,1\n"]
)
def test_heading_above_a_single_image_is_skipped(text, read):
    assert read(text) == [4]


@pytest.mark.parametrize("text", ["x,ant/1.png\nbee/1.png,y,z\n", "x,y,ant/1.png\nx,bee/1.png\n"])
def test_rows_of_different_lengths_are_not_a_table(text, refusal):
    message = refusal(text)
    assert "line 1" in message and "no such file in train/" in message


def test_doubled_quotes_inside_quotes_are_one_quote(read):
    names = ['ant/a"b.png', "ant/a'b.png"]
    assert read("\"ant/a\"\"b.png\"\n'ant/a''b.png'\n", make_data(names)) == [0, 1]


def test_table_with_a_comma_in_a_file_name_is_read(read):
    assert read('0, "ant/a,b.png"\n1, bee/1.png\n') == [2, 4]
    assert read('path,label\n"ant/a,b.png",0\nbee/1.png,1\n') == [2, 4]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0,1\n2,3\n", ["line 1", "table of 2 columns"]),
        ("0,1,2", ["line 1", "several items in a line"]),
        ("0 1 2\n", ["line 1", "several numbers in a line; write one per line"]),
        ("a,b\nant/1.png,bee/1.png\n", ["table of 2 columns"]),
        ("label,number\nx,0\ny,1\n", ["table of 2 columns"]),
        ('{"forget": [1, 2]}', ["looks like JSON, but not a list"]),
        ("[1.5, 2]", ["looks like JSON, but not a list"]),
        ("[true]", ["looks like JSON, but not a list"]),
        ('[{"file": "ant/1.png"}]', ["looks like JSON, but not a list"]),
        ('{"file": "ant/1.png"}\n{"file": "bee/1.png"}\n', ["line 1", "JSON or Python"]),
        ("['ant/1.png']", ["line 1", "JSON or Python"]),
        ("heading\nant/1.png\n", ["line 1", "'heading'", "no such file in train/"]),
        ("ant/1.png\nant/9.png\n", ["line 2", "'ant/9.png'", "no such file in train/"]),
        ("ant/1.PNG\n", ["did you mean ant/1.png?"]),
        ("train\\Ant\\1.png\n", ["did you mean ant/1.png?"]),
        ("ant/1.png\n./ant/1.png\n", ["line 2", "the same image as line 1"]),
        ("ant/1.png\n\n# x\n0\n", ["line 4", "0 is the same image as line 1"]),
        ("[4, 4]", ["item 2", "the same image as item 1"]),
        ("7\n", ["there are 7 training images, numbered from 0"]),
        ("9" * 5000, ["there are 7 training images"]),
        ("-1\n", ["no such file"]),
        ("1.0\n", ["no such file"]),
        ('""\n', ["names nothing"]),
        (",\n", ["line 1"]),
        ("", ["names no image"]),
        ("\n # nothing \n\n", ["names no image"]),
        ("[]", ["line 1"]),
        (codecs.BOM_UTF8, ["names no image"]),
    ],
)
def test_unreadable_list_is_refused_with_line_and_reason(text, words, refusal):
    message = refusal(text)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (pickle.dumps([1, 2]), "a pickle"),
        (pickle.dumps([1, 2], protocol=2), "a pickle"),
        (b"PK\3\4rest", "a zip archive"),
        (b"\x93NUMPY\1\0", "a NumPy array"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b"\x89PNG\r\n", "a picture"),
        (b"\xff\xd8\xff\xe0", "a picture"),
        (b"%PDF-1.7", "a PDF"),
        (b"PAR1", "a Parquet table"),
        (b"text\0\0\0more\0text", "a binary file"),
        (bytes(range(256)), "a binary file"),
    ],
)
def test_binary_file_is_refused_with_its_kind(content, kind, refusal):
    message = refusal(content)
    assert f"looks like {kind}" in message and "text file" in message


def test_list_for_data_without_file_names_takes_indices_only(read, refusal):
    data = make_data(None, count=30)
    assert read("5\n 29 \n0\n", data) == [5, 29, 0]
    assert read("index\n5\n6\n", data) == [5, 6] and read("[5, 6]", data) == [5, 6]
    assert "not a training index (0 to 29)" in refusal("ant/1.png", data)
    assert "there are 30 training images" in refusal("30", data)
    assert "several" in refusal("5, 6, 7", data)


def test_list_that_cannot_be_opened_is_refused_in_one_line(tmp_path):
    for path, reason in [
        (tmp_path / "none.txt", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ]:
        with pytest.raises(utils.UserError, match=f"cannot be read \\({reason}"):
            utils.read_forget_list(path, make_data())


TOKENS = [*NAMES, "train/", "./", "\\", ",", "\n", "\r\n", '"', "#", "0", "1", "[", "]", " "]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.binary(max_size=40),
        st.text(max_size=20).map(str.encode),
        st.lists(st.sampled_from(TOKENS), max_size=6).map(lambda items: "".join(items).encode()),
    )
)
def test_random_bytes_are_a_list_or_refused_in_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(content)
    try:
        actual = utils.read_forget_list(path, make_data())
    except utils.UserError as error:
        assert "\n" not in str(error) and str(error).encode("utf-8")
    else:
        assert len(set(actual)) == len(actual) > 0 and set(actual) <= set(range(len(NAMES)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sets(st.sampled_from(range(len(NAMES))), min_size=1),
    st.booleans(),
    st.sampled_from(["utf-8-sig", "utf-16"]),
)
def test_random_selection_is_read_back(tmp_path_factory, chosen, as_json, encoding):
    names = [NAMES[index] for index in chosen]
    path = tmp_path_factory.getbasetemp() / "chosen.txt"
    path.write_text(json.dumps(names) if as_json else "\n".join(names), encoding=encoding)
    assert set(utils.read_forget_list(path, make_data())) == chosen


def test_folder_of_a_list_has_a_portable_name(tmp_path):
    for stem in ("x" * 240, "caf\udce9"):
        path = tmp_path / f"{stem}.txt"
        path.write_text("3\n")
        args = flags(data_name="image_folder", unlearn_type="list", forget_list=str(path))
        folder = utils.make_split(make_data(), args).folder
        assert len(folder) < 130 and folder.encode() and "\\" not in folder


# ---------------------------------------------------------------- --forget_class


def class_number(text, classes):
    (number,) = utils._class_numbers(flags(forget_class=text), classes)
    return number


PADDED = [f"{number:02}" for number in range(1, 11)]


@pytest.mark.parametrize(
    ("text", "classes", "number"),
    [
        ("cat", ["ant", "cat"], 1),
        ("1", ["ant", "cat"], 1),
        ("01", PADDED, 0),
        ("10", PADDED, 9),
        ("5", ["2", "5", "9"], 1),
        ("2", ["2", "5", "9"], 0),
        ("9", ["2", "5", "9"], 2),
        ("3", list("0123456789"), 3),
        ("1", list("123456789"), 0),
        ("cafe\u0301", ["ant", "caf\u00e9"], 1),
        ("caf\u00e9", ["ant", "cafe\u0301"], 1),
        (" cat ", ["ant", "cat"], 1),
        ("caf\udce9", ["ant", "caf\\xe9"], 1),
    ],
)
def test_class_name_takes_precedence_over_class_number(text, classes, number):
    assert class_number(text, classes) == number


@pytest.mark.parametrize(
    ("text", "classes", "numbers"),
    [
        ("cat,dog", ["ant", "cat", "dog"], (1, 2)),
        ("dog, cat", ["ant", "cat", "dog"], (1, 2)),
        ("2,0,2", ["ant", "cat", "dog"], (0, 2)),
        ("dog,0", ["ant", "cat", "dog"], (0, 2)),
        ("cat,dog", ["cat", "cat,dog", "dog"], (1,)),
        ("cat,dog,cat", ["cat", "cat,dog", "dog"], (0, 2)),
        ("10,02", PADDED, (1, 9)),
    ],
)
def test_several_classes_are_separated_by_commas(text, classes, numbers):
    assert utils._class_numbers(flags(forget_class=text), classes) == numbers


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat,", ["--forget_class cat,", "a name is missing"]),
        (",", ["a name is missing"]),
        ("cat, ,dog", ["a name is missing"]),
        ("cat,dgo", ["--forget_class dgo", "not one of ant, cat, dog"]),
        ("Cat,Dog", ["--forget_class Cat", "did you mean 'cat'?"]),
        ("Cat,", ["a name is missing"]),
    ],
)
def test_unknown_or_missing_name_among_several_classes_is_an_error(text, words):
    with pytest.raises(utils.UserError) as error:
        utils._class_numbers(flags(forget_class=text), ["ant", "cat", "dog"])
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    ("text", "classes", "words"),
    [
        ("1", PADDED, ["could mean class 01", "class 02, which is number 1"]),
        ("10", [f"{number:03}" for number in range(1, 21)], ["class 010", "class 011"]),
        ("1", ["2", "5", "9"], ["class 5, which is number 1 of 2, 5, 9"]),
        ("1", ["0", "cat", "dog"], ["class cat, which is number 1"]),
        ("007", ["7", "8"], ["could mean class 7"]),
        ("3", ["2", "5", "9"], ["not one of 2, 5, 9"]),
        ("40", ["2", "5", "9"], ["not one of 2, 5, 9"]),
        ("Cat", ["ant", "cat"], ["did you mean 'cat'?"]),
        ("2", ["ant", "cat"], ["not one of ant, cat", "number below 2"]),
        ("-1", ["ant", "cat"], ["not one of"]),
        ("\u00b2", ["ant", "cat", "dog"], ["not one of"]),
        ("", ["ant", "cat"], ["not one of"]),
    ],
)
def test_unknown_or_ambiguous_class_is_refused(text, classes, words):
    with pytest.raises(utils.UserError) as caught:
        class_number(text, classes)
    message = str(caught.value)
    assert message.startswith(f"--forget_class {text}"), message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("scenario", "start"),
    [
        (
            {"unlearn_type": "class", "forget_class": "bee"},
            "class bee: 3 of 7 training images (class_1, ",
        ),
        ({"unlearn_type": "class", "seed": 1}, "class "),
        (
            {"unlearn_type": "random", "retain_ratio": 0.5},
            "a random share drawn from seed 1: 3 of 7 training images (",
        ),
    ],
)
def test_forget_set_is_described_by_name_and_count(scenario, start):
    names = [name for name in NAMES if name != "ant/12"] + ["ant/12"]
    data = make_data(names)
    data.classes = ["ant", "bee", "x", "y"]
    data.train.labels = torch.tensor([0 if name.startswith("ant") else 1 for name in names])
    if scenario.get("seed"):
        drawn = int(utils.permutation(1, "forget class", 4)[0])
        data.train.labels = (data.train.labels + drawn) % 4
        start += f"{data.classes[drawn]} (drawn from seed 1): 4 of 7"
    description = utils.make_split(
        data, flags(data_name="image_folder", **scenario), cal_size=1
    ).describe()
    assert description.startswith(start), description


def test_subclass_is_described_with_its_class():
    data = make_data(None, count=6)
    data.classes, data.subclass_names = ["insect", "bird"], ["ant", "bee", "owl"]
    data.train.labels = torch.tensor([0, 0, 0, 0, 1, 1])
    data.train.subclasses = torch.tensor([0, 1, 0, 1, 2, 2])
    data.held_out.subclasses = torch.arange(9) % 3
    args = flags(data_name="cifar20", unlearn_type="subclass", forget_class="bee")
    description = utils.make_split(data, args).describe()
    assert description.startswith(
        "subclass bee of class insect: 2 of 6 training images (subclass_1, "
    )


# ---------------------------------------------------------------- few held-out images


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_held_out_images_are_refused_in_one_line(count):
    data = make_data()
    data.held_out.pixels, data.held_out.labels = (
        data.held_out.pixels[:count],
        data.held_out.labels[:count],
    )
    with pytest.raises(utils.UserError, match=f"{count} held-out images; at least 3 are needed"):
        utils.make_split(data, flags(data_name="image_folder", retain_ratio=0.5))


@pytest.mark.parametrize("count", range(3, 10))
def test_every_held_out_set_gets_one_of_few_images(count):
    data = make_data()
    data.held_out.pixels, data.held_out.labels = (
        data.held_out.pixels[:count],
        data.held_out.labels[:count],
    )
    split = utils.make_split(data, flags(data_name="image_folder", retain_ratio=0.5))
    sizes = [len(split.train_calibration), len(split.calibration), len(split.test)]
    assert min(sizes) >= 1 and sum(sizes) == count


def test_class_forgetting_without_retained_test_images_is_refused():
    data = make_data()
    data.held_out.labels = torch.zeros(9, dtype=torch.int64)
    args = flags(data_name="image_folder", unlearn_type="class", forget_class=data.classes[0])
    with pytest.raises(utils.UserError, match="none of the 7 test images is of a retained class"):
        utils.make_split(data, args)


def test_unlearning_everything_or_nothing_names_the_count():
    args = flags(data_name="image_folder", unlearn_type="class", forget_class="x")
    with pytest.raises(
        utils.UserError, match=r"\(class x\): 0 of 7 training images would be forgotten"
    ):
        utils.make_split(make_data(), args)


def test_split_does_not_depend_on_the_spelling_of_the_list(tmp_path):
    prints = set()
    for number, text in enumerate(
        ["bee/1.png\nant/1.png\n", "[4, 0]", "file,x\ntrain/ant/1.png,0\nbee\\1.png,1\n"]
    ):
        path = tmp_path / f"{number}.txt"
        path.write_text(text)
        args = flags(data_name="image_folder", unlearn_type="list", forget_list=str(path))
        split = utils.make_split(make_data(), args)
        assert np.array_equal(split.forget, [0, 4])
        prints.add(split.fingerprint)
    assert len(prints) == 1
