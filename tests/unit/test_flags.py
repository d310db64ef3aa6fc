"""Flags: values, paths, devices, labels, and the command that gives the same flags."""

import re
import sys
from argparse import ArgumentTypeError, Namespace
from itertools import pairwise

import pytest
from helpers import check, flags, run_in_process, training_parser
from hypothesis import given, settings
from hypothesis import strategies as st

import unlearn
import utils
from models.errors import UserError


@pytest.mark.parametrize(
    ("kind", "bounds", "accepted", "refused"),
    [
        (int, {"minimum": 1, "maximum": 3}, ["1", "3"], ["0", "4", "1.5", "x", ""]),
        (float, {"minimum": 0, "maximum": 1}, ["0", "1", "1e-3"], ["-1e-9", "1.01", "nan", "inf"]),
        (float, {"minimum": 0, "exclusive": True}, ["1e-9", "1e300"], ["0", "inf", "-1"]),
        (float, {}, ["-1e300", "0"], ["inf", "-inf", "nan"]),
    ],
)
def test_number_outside_its_bounds_is_refused(kind, bounds, accepted, refused):
    parse = utils.number(kind, **bounds)
    assert [parse(text) for text in accepted] == [kind(text) for text in accepted]
    for text in refused:
        with pytest.raises((ArgumentTypeError, ValueError)):
            parse(text)


SEEDS = [0, 2**32 - 1], f"-1 {2**32}"


@pytest.mark.parametrize(
    ("flag", "accepted", "refused"),
    [("width", [1, 512], "0 513"), ("image_size", [1, 4096], "0 4097"), ("num_classes", [2], "1")]
    + [("workers", [0, 1024], "-1 1025"), ("seeds", [[0], [1, 2]], "1,1 -1"), ("seed", *SEEDS)]
    + [("split_seed", *SEEDS), ("data_name", ["cifar10", "image_folder"], "mnist")]
    + [("wandb_mode", ["online", "offline", "disabled"], "on"), ("batch_size", [3], "2")]
    + [("unlearn_type", ["random", "class", "subclass", "list"], "all"), ("num_epochs", [1], "0")]
    + [("retain_ratio", [1e-9, 0.9], "0 1"), ("learning_rate", [1e-9], "0")]
    + [("milestones", [[1], [1, 2]], "0"), ("precision", ["auto", "fp32", "tf32", "bf16"], "fp16")]
    + [("jobs", [1, 1024], "0 1025"), ("save_every", [0.0, 0.5], "-1")],
)
def test_flag_has_bounds_or_choices(flag, accepted, refused):
    def parsed(text):
        args = training_parser().parse_args(["--unlearn_name=RL", f"--{flag}={text}"])
        return getattr(args, flag)

    for value in accepted:
        assert parsed(str(value).strip("[]")) == value
    for text in refused.split():
        with pytest.raises(UserError, match=f"--{flag}"):
            parsed(text)


@pytest.mark.parametrize("name", ["original_model", "unlearn", "unlearn_cpu", "evaluate"])
def test_help_describes_every_flag(name, tmp_path):
    lines = check(run_in_process(f"main_{name}.py", "--help", cwd=tmp_path)).stdout.splitlines()
    flags = [pair for pair in pairwise([*lines, ""]) if pair[0].startswith("  --")]
    assert len(flags) > 20
    for line, following in flags:  # beside the flag, or below it where the flag is long
        assert re.search(r"\S {2,}\S", line) or following.startswith(" " * 20), line
    text = " ".join(" ".join(lines).split())
    assert "training (default: 1)" in text and "(default: ./runs)" in text
    assert not re.search(r"\(default: (None|False)\)", text)


def test_list_is_split_at_commas_and_may_not_repeat_a_value():
    parse = utils.list_of(utils.number(int))
    assert parse("3,1, 2,") == [3, 1, 2]
    for text in ("", ",", "1,1", "1,x"):
        with pytest.raises((ArgumentTypeError, ValueError)):
            parse(text)


