"""Splits are pure functions of data set and scenario, and their image sets are disjoint."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import utils
from utils import Scenario

RANDOM = Scenario("random")
NOTHING = Scenario(None)


def labelled(train=40, held_out=120, *, classes=4, subclasses=None):
    """A data set without pixels: image i has class i % ``classes``, subclass i % ``subclasses``."""

    def images(count):
        fine = torch.arange(count) % subclasses if subclasses else None
        pixels = torch.empty(count, 0, dtype=torch.uint8)
        return utils.Images(pixels, torch.arange(count) % classes, None, 0, subclasses=fine)

    names = [f"class {number}" for number in range(classes)]
    fine_names = [f"fine {number}" for number in range(subclasses)] if subclasses else None
    return utils.Data(images(train), images(held_out), names, "labels", fine_names)


def held_out_parts(split):
    return [split.train_calibration, split.calibration, split.test, split.forget_test]


# ---------------------------------------------------------------- forget and retain set


def test_forget_set_ignores_the_global_random_state(digits):
    torch.manual_seed(0)
    first = utils.make_split(digits, RANDOM)
    torch.manual_seed(99)
    second = utils.make_split(digits, RANDOM)
    assert first.fingerprint == second.fingerprint
    assert first.forget.equal(second.forget) and first.test.equal(second.test)


def test_split_of_seed_1_is_pinned(digits):
    """Changing this number breaks every published result, because a seed defines its forget set."""
    assert utils.make_split(digits, RANDOM).fingerprint == "56d878fd8c3a6704"
    other = [Scenario("random", 0.5), Scenario("random", split_seed=2)]
    prints = {utils.make_split(digits, scenario).fingerprint for scenario in (RANDOM, *other)}
    assert len(prints) == 3


def test_random_forget_set_is_the_end_of_a_permutation():
    split = utils.make_split(labelled(41), Scenario("random", 0.7, split_seed=3))
    order = torch.from_numpy(utils.permutation(3, "forget", 41))
    assert split.forget.equal(order[29:].sort().values)
    assert split.retain.equal(order[:29].sort().values)
    assert split.folder == "random_0.7" and split.forget_classes == ()
    assert len(split.forget_test) == 0 and not split.is_forgotten.any()


def test_split_without_a_scenario_forgets_nothing():
    split = utils.make_split(labelled(8, 30, subclasses=8), NOTHING)
    assert split.retain.tolist() == list(range(8))
    assert len(split.forget) == len(split.forget_test) == 0 and not split.is_forgotten.any()
    assert split.folder == "" and split.forget_classes == ()


@given(
    train=st.integers(4, 60),
    held_out=st.integers(12, 80),
    seed=st.integers(0, 9),
    kind=st.sampled_from(["random", "class", "subclass"]),
)
def test_split_is_disjoint_and_complete(train, held_out, seed, kind):
    data = labelled(train, held_out, classes=2, subclasses=4)
    split = utils.make_split(data, Scenario(kind, 0.5, split_seed=seed))
    assert sorted([*split.retain.tolist(), *split.forget.tolist()]) == list(range(train))
    parts = [index for part in held_out_parts(split) for index in part.tolist()]
    assert len(parts) == len(set(parts))
    groups = data.held_out.subclasses if kind == "subclass" else data.held_out.labels
    left_out = set(range(held_out)) - set(parts)  # forgotten classes do not calibrate the training
    assert all(groups[index] in split.forget_classes for index in left_out)
    assert len(left_out) <= max(1, held_out // 10)


# ---------------------------------------------------------------- held-out images


@pytest.mark.parametrize(
    ("held_out", "expected"),
    [
        (12_000, (1000, 2000, 9000)),
        (10_000, (1000, 2000, 7000)),
        (9_990, (999, 1998, 6993)),
        (59, (5, 11, 43)),
        (9, (1, 1, 7)),
        (3, (1, 1, 1)),
    ],
)
def test_calibration_sets_are_a_fifth_and_a_tenth_up_to_a_limit(held_out, expected):
    data = labelled(8, held_out)
    split = utils.make_split(data, Scenario("random", 0.5))
    parts = [split.train_calibration, split.calibration, split.test]
    assert tuple(map(len, parts)) == expected and utils.default_cal_size(data) == expected[1]
    order = torch.from_numpy(utils.permutation(1, "held-out", held_out))
    assert torch.cat(parts).equal(order)


def test_training_calibration_for_any_cal_size_is_the_same():
    """Otherwise images used to train with q̂ would be scored as test images."""
    splits = [utils.make_split(labelled(), RANDOM, size) for size in (5, 20, 50)]
    trained_on = splits[0].train_calibration
    for split in splits:
        assert split.train_calibration.equal(trained_on)
        assert not set(trained_on.tolist()) & {*split.calibration.tolist(), *split.test.tolist()}
    assert splits[1].calibration[:5].equal(splits[0].calibration)


def test_calibration_size_leaves_at_least_one_test_image():
    data = labelled(8, 30)
    split = utils.make_split(data, Scenario("random", 0.5), 26)
    assert (len(split.train_calibration), len(split.calibration), len(split.test)) == (3, 26, 1)
    with pytest.raises(utils.UserError, match="--cal_sizes 27.* 30 "):
        utils.make_split(data, Scenario("random", 0.5), 27)
    with pytest.raises(utils.UserError, match="--cal_sizes 1.* 2 "):
        utils.make_split(labelled(8, 2), Scenario("random", 0.5))


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize(
    ("kind", "number", "seed"), [("class", 2, 1), ("class", 0, 5), ("subclass", 5, 1)]
)
def test_class_forgetting_excludes_its_held_out_images_from_test_set(kind, number, seed):
    data = labelled(subclasses=8)
    name = f"{'class' if kind == 'class' else 'fine'} {number}"
    split = utils.make_split(data, Scenario(kind, forget_class=name, split_seed=seed))
    train, held_out = (
        images.labels if kind == "class" else images.subclasses
        for images in (data.train, data.held_out)
    )
    assert split.forget.equal((train == number).nonzero().flatten())
    assert split.retain.equal((train != number).nonzero().flatten())
    order = torch.from_numpy(utils.permutation(seed, "held-out", 120))
    of_class = held_out[order] == number
    assert split.train_calibration.equal(order[:12][~of_class[:12]])
    assert split.calibration.equal(order[12:36]) and split.is_forgotten.equal(of_class[12:36])
    assert split.test.equal(order[36:][~of_class[36:]])
    assert split.forget_test.equal(order[36:][of_class[36:]])
    assert split.folder == f"{kind}_{number}" and split.forget_classes == (number,)


@pytest.mark.parametrize("kind", ["class", "subclass"])
def test_several_classes_are_forgotten_together(kind):
    data = labelled(subclasses=8)
    word = "class" if kind == "class" else "fine"
    split = utils.make_split(data, Scenario(kind, forget_class=f"3, {word} 1,3"))
    groups = data.train.labels if kind == "class" else data.train.subclasses
    chosen = torch.isin(groups, torch.tensor([1, 3]))
    assert split.forget.equal(chosen.nonzero().flatten())
    assert split.forget_classes == (1, 3) and split.folder == f"{kind}_1_3"
    assert f"{word} 1, {word} 3" in split.forget_name
    assert f"{chosen.sum()} of 40" in split.describe()


@pytest.mark.parametrize(("kind", "count"), [("class", 4), ("subclass", 8)])
def test_unnamed_class_is_drawn_from_the_split_seed(kind, count):
    data, seeds = labelled(subclasses=8), range(1, 40)
    drawn = [utils.make_split(data, Scenario(kind, split_seed=n)).forget_classes for n in seeds]
    assert set(drawn) == {(number,) for number in range(count)}
    permutations = [utils.permutation(seed, "forget class", count) for seed in seeds]
    assert drawn == [(order[0],) for order in permutations]


PADDED = [f"{number:02}" for number in range(1, 11)]
PETS = ["ant", "cat", "dog"]


@pytest.mark.parametrize(
    ("text", "classes", "numbers"),
    [
        ("cat", PETS, (1,)),
        ("1", PETS, (1,)),
        ("dog, cat", PETS, (1, 2)),
        ("2,dog,0", PETS, (0, 2)),
        ("cat,dog", ["cat", "cat,dog", "dog"], (1,)),
        ("cat,dog,cat", ["cat", "cat,dog", "dog"], (0, 2)),
        ("10,02", PADDED, (1, 9)),
        ("2", ["2", "5", "9"], (0,)),
    ],
)
def test_class_name_takes_precedence_over_class_number(text, classes, numbers):
    data = replace(labelled(200, classes=len(classes)), classes=classes)
    split = utils.make_split(data, Scenario("class", forget_class=text))
    assert split.forget_classes == numbers


@pytest.mark.parametrize(
    ("text", "classes"),
    [
        ("1", PADDED),
        ("1", ["0", "cat", "dog"]),
        ("Cat", PETS),
        ("3", PETS),
        ("-1", PETS),
        ("cat,", PETS),
        ("cat,dgo", PETS),
    ],
)
def test_unknown_or_ambiguous_class_is_refused(text, classes):
    """Where class names are numbers, a position would be another class."""
    data = replace(labelled(200, classes=len(classes)), classes=classes)
    with pytest.raises(utils.UserError, match=f"--forget_class {text}: "):
        utils.make_split(data, Scenario("class", forget_class=text))


# ---------------------------------------------------------------- scenarios


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        (Scenario("random", 0.99), "random .* 0 of 40"),
        (Scenario("random", 0.01), "random .* 40 of 40"),
        (Scenario("class", forget_list="a.txt"), "class --forget_list"),
        (Scenario("random", forget_class="0"), "--forget_class .* random"),
        (Scenario("list", forget_list="a.txt", forget_class="0"), "--forget_class .* list"),
        (Scenario("list"), "list --forget_list"),
        (Scenario("subclass"), "subclass: .*cifar20"),
    ],
)
def test_impossible_scenario_is_refused(scenario, words):
    with pytest.raises(utils.UserError, match=words):
        utils.make_split(labelled(), scenario)
