"""Splits are pure functions of data, seed and scenario, and their image sets are disjoint."""

from dataclasses import fields, replace

import pytest
import torch
from conftest import flags

import utils


def held_out_parts(split):
    return [
        indices.tolist()
        for indices in (split.train_calibration, split.calibration, split.test, split.forget_test)
    ]


def test_forget_set_ignores_the_global_random_state(digits):
    torch.manual_seed(0)
    first = utils.make_split(digits, flags())
    torch.manual_seed(99)
    torch.rand(7)
    second = utils.make_split(digits, flags())
    assert first.fingerprint == second.fingerprint
    assert first.forget.equal(second.forget) and first.test.equal(second.test)


def test_split_of_seed_1_is_pinned(digits):
    """Changing this number breaks every published result, because a seed defines its forget set."""
    assert utils.make_split(digits, flags()).fingerprint == "56d878fd8c3a6704"


def test_another_seed_or_ratio_forgets_other_images(digits):
    prints = {
        utils.make_split(digits, flags(seed=seed, retain_ratio=ratio)).fingerprint
        for seed in (1, 2)
        for ratio in (0.9, 0.5)
    }
    assert len(prints) == 4


@pytest.mark.parametrize("ratio", [0.9, 0.5, 0.29])
def test_retain_and_forget_divide_the_training_images(digits, ratio):
    split = utils.make_split(digits, flags(retain_ratio=ratio))
    assert len(split.retain) == round(797 * ratio)
    assert sorted([*split.retain.tolist(), *split.forget.tolist()]) == list(range(797))


@pytest.mark.parametrize("scenario", [{}, {"unlearn_type": "class", "forget_class": "3"}])
def test_held_out_sets_are_disjoint(digits, scenario):
    image_sets = held_out_parts(utils.make_split(digits, flags(**scenario), cal_size=200))
    together = [index for indices in image_sets for index in indices]
    assert len(together) == len(set(together)) and set(together) <= set(range(1000))


def test_training_calibration_for_any_cal_size_is_the_same(digits):
    """Otherwise images used to train with q̂ would be scored as test images."""
    splits = [utils.make_split(digits, flags(), cal_size=size) for size in (50, 200, 500)]
    trained_on = splits[0].train_calibration.tolist()
    assert all(split.train_calibration.tolist() == trained_on for split in splits)
    assert not any(
        set(trained_on) & {*split.calibration.tolist(), *split.test.tolist()} for split in splits
    )
    assert splits[1].calibration[:50].equal(splits[0].calibration)


def test_sizes_scale_with_the_held_out_images(digits):
    split = utils.make_split(digits, flags())
    assert [len(indices) for indices in held_out_parts(split)] == [100, 200, 700, 0]


def test_class_forgetting_takes_all_images_of_the_class(digits):
    split = utils.make_split(digits, flags(unlearn_type="class", forget_class="3"))
    assert split.folder == "class_3" and split.forget_classes == (3,)
    assert digits.train.labels[split.forget].eq(3).all()
    assert digits.train.labels[split.retain].ne(3).all()
    assert digits.held_out.labels[split.forget_test].eq(3).all() and len(split.forget_test)
    for indices in (split.test, split.train_calibration):
        assert digits.held_out.labels[indices].ne(3).all()
    drawn = {
        utils.make_split(digits, flags(unlearn_type="class", seed=seed)).forget_classes
        for seed in range(1, 9)
    }
    assert len(drawn) > 1


def test_list_forgetting_takes_exactly_the_listed_images(digits, tmp_path):
    path = tmp_path / "request.txt"
    path.write_text("# to delete\n5\n\n700\n 12 \n")
    split = utils.make_split(digits, flags(unlearn_type="list", forget_list=str(path)))
    assert split.forget.tolist() == [5, 12, 700] and split.folder.startswith("list_request_")
    path.write_text("12\n5\n700\n")
    assert (
        utils.make_split(digits, flags(unlearn_type="list", forget_list=str(path))).fingerprint
        == split.fingerprint
    )


