"""Splits are pure functions of data, seed and scenario; their parts never overlap."""

import pytest
import torch
from conftest import flags

import utils


def held_out_parts(split):
    return [part.tolist() for part in (split.train_calibration, split.calibration, split.test, split.forget_test)]


def test_the_forget_set_ignores_the_global_random_state(digits):
    torch.manual_seed(0)
    first = utils.make_split(digits, flags())
    torch.manual_seed(99)
    torch.rand(7)
    second = utils.make_split(digits, flags())
    assert first.fingerprint == second.fingerprint
    assert first.forget.equal(second.forget) and first.test.equal(second.test)


def test_the_split_of_seed_1_is_pinned(digits):
    """A change of this number breaks every published result: the forget set is what a seed promises."""
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
def test_held_out_parts_are_disjoint(digits, scenario):
    parts = held_out_parts(utils.make_split(digits, flags(**scenario), cal_size=200))
    together = [index for part in parts for index in part]
    assert len(together) == len(set(together)) and set(together) <= set(range(1000))


def test_training_calibration_does_not_depend_on_the_evaluation(digits):
    """Else images that q̂ was trained on would be scored as test images."""
    splits = [utils.make_split(digits, flags(), cal_size=size) for size in (50, 200, 500)]
    trained_on = splits[0].train_calibration.tolist()
    assert all(split.train_calibration.tolist() == trained_on for split in splits)
    assert not any(set(trained_on) & {*split.calibration.tolist(), *split.test.tolist()} for split in splits)
    assert splits[1].calibration[:50].equal(splits[0].calibration)


def test_sizes_scale_with_the_held_out_images(digits):
    split = utils.make_split(digits, flags())
    assert [len(part) for part in held_out_parts(split)] == [100, 200, 700, 0]


def test_class_forgetting(digits):
    split = utils.make_split(digits, flags(unlearn_type="class", forget_class="3"))
    assert split.folder == "class_3" and split.forget_class == 3
    assert digits.train.labels[split.forget].eq(3).all() and digits.train.labels[split.retain].ne(3).all()
    assert digits.held_out.labels[split.forget_test].eq(3).all() and len(split.forget_test)
    for part in (split.test, split.train_calibration):
        assert digits.held_out.labels[part].ne(3).all()
    drawn = {utils.make_split(digits, flags(unlearn_type="class", seed=seed)).forget_class for seed in range(1, 9)}
    assert len(drawn) > 1


def test_list_forgetting_takes_exactly_the_named_images(digits, tmp_path):
    path = tmp_path / "request.txt"
    path.write_text("# to delete\n5\n\n700\n 12 \n")
    split = utils.make_split(digits, flags(unlearn_type="list", forget_list=str(path)))
    assert split.forget.tolist() == [5, 12, 700] and split.folder.startswith("list_request_")
    path.write_text("12\n5\n700\n")
    assert utils.make_split(digits, flags(unlearn_type="list", forget_list=str(path))).fingerprint == split.fingerprint


def test_derived_generators_are_independent():
    draws = {utils.generator(1, *purpose).initial_seed() for purpose in (("a", 1), ("a", 2), ("b", 1))}
    assert len(draws) == 3 and utils.generator(1, "a", 1).initial_seed() in draws
