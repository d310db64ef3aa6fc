"""The hyper-parameters of a run: flags, else the method's defaults, else the original's recipe."""

import argparse
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small import arguments

import unlearn
import unlearn_cpu
import utils

CPU = torch.device("cpu")
ORIGINAL = {"num_epochs": 33, "learning_rate": 0.07, "batch_size": 17, "milestones": [9, 21]}


def recipe(name, *given, original=None, **options):
    return unlearn.method_recipe(
        unlearn.METHODS[name],
        arguments(*given, **options),
        {"recipe": ORIGINAL} if original is None else original,
        CPU,
    )


# ---------------------------------------------------------------- recipes


def test_retrain_takes_the_originals_recipe():
    assert recipe("retrain") == unlearn.Recipe(33, 0.07, 17, [9, 21], 0.9, 5e-4, "fp32")


def test_finetune_takes_the_originals_rate_for_its_own_epochs():
    assert recipe("finetune") == unlearn.Recipe(20, 0.07, 64, None, 0.9, 5e-4, "fp32")


def test_other_methods_take_their_own_defaults():
    assert recipe("salun") == unlearn.Recipe(10, 0.013, 64, None, 0.9, 5e-4, "fp32")
    assert recipe("GA") == unlearn.Recipe(50, 3e-4, 64, None, 0.9, 5e-4, "fp32")
    assert recipe("ssd") is None and recipe("FisherForgetting") is None


FLAGS = ["--num_epochs", 3, "--learning_rate", 0.5, "--batch_size", 5, "--milestones", "1,2"]


@pytest.mark.parametrize("name", ["retrain", "finetune", "salun"])
def test_flags_come_before_every_default(name):
    given = [*FLAGS, "--precision", "bf16"]
    assert recipe(name, *given) == unlearn.Recipe(3, 0.5, 5, [1, 2], 0.9, 5e-4, "bf16")
    assert recipe(name, *given, original={}) == recipe(name, *given)


def test_a_method_of_another_momentum_trains_with_it():
    entry = replace(unlearn.METHODS["salun"], momentum=0.3)
    assert unlearn.method_recipe(entry, arguments(), {}, CPU).momentum == 0.3


@pytest.mark.parametrize(
    ("model", "data", "expected"),
    [
        ("resnet18", "cifar10", (200, 0.1)),
        ("resnet18", "digits", (20, 0.01)),
        ("vit", "cifar10", (20, 0.01)),
        ("vit", "digits", (20, 0.01)),
        ("resnet50", "cifar100", (20, 0.01)),
    ],
)
def test_an_original_without_flags_takes_the_data_sets_recipe(model, data, expected, monkeypatch):
    few = replace(utils.SPECS["digits"], num_epochs=7)
    args = arguments("--model_name", model, data=data)
    found = unlearn.original_recipe(args, CPU)
    assert (found.num_epochs, found.learning_rate) == expected
    assert found == unlearn.Recipe(*expected, 64, None, 0.9, 5e-4, "fp32")
    monkeypatch.setitem(utils.SPECS, data, few)
    assert unlearn.original_recipe(args, CPU).num_epochs == 7
    # What a checkpoint without a record was trained with is taken to be the same.
    assert unlearn.method_recipe(
        unlearn.METHODS["retrain"], args, {}, CPU
    ) == unlearn.original_recipe(args, CPU)


def test_an_original_takes_its_flags():
    given = [*FLAGS, "--precision", "tf32"]
    assert unlearn.original_recipe(arguments(*given), CPU) == unlearn.Recipe(
        3, 0.5, 5, [1, 2], 0.9, 5e-4, "tf32"
    )


def test_transformers_alone_have_their_own_defaults():
    entry = unlearn.METHODS["ssd"]
    assert unlearn.method_options(entry, arguments()) == {
        "selection_weighting": 8.0,
        "dampening_constant": 1.0,
    }
    vit = unlearn.method_options(entry, arguments("--model_name", "vit"))
    assert vit == {"selection_weighting": 4.0, "dampening_constant": 1.0}
    asked = arguments(
        "--model_name", "vit", "--selection_weighting", 0, "--dampening_constant", 0.5
    )
    assert unlearn.method_options(entry, asked) == {
        "selection_weighting": 0.0,
        "dampening_constant": 0.5,
    }
    convolutional = unlearn.method_options(entry, arguments("--model_name", "resnet50"))
    assert convolutional == unlearn.method_options(entry, arguments())
    slower = replace(unlearn.METHODS["salun"], transformer={"learning_rate": 0.002})
    assert (
        unlearn.method_recipe(slower, arguments("--model_name", "vit"), {}, CPU).learning_rate
        == 0.002
    )
    assert unlearn.method_recipe(slower, arguments(), {}, CPU).learning_rate == 0.013


def test_options_are_the_methods_own_alone():
    args = arguments("--kd_T", 3, "--beta", 0)
    assert unlearn.method_options(unlearn.METHODS["teacher"], args) == {"kd_T": 3.0}
    assert unlearn.method_options(unlearn.METHODS["scrub"], args) == {
        "msteps": 2,
        "kd_T": 3.0,
        "beta": 0,
        "gamma": 0.99,
    }
    assert unlearn.method_options(unlearn.METHODS["finetune"], args) == {}
    assert unlearn.method_options(
        unlearn.METHODS["GA"], SimpleNamespace(model_name="resnet18")
    ) == {"stop_accuracy": None}


