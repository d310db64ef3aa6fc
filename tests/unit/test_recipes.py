"""Hyperparameters of a run come from flags, the method's defaults, or the original's recipe."""

import argparse
from dataclasses import replace

import pytest
import torch
from small import arguments

import unlearn
import unlearn_cpu
import utils

CPU = torch.device("cpu")
ORIGINAL = {"num_epochs": 33, "learning_rate": 0.07, "batch_size": 17, "milestones": [9, 21]}


def recipe(name, *flags, original=None, **options):
    return unlearn.method_recipe(
        unlearn.METHODS[name],
        arguments(*flags, **options),
        {"recipe": ORIGINAL} if original is None else original,
        CPU,
    )


# ---------------------------------------------------------------- recipes


def test_retrain_without_flags_uses_recipe_of_original():
    assert recipe("retrain") == unlearn.Recipe(33, 0.07, 17, [9, 21], 0.9, 5e-4, "fp32")


def test_finetune_without_flags_uses_learning_rate_of_original():
    assert recipe("finetune") == unlearn.Recipe(20, 0.07, 64, None, 0.9, 5e-4, "fp32")


def test_finetune_of_a_network_trained_from_scratch_on_digits_has_its_own_learning_rate():
    def rate(*flags):
        return recipe("finetune", *flags, data="digits").learning_rate

    assert rate() == 0.02
    assert rate("--learning_rate", 0.3) == 0.3
    assert rate("--recipe", "authors") == 0.01
    assert rate("--model_name", "resnet50") == 0.07
    assert recipe("retrain", data="digits").learning_rate == 0.07


def test_other_methods_without_flags_use_their_defaults():
    assert recipe("salun") == unlearn.Recipe(10, 0.013, 64, None, 0.9, 5e-4, "fp32")
    assert recipe("GA") == unlearn.Recipe(
        100, 1e-4, 64, None, 0.9, 5e-4, "fp32", schedule="constant"
    )
    assert recipe("ssd") is None and recipe("FisherForgetting") is None


FLAGS = ["--num_epochs", 3, "--learning_rate", 0.5, "--batch_size", 5, "--milestones", "1,2"]


@pytest.mark.parametrize("name", ["retrain", "finetune", "salun"])
def test_flags_override_defaults_and_recipe_of_original(name):
    flags = [*FLAGS, "--precision", "bf16"]
    assert recipe(name, *flags) == unlearn.Recipe(3, 0.5, 5, [1, 2], 0.9, 5e-4, "bf16")
    assert recipe(name, *flags, original={}) == recipe(name, *flags)


def test_method_with_another_momentum_trains_with_it():
    entry = replace(unlearn.METHODS["salun"], training={"num_epochs": 2, "momentum": 0.3})
    assert unlearn.method_recipe(entry, arguments(), {}, CPU).momentum == 0.3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("finetune", unlearn.Recipe(10, 0.01, 256, schedule="constant")),
        ("RL", unlearn.Recipe(10, 0.003, 256, schedule="constant")),
        ("GA", unlearn.Recipe(5, 1e-4, 256, schedule="constant")),
        ("ga_plus", unlearn.Recipe(10, 0.0095, 64, None, 0.0, 0.0, schedule="constant")),
        (
            "teacher",
            unlearn.Recipe(1, 1e-4, 256, weight_decay=0.0, schedule="constant", optimizer="adam"),
        ),
        ("scrub", unlearn.Recipe(3, 5e-4, 64, schedule="constant")),
        ("salun", unlearn.Recipe(10, 0.013, 256, schedule="constant")),
        ("sfron", unlearn.Recipe(5, 0.01, 128)),
        ("retrain", unlearn.Recipe(33, 0.07, 17, [9, 21])),
    ],
)
def test_authors_recipe_has_published_values(name, expected):
    assert recipe(name, "--recipe", "authors") == expected
    from_flags = {"num_epochs": 3, "learning_rate": 0.5, "batch_size": 5, "milestones": [1, 2]}
    flags = [*FLAGS, "--recipe", "authors"]
    assert recipe(name, *flags) == replace(expected, **from_flags)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("GA", {"stop_accuracy": 0.0}),
        ("ga_plus", {"forget_weight": 1 / 19, "ascent_limit": 0.0, "passes": 2}),
        ("FisherForgetting", {"noise": 1e-6}),
        ("teacher", {"retain_share": 0.3}),
        ("ssd", {"selection_weighting": 10.0, "importance_batches": 0}),
        ("scrub", {"forget_batch_size": 512, "pass_steps": 0}),
        ("salun", {}),
        ("sfron", {"num_steps": 1500, "ascent_limit": 0.0}),
    ],
)
def test_authors_options_differ_from_the_defaults_only_where_listed(name, changed):
    entry = unlearn.METHODS[name]
    options = unlearn.method_options(entry, arguments("--recipe", "authors"))
    defaults = unlearn.method_options(entry, arguments())
    assert defaults == entry.options
    assert options == pytest.approx(defaults | changed, nan_ok=True)
    assert entry.authors.keys() <= unlearn.RECIPE_FIELDS | entry.options.keys()