def test_generators_of_other_purposes_are_independent():
    draws = {
        utils.generator(1, *purpose).initial_seed() for purpose in (("a", 1), ("a", 2), ("b", 1))
    }
    assert len(draws) == 3 and utils.generator(1, "a", 1).initial_seed() in draws


# ---------------------------------------------------------------- data sets of other sizes


def labelled(train, held_out, *, classes=4, subclasses=None):
    """A data set without pixels: image i has class i % ``classes``, subclass i % ``subclasses``."""

    def images(count):
        fine = torch.arange(count) % subclasses if subclasses else None
        return utils.Images(
            torch.empty(count, 0), torch.arange(count) % classes, None, 0, subclasses=fine
        )

    names = [f"class {number}" for number in range(classes)]
    fine_names = [f"fine {number}" for number in range(subclasses)] if subclasses else None
    return utils.Data(images(train), images(held_out), names, "labels", fine_names)


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
    split = utils.make_split(data, flags(retain_ratio=0.5))
    assert (
        tuple(len(indices) for indices in (split.train_calibration, split.calibration, split.test))
        == expected
    )
    assert utils.default_cal_size(data) == expected[1]
    order = torch.from_numpy(utils.permutation(1, "held-out", held_out))
    assert torch.cat([split.train_calibration, split.calibration, split.test]).equal(order)


def test_calibration_size_leaves_at_least_one_test_image():
    data = labelled(8, 30)
    split = utils.make_split(data, flags(retain_ratio=0.5), 26)
    assert (len(split.train_calibration), len(split.calibration), len(split.test)) == (3, 26, 1)
    with pytest.raises(
        utils.UserError,
        match="--cal_sizes 27: there are 30 held-out images, of which 3 .* at most 26",
    ):
        utils.make_split(data, flags(retain_ratio=0.5), 27)


def test_split_without_a_scenario_forgets_nothing():
    split = utils.make_split(labelled(8, 30), flags(unlearn_type="class"), scenario=False)
    assert split.retain.tolist() == list(range(8))
    assert len(split.forget) == len(split.forget_test) == 0
    assert split.folder == "" and split.forget_classes == () and not split.is_forgotten.any()
    fine = utils.make_split(
        labelled(8, 30, subclasses=8), flags(unlearn_type="subclass"), scenario=False
    )
    assert len(fine.test) == len(split.test) and len(fine.forget_test) == 0


@pytest.mark.parametrize("seed", [1, 2, 5])
@pytest.mark.parametrize(
    ("kind", "number"), [("class", 2), ("class", 0), ("subclass", 5), ("subclass", 0)]
)
def test_class_forgetting_excludes_its_held_out_images_from_test_set(kind, number, seed):
    data = labelled(40, 120, subclasses=8)
    name = f"{'class' if kind == 'class' else 'fine'} {number}"
    split = utils.make_split(data, flags(unlearn_type=kind, forget_class=name, seed=seed))
    groups = {
        key: images.labels if kind == "class" else images.subclasses
        for key, images in vars(data).items()
        if key in ("train", "held_out")
    }
    assert split.forget.equal((groups["train"] == number).nonzero().flatten())
    assert split.retain.equal((groups["train"] != number).nonzero().flatten())
    order = torch.from_numpy(utils.permutation(seed, "held-out", 120))
    of_class = groups["held_out"][order] == number
    assert split.train_calibration.equal(order[:12][~of_class[:12]])
    assert split.calibration.equal(order[12:36]) and split.is_forgotten.equal(of_class[12:36])
    assert split.test.equal(order[36:][~of_class[36:]])
    assert split.forget_test.equal(order[36:][of_class[36:]])
    assert split.folder == f"{kind}_{number}" and split.forget_classes == (number,)