# ---------------------------------------------------------------- help and flags


def test_help_lists_methods_with_their_defaults():
    lines = unlearn.describe_methods(unlearn.METHODS).splitlines()
    assert lines[0] == "methods and their defaults:" and [
        line.split()[0] for line in lines[1:]
    ] == [*unlearn.METHODS]
    texts = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[1:]}
    assert texts["retrain"] == (
        "epochs: as for the original model, learning rate: as for the original model"
    )
    assert texts["finetune"] == "epochs: 20, learning rate: as for the original model"
    assert texts["salun"] == "epochs: 10, learning rate: 0.013, mask_ratio: 0.5"
    assert texts["GA"] == "epochs: 50, learning rate: 0.0003"
    assert texts["ssd"] == (
        "no training, selection_weighting: 8.0 (transformers: 4.0), dampening_constant: 1.0"
    )
    variants = unlearn.describe_methods(unlearn_cpu.METHODS).splitlines()[1:]
    assert [line.split()[0] for line in variants] == [*unlearn_cpu.METHODS]
    assert variants[0].split(maxsplit=1)[1] == texts["retrain"]


def test_help_of_an_option_names_the_methods_that_have_it():
    parser = argparse.ArgumentParser()
    unlearn.add_option_flags(parser, unlearn.METHODS)
    said = " ".join(parser.format_help().split())
    assert "--kd_T KD_T teacher, scrub: temperature of the distillation" in said
    assert "--noise NOISE FisherForgetting: scale of the variance of the noise" in said


def test_only_the_options_of_the_methods_at_hand_are_flags():
    assert arguments("--kd_T", 2).kd_T == 2 and arguments("--ascent_every", 3).ascent_every == 3
    assert not hasattr(arguments(methods=unlearn_cpu.METHODS), "noise")
    assert arguments("--kd_T", 2, methods=unlearn_cpu.METHODS).kd_T == 2
    with pytest.raises(utils.UserError, match="unrecognized arguments: --noise"):
        arguments("--noise", 1, methods=unlearn_cpu.METHODS)
    assert {option for entry in unlearn.METHODS.values() for option in entry.options} == {
        *unlearn.OPTIONS
    }


@pytest.mark.parametrize(
    ("flag", "low", "high"),
    [
        ("stop_accuracy", -0.1, 1.1),
        ("kd_T", 0, None),
        ("msteps", -1, None),
        ("mask_ratio", -0.1, 1.5),
    ]
    + [
        (flag, -1, None)
        for flag in ("forget_weight", "beta", "gamma", "noise", "ascent", "adaptivity")
    ]
    + [("ascent_every", 0, None), ("max_norm", 0, None), ("saliency_threshold", -1, None)],
)
def test_options_out_of_bounds_are_refused(flag, low, high):
    for value in (low, high) if high else (low,):
        with pytest.raises(utils.UserError, match=f"--{flag}"):
            arguments(f"--{flag}", value)


def check(names, *given):
    unlearn.check_flags(arguments(*given), {name: unlearn.METHODS[name] for name in names})


def test_one_rate_for_several_methods_is_refused():
    check(["salun"], "--learning_rate", 0.1)
    check(["salun", "RL"])
    with pytest.raises(utils.UserError, match="--learning_rate with several methods"):
        check(["salun", "RL"], "--learning_rate", 0.1)


@pytest.mark.parametrize(
    "given", [("num_epochs", 3), ("learning_rate", 0.1), ("batch_size", 9), ("milestones", "1,2")]
)
def test_training_flags_for_methods_without_training_are_refused(given):
    flag, value = given
    with pytest.raises(utils.UserError, match=f"--{flag} does not apply to ssd .no training"):
        check(["ssd"], f"--{flag}", value)
    check(["ssd"])
    if flag != "learning_rate":
        check(["ssd", "finetune"], f"--{flag}", value)
        with pytest.raises(
            utils.UserError, match=f"--{flag} does not apply to ssd, FisherForgetting .no"
        ):
            check(["ssd", "FisherForgetting"], f"--{flag}", value)


def test_an_option_that_no_chosen_method_has_is_refused():
    check(["scrub", "salun"], "--kd_T", 2, "--mask_ratio", 0.1)
    with pytest.raises(
        utils.UserError, match="--kd_T applies to teacher, scrub and not to salun, RL;"
    ):
        check(["salun", "RL"], "--kd_T", 2)
    with pytest.raises(utils.UserError, match="--beta applies to scrub and not to salun"):
        check(["salun"], "--beta", 0)


def test_a_method_without_training_has_no_conformal_variant():
    def nothing(job):
        """A method for this test."""

    for trained, extensible, expected in [
        (True, True, True),
        (False, True, False),
        (True, False, False),
    ]:
        unlearn.method(trained=trained, extensible=extensible, weight=0.3)(nothing)
        entry = unlearn.METHODS.pop("nothing")
        assert entry == unlearn.Method(
            name="nothing",
            run=nothing,
            num_epochs=None,
            learning_rate=None,
            momentum=0.9,
            options={"weight": 0.3},
            transformer={},
            trained=trained,
            extensible=expected,
        )
    assert unlearn.method()(nothing) is nothing and unlearn.METHODS.pop("nothing").extensible