@pytest.mark.parametrize(
    ("items", "names"),
    [
        (["a"], ["a"]),
        (["b,a", "b"], ["b", "a"]),
        (["all"], ["a", "b", "cpu_c"]),
        (["c"], ["cpu_c"]),
    ],
)
def test_method_names_are_split_completed_and_not_repeated(items, names):
    assert unlearn.method_names(items, {"a": 1, "b": 2, "cpu_c": 3}, prefix="cpu_") == names


@pytest.mark.parametrize("items", [["d"], [","], ["a", "d"]])
def test_unknown_method_is_refused(items):
    with pytest.raises(UserError, match="--unlearn_name.*a, b"):
        unlearn.method_names(items, {"a": 1, "b": 2})


def test_each_seed_has_its_own_flags_and_split_seed():
    args = flags(seeds=[4, 5])
    assert [each.seed for each in utils.each_seed(args)] == [4, 5] and args.seed == 1
    assert [utils.split_seed(each) for each in utils.each_seed(args)] == [4, 5]
    assert [each.seed for each in utils.each_seed(flags(seed=7))] == [7]
    assert utils.split_seed(flags(seed=7, split_seed=0)) == 0


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize("device", ["cuda:99", "", "gpu"])
def test_missing_device_is_refused_in_one_short_line(device):
    with pytest.raises(UserError, match=f"--device {device}: ") as caught:
        utils.pick_device(Namespace(device=device))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 320


# ---------------------------------------------------------------- the command of a run

WORDS = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=6)
VALUES = {
    "--seed": st.integers(0, 2**32 - 1).map(str),
    "--split_seed": st.integers(0, 9).map(str),
    "--width": st.integers(1, 512).map(str),
    "--learning_rate": st.floats(1e-9, 1e9).map(repr),
    "--retain_ratio": st.floats(1e-9, 0.9).map(repr),
    "--milestones": st.lists(st.integers(1, 9), min_size=1, max_size=3, unique=True).map(
        lambda epochs: ",".join(map(str, epochs))
    ),
    "--save_every": st.sampled_from(["0", "0.5", "30"]),
    "--runs_dir": WORDS.filter(lambda text: text.strip() and not text.startswith("~")),
    "--forget_class": WORDS,
    "--jobs": st.integers(1, 4).map(str),
    "--seeds": st.sampled_from(["1,2", "3"]),
}
SWITCHES = st.sets(st.sampled_from(["--resume", "--overwrite", "--no_pretrained", "--dry_run"]))


@settings(derandomize=True, deadline=None, database=None, max_examples=200)
@given(
    values=st.fixed_dictionaries({}, optional=VALUES),
    switches=SWITCHES,
    names=st.lists(st.sampled_from(["RL", "GA", "salun"]), min_size=1, max_size=2),
)
def test_command_of_any_flags_is_parsed_to_the_same_flags(values, switches, names):
    parser = training_parser()
    texts = [f"{flag}={value}" for flag, value in values.items()]
    args = parser.parse_args([*texts, *sorted(switches), "--unlearn_name", *names])
    command = utils.command_line(parser, args, unlearn_name=[",".join(args.unlearn_name)])
    assert command[:2] == [sys.executable, sys.argv[0]]
    parsed = parser.parse_args(command[2:])
    one_run = {"seeds": None, "jobs": 1, "dry_run": False}
    one_run |= {"unlearn_name": [",".join(args.unlearn_name)]}
    assert vars(parsed) == vars(args) | one_run


def test_command_has_changed_flags_and_no_defaults():
    parser = training_parser()
    args = parser.parse_args(["--unlearn_name", "RL", "--seeds", "1,2", "--label", "x", "--resume"])
    changes = {"unlearn_name": "GA", "seed": 0, "label": None, "learning_rate": -1e-5, "jobs": 1}
    words = utils.command_line(parser, args, **changes)[2:]
    expected = ["--width=16", "--seed=0", "--unlearn_name=GA", "--learning_rate=-1e-05", "--resume"]
    assert words == expected


@pytest.mark.parametrize(
    ("flags", "width"),
    [([], 16), (["--data_name", "cifar10"], 64), (["--width", "8"], 8)],
)
def test_width_is_that_of_the_data_set_unless_it_is_passed(flags, width):
    assert training_parser().parse_args(["--unlearn_name", "all", *flags]).width == width