@pytest.mark.parametrize(
    ("option", "default", "names"),
    [
        ("ascent_limit", 4.0, ["ga_plus", "sfron"]),
        ("pass_steps", 8, ["scrub", "delete", "boundary_shrink", "boundary_expand", "mu_mis"]),
    ],
)
def test_forgetting_has_a_limit_that_the_authors_do_not_have(option, default, names):
    having = [name for name, entry in unlearn.METHODS.items() if option in entry.options]
    assert having == [name for name in unlearn.METHODS if name in names]
    for name in names:
        entry = unlearn.METHODS[name]
        assert unlearn.method_options(entry, arguments())[option] == default
        if entry.authors:
            authors = unlearn.method_options(entry, arguments("--recipe", "authors"))
            assert authors[option] == 0


def test_num_steps_sets_number_of_epochs_unless_num_epochs_is_passed():
    entry = unlearn.METHODS["sfron"]
    args = arguments("--recipe", "authors")
    options = unlearn.method_options(entry, args)
    fitted = unlearn.fit_epochs(recipe("sfron", "--recipe", "authors"), options, 45000)
    assert fitted.num_epochs == 5
    assert replace(fitted, num_epochs=9) == unlearn.Recipe(9, 0.01, 128)
    assert unlearn.fit_epochs(fitted, options, 128 * 1500).num_epochs == 1
    assert unlearn.fit_epochs(fitted, options, 128 * 1499).num_epochs == 2
    assert unlearn.fit_epochs(fitted, options, 1).num_epochs == 1500
    options = unlearn.method_options(entry, arguments("--recipe", "authors", "--num_epochs", 7))
    assert options["num_steps"] is None
    assert unlearn.fit_epochs(fitted, options, 10) is fitted
    assert unlearn.fit_epochs(fitted, {}, 10) is fitted
    with pytest.raises(utils.UserError, match="--num_epochs and --num_steps: .*; omit one"):
        check(["sfron"], "--num_epochs", 7, "--num_steps", 3)


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
def test_original_without_flags_uses_recipe_of_data_set(model, data, expected, monkeypatch):
    few = replace(utils.SPECS["digits"], num_epochs=7)
    args = arguments("--model_name", model, data=data)
    actual = unlearn.original_recipe(args, CPU)
    assert (actual.num_epochs, actual.learning_rate) == expected
    assert actual == unlearn.Recipe(*expected, 64, None, 0.9, 5e-4, "fp32")
    monkeypatch.setitem(utils.SPECS, data, few)
    assert unlearn.original_recipe(args, CPU).num_epochs == 7
    # Retrain assumes this recipe for a checkpoint without metadata.
    retrain = unlearn.method_recipe(unlearn.METHODS["retrain"], args, {}, CPU)
    assert retrain == unlearn.original_recipe(args, CPU)


def test_original_with_flags_uses_them():
    flags = [*FLAGS, "--precision", "tf32"]
    actual = unlearn.original_recipe(arguments(*flags), CPU)
    assert actual == unlearn.Recipe(3, 0.5, 5, [1, 2], 0.9, 5e-4, "tf32")


