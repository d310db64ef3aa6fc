"""What main_unlearn.py decides before the first run: recipes, flags that apply, earlier runs."""

from dataclasses import asdict

import pytest
import torch
from small import SmallNet, arguments, small_job

import main_unlearn
import unlearn
import unlearn_cpu
import utils
from main_unlearn import check_flags, method_recipe, run_identity
from models import checkpoint
from models.errors import UserError
from models.training import Recipe

CPU = torch.device("cpu")
ORIGINAL = {"num_epochs": 33, "learning_rate": 0.07, "batch_size": 17, "milestones": [9, 21]}
TRAINING = {
    "--num_epochs": 3,
    "--learning_rate": 0.5,
    "--batch_size": 5,
    "--milestones": "1,2",
}


def recipe(name, *flags, original=None, data="cifar10"):
    meta = {"recipe": ORIGINAL} if original is None else original
    return method_recipe(unlearn.METHODS[name], arguments(*flags, data=data), meta, CPU)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("retrain", Recipe(33, 0.07, 17, [9, 21])),
        ("finetune", Recipe(20, 0.07)),
        ("salun", Recipe(10, 0.013)),
        ("GA", Recipe(100, 1e-4, schedule="constant")),
        ("ssd", None),
        ("FisherForgetting", None),
    ],
)
def test_method_without_flags_has_its_defaults_or_the_recipe_of_the_original(name, expected):
    assert recipe(name) == expected


def test_method_of_a_network_trained_from_scratch_on_digits_has_values_of_its_own():
    assert recipe("finetune", data="digits").learning_rate == 0.02
    assert recipe("finetune", "--learning_rate", 0.3, data="digits").learning_rate == 0.3
    assert recipe("finetune", "--model_name", "resnet50", data="digits").learning_rate == 0.07
    assert recipe("retrain", data="digits").learning_rate == 0.07


@pytest.mark.parametrize("name", ["retrain", "finetune", "salun"])
def test_flags_override_defaults_and_the_recipe_of_the_original(name):
    flags = [*sum(TRAINING.items(), ()), "--precision", "bf16"]
    assert recipe(name, *flags) == Recipe(3, 0.5, 5, [1, 2], precision="bf16")
    assert recipe(name, *flags, original={}) == recipe(name, *flags)


def test_retrain_of_an_original_without_recipe_has_that_of_the_flags():
    assert recipe("retrain", original={}) == utils.original_recipe(arguments(), CPU)


@pytest.mark.parametrize(
    ("model", "data", "flags", "expected"),
    [
        ("resnet18", "cifar10", (), utils.SPECS["cifar10"]),
        ("resnet18", "digits", (), utils.SPECS["digits"]),
        ("resnet50", "cifar10", (), (20, 0.01)),
        ("resnet50", "cifar10", ("--num_epochs", 3), (3, 0.01)),
        ("resnet18", "cifar10", ("--learning_rate", 0.5, "--num_epochs", 3), (3, 0.5)),
    ],
)
def test_original_has_the_recipe_of_its_data_set_or_of_the_flags(model, data, flags, expected):
    if not isinstance(expected, tuple):
        expected = (expected.num_epochs, expected.learning_rate)
    args = arguments("--model_name", model, *flags, data=data)
    assert utils.original_recipe(args, CPU) == Recipe(*expected)


def test_original_with_all_flags_uses_them():
    args = arguments(*sum(TRAINING.items(), ()), "--precision", "tf32")
    assert utils.original_recipe(args, CPU) == Recipe(3, 0.5, 5, [1, 2], precision="tf32")


# ---------------------------------------------------------------- flags that apply


def check(names, *flags, label=None):
    methods = unlearn.METHODS | unlearn_cpu.METHODS
    args = arguments(*flags)
    args.label = label
    check_flags(args, {name: methods[name] for name in names})


@pytest.mark.parametrize(("flag", "value"), TRAINING.items())
def test_training_flag_of_methods_without_training_is_refused(flag, value):
    with pytest.raises(UserError, match=f"{flag} .*ssd"):
        check(["ssd"], flag, value)
    check(["ssd", "finetune"], *(() if flag == "--learning_rate" else (flag, value)))


def test_learning_rate_of_several_methods_is_refused():
    with pytest.raises(UserError, match="--learning_rate"):
        check(["finetune", "salun"], "--learning_rate", 0.1)
    check(["finetune"], "--learning_rate", 0.1)


def test_option_of_no_chosen_method_is_refused():
    with pytest.raises(UserError, match="--msteps .*scrub.*salun"):
        check(["salun", "RL"], "--msteps", 3)
    check(["salun", "cpu_scrub"], "--msteps", 3)


