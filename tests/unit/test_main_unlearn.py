"""What main_unlearn.py decides before the first run: flags that apply, targets, earlier runs."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from small import SmallNet, arguments, run, small_job
from torch.nn import functional as F

import main_unlearn
import unlearn
import unlearn_cpu
import utils
from main_unlearn import check_flags
from models import checkpoint
from models.errors import UserError
from models.training import Diverged, Recipe

CPU = torch.device("cpu")
ORIGINAL = {"num_epochs": 33, "learning_rate": 0.07, "batch_size": 17, "milestones": [9, 21]}
TRAINING = ["--num_epochs", 3, "--learning_rate", 0.5, "--batch_size", 5, "--milestones", "1,2"]

# ---------------------------------------------------------------- flags that apply


def check(names, *flags, label=None):
    methods = unlearn.METHODS | unlearn_cpu.METHODS
    args = arguments(*flags)
    args.label = label
    check_flags(args, {name: methods[name] for name in names})


@pytest.mark.parametrize("flag", TRAINING[::2])
def test_training_flag_of_methods_without_training_is_refused(flag):
    value = TRAINING[TRAINING.index(flag) + 1]
    check(["finetune"], flag, value)
    with pytest.raises(UserError, match=f"{flag} .*ssd"):
        check(["ssd"], flag, value)


def test_flag_that_suits_none_or_not_all_of_the_methods_is_refused():
    check(["finetune", "ssd", "cpu_scrub"], "--num_epochs", 3, "--msteps", 3)
    with pytest.raises(UserError, match="--learning_rate"):
        check(["finetune", "ssd"], "--learning_rate", 0.1)
    check(["finetune", "ssd"], "--until_forgotten", "--stop_accuracy", 0)
    with pytest.raises(UserError, match="--stop_accuracy .*--until_forgotten|--stop_accuracy: "):
        check(["finetune"], "--stop_accuracy", 0)
    with pytest.raises(UserError, match="--msteps .*scrub.*salun"):
        check(["salun", "RL"], "--msteps", 3)


@pytest.mark.parametrize("label", ["finetune", "cpu_salun", "original", "retrain"])
def test_label_needs_one_method_and_a_name_that_no_method_has(label):
    check(["finetune"], label="slow")
    for names, name in [(["finetune"], label), (["finetune", "RL"], "slow")]:
        with pytest.raises(UserError, match=f"--label {name}"):
            check(names, label=name)


# ---------------------------------------------------------------- earlier runs and records


def plan(folder, name, *flags, label=None, job=None, term=None):
    args, job = arguments(*flags), job or small_job("finetune")
    args.label = label
    original = main_unlearn.Original(
        args=args,
        data=job.data,
        split=job.split,
        model=SmallNet(),
        meta={"recipe": ORIGINAL},
        weights="1234",
        folder=folder,
    )
    return main_unlearn.Run(name, unlearn.METHODS[name], original, term=term, device=CPU)


def test_identity_has_recipe_options_original_forget_set_and_term(tmp_path):
    planned = plan(tmp_path, "scrub", "--beta", 2)
    options = unlearn.METHODS["scrub"].options | {"beta": 2.0}
    origin = {"original": "1234", "forget_set": planned.original.split.fingerprint}
    assert planned.options == options and planned.recipe == Recipe(5, 5e-4, 32, [3])
    assert planned.identity == asdict(planned.recipe) | options | origin
    term = small_job("cpu_finetune", lamda=0.4, alpha=0.3, delta=0.02).term
    settings = {"alpha": 0.3, "delta": 0.02, "lamda": 0.4, "loss": "own"}
    planned = plan(tmp_path, "scrub", "--beta", 2, term=term)
    assert planned.identity == asdict(planned.recipe) | options | origin | settings


@pytest.mark.parametrize(
    ("flags", "settings", "target"),
    [
        ([], {}, None),
        (["--until_forgotten"], {}, 14 / 20),
        (["--until_forgotten"], {"forget_class": 0}, 0.03),
        (["--until_forgotten", "--stop_accuracy", 0], {"forget_class": 0}, 0.0),
        (["--until_forgotten", "--stop_accuracy", 0.4], {"train_calibration": 0}, 0.4),
    ],
)
def test_target_is_the_accuracy_on_held_out_images_or_three_percent_for_classes(
    flags, settings, target, tmp_path
):
    job = small_job("finetune", **settings)
    held_out = job.data.held_out
    held_out.labels = SmallNet().eval()(held_out.inputs).argmax(1)
    held_out.labels[job.split.train_calibration[:6]] += 1  # 14 of 20 are right
    planned = plan(tmp_path, "finetune", *flags, job=job)
    assert planned.stop_at == planned.identity.get("stop_at") == target
    assert ("stop_at" in planned.identity) == bool(flags)


def test_target_without_held_out_images_is_refused(tmp_path):
    with pytest.raises(UserError, match="--stop_accuracy"):
        plan(tmp_path, "GA", "--until_forgotten", job=small_job("GA", train_calibration=0))


@pytest.mark.parametrize(("target", "epochs"), [(1, 1), (0, 20)])
def test_run_until_forgotten_ends_at_the_target_or_says_so(target, epochs, tmp_path, capsys):
    job = small_job("finetune")
    for name in ("tag", "fingerprint"):
        setattr(job.data, name, "data")
    flags = ["--until_forgotten", "--stop_accuracy", target, "--wandb_mode", "disabled"]
    planned = plan(tmp_path, "finetune", *flags, job=job)
    main_unlearn.unlearn_and_save(planned, CPU)
    record = json.loads((tmp_path / "finetune" / "results.json").read_text())
    assert len(record["history"]) == epochs and record["identity"]["stop_at"] == target
    assert ("--num_epochs" in capsys.readouterr().out) == (epochs == 20)
    assert record["recipe"]["num_epochs"] == 20 and record["num_forget"] == 11


def test_identity_has_the_content_of_a_mask_and_not_its_path(tmp_path):
    masks = {name: tensor > 0 for name, tensor in SmallNet().named_parameters()}
    hashes = []
    for name, content in [("a", masks), ("b", masks), ("c", masks | {"4.bias": ~masks["4.bias"]})]:
        checkpoint.save(tmp_path / name, content, {})
        identity = plan(tmp_path, "salun", "--mask_path", tmp_path / name).identity
        hashes.append(identity["mask_path"])
    assert hashes[0] == hashes[1] != hashes[2]


def test_run_that_left_its_model_is_done_and_another_one_is_refused(tmp_path):
    planned = plan(tmp_path, "scrub", "--beta", 2, label="mine")
    assert planned.files.folder == tmp_path / "mine" and planned.label == "mine"
    assert not planned.is_done
    assert plan(tmp_path, "scrub").files.folder == tmp_path / "scrub"
    planned.files.folder.mkdir()
    checkpoint.save(planned.files.model_path, {"w": torch.zeros(1)}, {"identity": planned.identity})
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
    with pytest.raises(UserError, match=r"model\.pth"):
        earlier(identity)
    assert earlier(identity, "--overwrite") is None
    path.unlink()
    assert earlier(identity) is None


def run_in(folder, train, *flags):
    args = arguments("--wandb_mode", "disabled", "--save_every", 1000, *flags)
    files, meta = utils.RunFiles(folder), {"identity": {"a": 1}}
    job = small_job("finetune", quiet=True)
    return job, utils.run_and_save(train, job, files, meta=meta, args=args)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_run_saves_its_state_and_resumes_to_the_same_weights(error, tmp_path):
    def interrupted(job):
        for epoch in job.epochs():
            for batch in epoch.batches("retain"):
                epoch.step(F.cross_entropy(*batch.retain), batch)
            if epoch.number == 3:
                raise error("stopped")

    with pytest.raises(error):
        run_in(tmp_path, interrupted)
    state = tmp_path / utils.RESUME_FILE
    assert len(checkpoint.read_state(state)["records"]) == 2
    assert [*tmp_path.glob("*.pth")] == [state]
    state.with_name(f"{state.name}.7.part").write_text("of a killed process")
    job, meta = run_in(tmp_path, unlearn.finetune, "--resume")
    expected = run(small_job("finetune", quiet=True))
    saved = checkpoint.read(tmp_path / "unlearning_model.pth")[0]
    assert all(saved[name].equal(tensor) for name, tensor in expected.items())
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["history"] == job.records and record["accuracies"] == meta["accuracies"]
    assert not [*tmp_path.glob(f"{state.name}*")]


@pytest.mark.parametrize(("name", "value"), [("4.bias", math.inf), ("4.weight", 3e38)])
def test_model_whose_weights_or_logits_are_not_finite_is_not_saved(name, value, tmp_path):
    with pytest.raises(Diverged, match="finetune"):
        run_in(tmp_path, lambda job: job.model.state_dict()[name].fill_(value))
    assert not [*tmp_path.rglob("*.pth")]