def test_transformer_defaults_apply_to_transformers_only():
    def options(weighting, constant):
        weights = {"selection_weighting": weighting, "dampening_constant": constant}
        return weights | {
            "importances": "batch",
            "importance_batches": 100,
            "stop_accuracy": None,
        }

    vit = ["--model_name", "vit"]
    entry = unlearn.METHODS["ssd"]
    assert unlearn.method_options(entry, arguments()) == options(None, 1.0)
    entry = replace(entry, transformer={"selection_weighting": 4.0})
    assert unlearn.method_options(entry, arguments(*vit)) == options(4.0, 1.0)
    flags = ["--selection_weighting", 0, "--dampening_constant", 0.5]
    assert unlearn.method_options(entry, arguments(*vit, *flags)) == options(0.0, 0.5)
    convolutional = unlearn.method_options(entry, arguments("--model_name", "resnet50"))
    assert convolutional == unlearn.method_options(entry, arguments())
    slower = replace(unlearn.METHODS["salun"], transformer={"learning_rate": 0.002})
    assert unlearn.method_recipe(slower, arguments(*vit), {}, CPU).learning_rate == 0.002
    assert unlearn.method_recipe(slower, arguments(), {}, CPU).learning_rate == 0.013


def test_options_of_a_method_exclude_those_of_other_methods():
    args = arguments("--kd_T", 3, "--beta", 0)
    teacher = unlearn.method_options(unlearn.METHODS["teacher"], args)
    assert teacher == {"kd_T": 3.0, "retain_share": 1.0}
    assert unlearn.method_options(unlearn.METHODS["scrub"], args) == {
        "msteps": 2,
        "kd_T": 3.0,
        "beta": 0,
        "gamma": 0.99,
        "forget_batch_size": None,
        "pass_steps": 8,
        "rewind": False,
    }
    rewound = unlearn.method_options(unlearn.METHODS["scrub"], arguments("--rewind"))
    assert rewound["rewind"] is True
    assert unlearn.method_options(unlearn.METHODS["finetune"], args) == {}
    assert unlearn.method_options(unlearn.METHODS["GA"], arguments()) == {"stop_accuracy": None}


# ---------------------------------------------------------------- help and flags