@pytest.mark.parametrize("label", ["finetune", "cpu_salun", "original", "retrain"])
def test_label_needs_one_method_and_a_name_that_no_method_has(label):
    check(["finetune"], label="slow")
    for names, name in [(["finetune"], label), (["finetune", "RL"], "slow")]:
        with pytest.raises(UserError, match=f"--label {name}"):
            check(names, label=name)


def test_jobs_under_torchrun_are_refused(monkeypatch):
    check(["finetune"], "--jobs", 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check(["finetune"], "--jobs", 1)
    with pytest.raises(UserError, match="--jobs"):
        check(["finetune"], "--jobs", 2)


# ---------------------------------------------------------------- earlier runs


def original_in(folder, *flags, label=None):
    args = arguments(*flags)
    args.label = label
    return main_unlearn.Original(
        args=args,
        path=folder / "original_model.pth",
        split=small_job("finetune").split,
        model=SmallNet(),
        meta={"recipe": ORIGINAL},
        weights="1234",
        folder=folder,
    )


def plan(folder, name, *flags, **options):
    original = original_in(folder, *flags, **options)
    return main_unlearn.plan_run(name, unlearn.METHODS[name], original, term=None, device=CPU)


def test_identity_has_recipe_options_original_forget_set_and_term(tmp_path):
    original = original_in(tmp_path)
    identity = run_identity(original, Recipe(3, 0.1), {"beta": 2}, term=None)
    expected = asdict(Recipe(3, 0.1)) | {"beta": 2, "original": "1234"}
    assert identity == expected | {"forget_set": original.split.fingerprint}
    term = small_job("cpu_finetune", lamda=0.4, alpha=0.3, delta=0.02).term
    added = run_identity(original, None, {}, term=term).items() - identity.items()
    assert dict(added) == {"alpha": 0.3, "delta": 0.02, "lamda": 0.4, "loss": "own"}


def test_identity_has_the_content_of_a_mask_and_not_its_path(tmp_path):
    masks = {name: tensor > 0 for name, tensor in SmallNet().named_parameters()}
    hashes = []
    for name, content in [("a", masks), ("b", masks), ("c", masks | {"4.bias": ~masks["4.bias"]})]:
        checkpoint.save(tmp_path / name, content, {})
        identity = plan(tmp_path, "salun", "--mask_path", tmp_path / name).identity
        hashes.append(identity["mask_path"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_run_that_left_its_model_is_done_and_another_one_is_refused(tmp_path, capsys):
    run = plan(tmp_path, "scrub", "--beta", 2, label="mine")
    assert run.files.folder == tmp_path / "mine" and run.label == "mine" and not run.is_done
    assert plan(tmp_path, "scrub").files.folder == tmp_path / "scrub"
    assert run.options["beta"] == 2 and run.options["gamma"] == 0.99
    run.files.folder.mkdir()
    checkpoint.save(run.files.model_path, {"w": torch.zeros(1)}, {"identity": run.identity})
    assert plan(tmp_path, "scrub", "--beta", 2, label="mine").is_done
    with pytest.raises(UserError, match=r"mine.unlearning_model\.pth.*beta: 2\.0 .* 3\.0 "):
        plan(tmp_path, "scrub", "--beta", 3, label="mine")
    assert not plan(tmp_path, "scrub", "--beta", 3, "--overwrite", label="mine").is_done


def test_earlier_run_with_other_settings_is_refused(tmp_path):
    path, identity = tmp_path / "model.pth", {"num_epochs": 3, "precision": "fp32"}
    checkpoint.save(path, {"w": torch.zeros(1)}, {"identity": identity, "seconds": 2.5})

    def earlier(identity, *flags):
        return utils.already_done(path, identity, arguments(*flags))

    half = identity | {"precision": "bf16"}
    assert earlier(identity)["seconds"] == 2.5
    assert earlier(half)["seconds"] == 2.5  # --precision auto of another device
    assert earlier(identity, "--overwrite") is None
    others = [identity | {"num_epochs": 4}, identity | {"beta": 1}, {"precision": "fp32"}]
    for other, flags in [(half, ["--precision", "bf16"]), *((other, []) for other in others)]:
        with pytest.raises(UserError, match=r"model\.pth.*--overwrite"):
            earlier(other, *flags)
    path.write_text("torn")
    with pytest.raises(UserError, match=r"model\.pth.*--overwrite"):
        earlier(identity)
    assert earlier(identity, "--overwrite") is None
    path.unlink()
    assert earlier(identity) is None