@pytest.mark.parametrize("kind", ["class", "subclass"])
def test_several_classes_are_forgotten_together(kind):
    data = labelled(40, 120, subclasses=8)
    word = "class" if kind == "class" else "fine"
    split = utils.make_split(data, flags(unlearn_type=kind, forget_class=f"3, {word} 1,3"))
    train, held_out = (
        images.labels if kind == "class" else images.subclasses
        for images in (data.train, data.held_out)
    )
    is_chosen = (train == 1) | (train == 3)
    assert split.forget.equal(is_chosen.nonzero().flatten())
    assert split.retain.equal((~is_chosen).nonzero().flatten())
    assert split.forget_classes == (1, 3) and split.folder == f"{kind}_1_3"
    assert set(held_out[split.forget_test].tolist()) == {1, 3}
    for part in (split.test, split.train_calibration):
        assert not {1, 3} & set(held_out[part].tolist())
    assert split.is_forgotten.equal(torch.isin(held_out[split.calibration], torch.tensor([1, 3])))
    assert split.forget_name.startswith(f"{kind}es {word} 1, {word} 3")
    one = utils.make_split(data, flags(unlearn_type=kind, forget_class="1"))
    other = utils.make_split(data, flags(unlearn_type=kind, forget_class="1,3,1"))
    assert one.fingerprint != split.fingerprint == other.fingerprint


def test_folder_of_many_classes_has_a_short_name():
    data = labelled(400, 800, classes=100)

    def folder(numbers):
        chosen = ",".join(map(str, numbers))
        return utils.make_split(data, flags(unlearn_type="class", forget_class=chosen)).folder

    assert folder(range(8)) == "class_0_1_2_3_4_5_6_7"
    many = [folder(range(60)), folder(range(1, 61)), folder(reversed(range(60)))]
    assert many[0] == many[2] != many[1] and all(len(name) < 60 for name in many)
    assert all(name.startswith("class_60_classes_") for name in many)


def test_unnamed_class_is_drawn_from_the_seed_only():
    data = labelled(40, 120, subclasses=8)
    for kind, count in (("class", 4), ("subclass", 8)):
        drawn = [
            utils.make_split(data, flags(unlearn_type=kind, seed=seed)).forget_classes
            for seed in range(1, 40)
        ]
        assert set(drawn) == {(number,) for number in range(count)}
        assert drawn == [utils.permutation(seed, "forget class", count)[0] for seed in range(1, 40)]


@pytest.mark.parametrize("kind", ["random", "class", "subclass"])
def test_split_seed_replaces_seed_in_the_split_and_is_in_the_folder_name(kind):
    data, scenario = labelled(40, 120, subclasses=8), {"unlearn_type": kind}
    expected = utils.make_split(data, flags(seed=3, **scenario))
    for seed in (1, 2, 3):
        split = utils.make_split(data, flags(seed=seed, split_seed=3, **scenario))
        for field in fields(split):
            value, wanted = getattr(split, field.name), getattr(expected, field.name)
            if isinstance(value, torch.Tensor):
                assert value.equal(wanted), field.name
            elif field.name != "folder":
                assert value == wanted
        assert split.folder == expected.folder + ("" if seed == 3 else "_split3")
    assert utils.make_split(data, flags(seed=1, split_seed=3), scenario=False).folder == ""
    summary = utils.scenario_folder(flags(split_seed=3, seeds=[1, 2], **scenario), data)
    assert summary == f"{expected.folder}_split3"
    zero = utils.make_split(data, flags(seed=3, split_seed=0, **scenario))
    assert zero.folder.endswith("_split0") and not zero.test.equal(expected.test)


def test_random_forget_set_is_the_end_of_a_permutation():
    data = labelled(41, 120)
    split = utils.make_split(data, flags(retain_ratio=0.7, seed=3))
    order = torch.from_numpy(utils.permutation(3, "forget", 41))
    assert split.forget.equal(order[29:].sort().values)
    assert split.retain.equal(order[:29].sort().values)
    assert split.folder == "random_0.7" and split.forget_classes == ()
    assert len(split.forget_test) == 0
    assert not split.is_forgotten.any()
    assert len(split.is_forgotten) == 24