def test_help_lists_every_method_with_its_defaults():
    defaults, authors = unlearn.describe_methods(unlearn.METHODS).split("\n\n")
    heading, *lines = defaults.splitlines()
    assert heading == "methods and their defaults:"
    assert [line.split()[0] for line in lines] == [*unlearn.METHODS]
    texts = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert texts["retrain"] == (
        "epochs: as for the original model, learning rate: as for the original model"
    )
    assert texts["finetune"] == (
        "epochs: 20, learning rate: as for the original model, (digits: learning rate: 0.02)"
    )
    assert texts["salun"] == "epochs: 10, learning rate: 0.013, mask_ratio: 0.5"
    assert texts["GA"] == "epochs: 100, learning rate: 0.0001, schedule: constant"
    assert texts["ssd"] == (
        "no training, dampening_constant: 1.0, importances: batch, importance_batches: 100"
    )
    heading, *lines = authors.splitlines()
    assert heading == "values of --recipe authors, where they differ:"
    documented = [name for name, entry in unlearn.METHODS.items() if entry.authors]
    assert [line.split()[0] for line in lines] == documented
    assert {*unlearn.METHODS} - {*documented} == {
        "retrain",
        "delete",
        "IU",
        "neg_merge",
    }
    assert "  salun            batch_size: 256, schedule: constant" in lines
    slower = replace(unlearn.METHODS["salun"], transformer={"learning_rate": 0.002})
    assert unlearn.describe_defaults(slower).endswith("(transformers: learning rate: 0.002)")
    variants = unlearn.describe_methods(unlearn_cpu.METHODS).split("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in variants] == [*unlearn_cpu.METHODS]
    assert variants[0].split(maxsplit=1)[1] == texts["retrain"]


def test_help_of_option_names_its_methods():
    parser = argparse.ArgumentParser()
    unlearn.add_option_flags(parser, unlearn.METHODS)
    help_text = " ".join(parser.format_help().split())
    assert "--kd_T KD_T teacher, scrub: temperature of the distillation" in help_text
    assert "--noise NOISE FisherForgetting: scale of the variance of the noise" in help_text


def test_option_of_no_selected_method_is_not_a_flag():
    assert arguments("--kd_T", 2).kd_T == 2 and arguments("--ascent_every", 3).ascent_every == 3
    assert not hasattr(arguments(methods=unlearn_cpu.METHODS), "noise")
    assert arguments("--kd_T", 2, methods=unlearn_cpu.METHODS).kd_T == 2
    with pytest.raises(utils.UserError, match="unrecognized arguments: --noise"):
        arguments("--noise", 1, methods=unlearn_cpu.METHODS)
    options = {option for entry in unlearn.METHODS.values() for option in entry.options}
    assert options == {*unlearn.OPTIONS}


@pytest.mark.parametrize(
    ("flag", "low", "high"),
    [
        ("stop_accuracy", -0.1, 1.1),
        ("kd_T", 0, None),
        ("msteps", -1, None),
        ("mask_ratio", -0.1, 1.5),
        ("forget_weight", -1, None),
        ("beta", -1, None),
        ("gamma", -1, None),
        ("noise", -1, None),
        ("ascent", -1, None),
        ("adaptivity", -1, None),
        ("ascent_every", 0, None),
        ("max_norm", 0, None),
        ("saliency_threshold", -1, None),
    ],
)
def test_option_out_of_bounds_is_refused(flag, low, high):
    for value in (low, high) if high else (low,):
        with pytest.raises(utils.UserError, match=f"--{flag}"):
            arguments(f"--{flag}", value)


def check(names, *flags):
    unlearn.check_flags(arguments(*flags), {name: unlearn.METHODS[name] for name in names})


def test_learning_rate_for_several_methods_is_refused():
    check(["salun"], "--learning_rate", 0.1)
    check(["salun", "RL"])
    with pytest.raises(utils.UserError, match="--learning_rate with several methods"):
        check(["salun", "RL"], "--learning_rate", 0.1)


@pytest.mark.parametrize(
    ("flag", "value"),
    [("num_epochs", 3), ("learning_rate", 0.1), ("batch_size", 9), ("milestones", "1,2")],
)
def test_training_flags_for_methods_without_training_are_refused(flag, value):
    with pytest.raises(utils.UserError, match=f"--{flag} does not apply to ssd .no training"):
        check(["ssd"], f"--{flag}", value)
    check(["ssd"])
    if flag != "learning_rate":
        check(["ssd", "finetune"], f"--{flag}", value)
        message = f"--{flag} does not apply to ssd, FisherForgetting .no"
        with pytest.raises(utils.UserError, match=message):
            check(["ssd", "FisherForgetting"], f"--{flag}", value)


def test_option_of_no_requested_method_is_refused():
    check(["scrub", "salun"], "--kd_T", 2, "--mask_ratio", 0.1)
    message = "--kd_T applies to teacher, scrub and not to salun, RL;"
    with pytest.raises(utils.UserError, match=message):
        check(["salun", "RL"], "--kd_T", 2)
    with pytest.raises(utils.UserError, match="--beta applies to scrub and not to salun"):
        check(["salun"], "--beta", 0)


def test_method_without_training_has_no_conformal_variant():
    def nothing(job):
        """A method for this test."""

    for trained, extensible in [(True, True), (False, True), (True, False)]:
        unlearn.method(trained=trained, extensible=extensible, weight=0.3, num_epochs=2)(nothing)
        entry = unlearn.METHODS.pop("nothing")
        assert entry == unlearn.Method(
            name="nothing",
            run=nothing,
            training={"num_epochs": 2},
            options={"weight": 0.3},
            authors={},
            transformer={},
            trained=trained,
            extensible=trained and extensible,
        )
    assert unlearn.method()(nothing) is nothing
    assert unlearn.METHODS.pop("nothing").extensible