@pytest.mark.parametrize(
    ("scenario", "words"),
    [
        ({"retain_ratio": 1.0}, "--retain_ratio 1.0"),
        ({"retain_ratio": 0.0}, "--retain_ratio 0.0"),
        ({"retain_ratio": 0.99}, "0 of 40 training images would be forgotten"),
        ({"retain_ratio": 0.01}, "40 of 40 training images would be forgotten"),
        ({"forget_list": "a.txt"}, "--forget_list requires --unlearn_type list, not random"),
        (
            {"unlearn_type": "class", "forget_list": "a.txt"},
            "--forget_list requires --unlearn_type list, not class",
        ),
        (
            {"forget_class": "0"},
            "--forget_class requires --unlearn_type class or subclass, not random",
        ),
        ({"unlearn_type": "list", "forget_class": "0"}, "--forget_class requires .*, not list"),
        ({"unlearn_type": "list"}, "--forget_list FILE"),
        ({"unlearn_type": "subclass"}, "has no subclasses"),
        ({"unlearn_type": "class", "forget_class": "class 9"}, "--forget_class class 9"),
        ({"unlearn_type": "class", "forget_class": "4"}, "--forget_class 4"),
        ({"unlearn_type": "class", "forget_class": "-1"}, "--forget_class -1"),
    ],
)
def test_impossible_scenario_is_refused(scenario, words):
    with pytest.raises(utils.UserError, match=words):
        utils.make_split(labelled(40, 120), flags(**scenario))


@pytest.mark.parametrize(("ratio", "forgotten"), [(0.975, 1), (0.025, 39)])
def test_one_image_to_forget_or_to_retain_is_accepted(ratio, forgotten):
    split = utils.make_split(labelled(40, 120), flags(retain_ratio=ratio))
    assert (len(split.retain), len(split.forget)) == (40 - forgotten, forgotten)


def test_class_of_all_or_no_training_images_is_an_error():
    data = labelled(40, 120)
    data.train.labels = torch.ones(40, dtype=torch.int64)
    for number, count in ((1, 40), (2, 0)):
        with pytest.raises(utils.UserError, match=f"--unlearn_type class .*: {count} of 40"):
            utils.make_split(data, flags(unlearn_type="class", forget_class=f"class {number}"))


def test_folder_names_the_scenario_and_the_content_of_a_list(tmp_path):
    data, folders = labelled(40, 120, subclasses=8), []
    for name, text in (("a", "1\n2\n"), ("b", "2\n1\n"), ("a", "1\n3\n")):
        path = tmp_path / f"{name}.txt"
        path.write_text(text)
        folders.append(
            utils.make_split(data, flags(unlearn_type="list", forget_list=str(path))).folder
        )
    assert all(len(folder) == len("list_a_") + 8 for folder in folders)
    assert folders[0][:7] == "list_a_"
    assert folders[0][7:] == folders[1][7:] != folders[2][7:]
    assert (
        utils.scenario_folder(flags(unlearn_type="list", forget_list=str(path)), data) == folders[2]
    )
    assert utils.scenario_folder(flags(unlearn_type="class"), data) == "class"
    assert utils.scenario_folder(flags(unlearn_type="subclass"), data) == "subclass"
    assert (
        utils.scenario_folder(flags(unlearn_type="subclass", forget_class="fine 6"), data)
        == "subclass_6"
    )
    assert utils.scenario_folder(flags(retain_ratio=0.25), data) == "random_0.25"


@pytest.mark.parametrize("length", [100, 101, 150])
def test_folder_of_a_list_has_at_most_100_characters_of_its_name(length, tmp_path):
    path = tmp_path / f"{'n' * length}.txt"
    path.write_text("1\n2\n")
    split = utils.make_split(labelled(40, 120), flags(unlearn_type="list", forget_list=str(path)))
    assert split.folder[:-9] == "list_" + "n" * 100 and split.folder[-9] == "_"


def test_fingerprint_of_the_forget_set_ignores_its_order():
    split = utils.make_split(labelled(40, 120), flags(retain_ratio=0.7))
    shuffled = replace(split, forget=split.forget.flip(0))
    assert shuffled.fingerprint == split.fingerprint and len(split.fingerprint) == 16
    assert replace(split, forget=split.forget[1:]).fingerprint != split.fingerprint
