"""Complete runs of main_original_model.py and main_unlearn.py in this process, on 60 digits."""

import contextlib
import io
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small import arguments

import main_original_model
import main_unlearn
import main_unlearn_cpu
import models
import unlearn
import unlearn_cpu
import utils
from metrics.columns import Spread
from metrics.report import tables
from models import checkpoint, distributed
from models.resnet import ResNet18

TRAINING = ["--width", 8, "--device", "cpu", "--wandb_mode", "disabled", "--batch_size", 16]
SCENARIO = ["--retain_ratio", 0.7]


@pytest.fixture(scope="module")
def few(digits):
    """60 training and 60 held-out digits."""
    image_sets = [
        utils.Images(images.pixels[:60], images.labels[:60], images.spec, images.size)
        for images in (digits.train, digits.held_out)
    ]
    return utils.Data(*image_sets, digits.classes, "few")


@pytest.fixture(autouse=True)
def few_images(few, monkeypatch):
    monkeypatch.setattr(utils, "load_data", lambda args, device, model_side=None: few)


def flags_in(folder, *flags):
    return arguments(*TRAINING, "--runs_dir", folder, *flags, data="digits")


def unlearn_in(folder, names, *flags, methods=unlearn.METHODS, make_term=None):
    """(exit status, output) of main_unlearn.py with the methods ``names``."""
    args, output = flags_in(folder, *SCENARIO, *flags), io.StringIO()
    chosen = {name: methods[name] for name in names}
    with contextlib.redirect_stdout(output):
        status = main_unlearn.unlearn_all(args, chosen, make_term)
    return status, output.getvalue()


def unlearn_cpu_in(folder, names, *flags):
    """(exit status, output) of main_unlearn_cpu.py."""
    variants = {"methods": unlearn_cpu.METHODS, "make_term": main_unlearn_cpu.conformal_term}
    return unlearn_in(folder, names, *flags, **variants)


def plan_in(folder, names, data, *flags):
    """The runs that main_unlearn.py plans for the first seed."""
    args, device = flags_in(folder, *SCENARIO, *flags), torch.device("cpu")
    original = main_unlearn.read_original(args, data, device)
    return [
        main_unlearn.plan_run(name, unlearn.METHODS[name], original, term=None, device=device)
        for name in names
    ]


def train_original(folder, data, *flags):
    for seed_args in utils.each_seed(flags_in(folder, "--num_epochs", 2, *flags)):
        main_original_model.train_original(seed_args, data, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few):
    """A folder with an original model for seed 1 and 2."""
    folder = tmp_path_factory.mktemp("runs")
    with contextlib.redirect_stdout(io.StringIO()):
        train_original(folder, few, "--seeds", "1,2")
    return folder


@pytest.fixture
def original(trained, tmp_path):
    """A folder with a copy of the original model for seed 1."""
    root = trained / "resnet18w8_few_seed1"
    copy = tmp_path / root.name
    copy.mkdir()
    for name in ("original_model.pth", "original_model.json"):
        (copy / name).write_bytes((root / name).read_bytes())
    return tmp_path


@pytest.fixture(scope="module")
def everything(trained, few):
    """All methods and variants, one epoch each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "load_data", lambda args, device, model_side=None: few)
        status, output = unlearn_in(trained, unlearn.METHODS, "--num_epochs", 1)
        flags = ["--num_epochs", 2, "--alpha", 0.3, "--lamda", 0.4, "--delta", 0.02]
        cpu_status, cpu_output = unlearn_cpu_in(trained, ["cpu_finetune", "cpu_scrub"], *flags)
    return SimpleNamespace(
        root=trained / "resnet18w8_few_seed1/random_0.7",
        status=(status, cpu_status),
        output=output,
        cpu_output=cpu_output,
    )


def accuracies_of(model, data, split):
    """:func:`unlearn.accuracies` of any model."""
    job = unlearn.Job(name="x", label="x", model=model, data=data, split=split, recipe=None, seed=1)
    return unlearn.accuracies(job)


def results(folder):
    return json.loads((folder / "results.json").read_text())


def model_of(path):
    model = ResNet18(10, 8)
    model.load_state_dict(checkpoint.read(path)[0])
    return model


# ---------------------------------------------------------------- results of a run


def test_original_is_trained_on_all_images_and_recorded(trained, few):
    root = trained / "resnet18w8_few_seed1"
    record = json.loads((root / "original_model.json").read_text())
    assert [line["epoch"] for line in record["history"]] == [1, 2]
    assert record["method"] == "original"
    assert record["recipe"]["num_epochs"] == 2
    assert record["identity"]["training_images"] == few.fingerprint
    assert set(record["accuracies"]) == {"retain", "test"}
    args = flags_in(trained)
    split = utils.make_split(few, args, scenario=False)
    assert len(split.retain) == 60
    model = model_of(root / "original_model.pth")
    assert accuracies_of(model, few, split) == record["accuracies"]
    other = checkpoint.read(trained / "resnet18w8_few_seed2/original_model.pth")[0]
    assert checkpoint.weights_hash(other) != checkpoint.weights_hash(model.state_dict())


def test_finished_method_leaves_its_model_and_accuracies_of_that_model(everything, few):
    assert everything.status == (0, 0)
    split = utils.make_split(few, flags_in("unused", *SCENARIO))
    original_weights, _ = checkpoint.read(everything.root.parent / "original_model.pth")
    original = checkpoint.weights_hash(original_weights)
    hashes = {original}
    for name in [*unlearn.METHODS, "cpu_finetune", "cpu_scrub"]:
        folder, method = everything.root / name, unlearn.METHODS[name.removeprefix("cpu_")]
        actual = results(folder)
        model = model_of(folder / "unlearning_model.pth")
        assert accuracies_of(model, few, split) == actual["accuracies"]
        assert set(actual["accuracies"]) == {"retain", "forget", "test"}
        assert actual["method"] == name and actual["seconds"] > 0 and actual["original_seconds"] > 0
        assert actual["forget_set"] == split.fingerprint and actual["num_forget"] == 18
        assert actual["unlearn_type"] == "random" and "history" not in actual
        assert actual["identity"]["original"] == original
        assert actual["identity"]["forget_set"] == split.fingerprint
        assert (actual["recipe"] is not None) == method.trained
        assert set(actual["options"]) == set(method.options)
        lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        parts = 5 if name == "neg_merge" else 1  # trainings of one method, whose epochs count on
        num_epochs = 0 if not method.trained else 2 if name.startswith("cpu_") else parts
        assert [line["epoch"] for line in lines] == [*range(1, num_epochs + 1)]
        assert not (folder / ".unfinished").exists() and not (folder / "failure.json").exists()
        hashes.add(checkpoint.weights_hash(model.state_dict()))
        title = "neg_merge 5/5" if name == "neg_merge" else name
        assert f"{title} epoch 1" in everything.output + everything.cpu_output or not method.trained
    unchanged = "ssd" in unlearn.METHODS and ssd_did_nothing(everything)
    assert len(hashes) == len(unlearn.METHODS) + 3 - unchanged
    assert len(list(everything.root.glob("*/saliency_mask.pth"))) == 1


def ssd_did_nothing(everything):
    original, _ = checkpoint.read(everything.root.parent / "original_model.pth")
    dampened, _ = checkpoint.read(everything.root / "ssd/unlearning_model.pth")
    return checkpoint.weights_hash(original) == checkpoint.weights_hash(dampened)


def test_identity_of_conformal_variant_has_alpha_delta_and_lamda(everything):
    identity = results(everything.root / "cpu_finetune")["identity"]
    assert (identity["alpha"], identity["delta"], identity["lamda"]) == (0.3, 0.02, 0.4)
    base = results(everything.root / "finetune")["identity"]
    assert not {"alpha", "delta", "lamda"} & base.keys()
    lines = (everything.root / "cpu_finetune/history.jsonl").read_text().splitlines()
    assert all("q_hat" in json.loads(line) for line in lines)


def test_advice_of_conformal_term_is_printed_with_name_of_variant(original, monkeypatch):
    for advice in ("a smaller alpha", None):
        monkeypatch.setattr(unlearn_cpu.ConformalTerm, "advice", lambda term, advice=advice: advice)
        flags = ["--num_epochs", 1, "--alpha", 0.3, "--overwrite"]
        status, output = unlearn_cpu_in(original, ["cpu_finetune"], *flags)
        assert status == 0
        is_printed = "cpu_finetune: a smaller alpha" in output.splitlines()
        assert is_printed == (advice is not None)
        assert "cpu_finetune: None" not in output


def test_printed_table_has_a_row_for_every_method(everything):
    lines = everything.output.splitlines()
    heading = next(n for n, line in enumerate(lines) if line.split()[:2] == ["method", "epochs"])
    rows = {line.split()[0]: line.split() for line in lines[heading + 1 :]}
    assert list(rows) == list(unlearn.METHODS)
    assert "note" not in lines[heading]
    actual = results(everything.root / "salun")
    measured = [actual["accuracies"][key] for key in ("retain", "forget", "test")]
    accuracies = [f"{100 * accuracy:.1f}" for accuracy in measured]
    assert rows["salun"] == ["salun", "1", "0.013", *accuracies, f"{actual['seconds']:.1f}"]
    assert rows["ssd"][1:3] == ["–", "–"]


def test_finished_run_is_not_repeated(everything, trained):
    before = (everything.root / "salun/unlearning_model.pth").stat().st_mtime_ns
    status, output = unlearn_in(trained, ["salun"], "--num_epochs", 1)
    assert status == 0 and "already done" in output and "salun epoch 1" not in output
    assert output.splitlines()[-1].split()[:3] == ["salun", "1", "0.013"]
    assert (everything.root / "salun/unlearning_model.pth").stat().st_mtime_ns == before


def test_finished_run_with_other_settings_is_refused_and_names_them(everything, trained):
    message = (
        r"RL/unlearning_model.pth already exists with different settings "
        r"\(num_epochs: 1 on disk, 2 requested\); pass --overwrite to replace it$"
    )
    with pytest.raises(utils.UserError, match=message):
        unlearn_in(trained, ["RL", "salun"], "--num_epochs", 2)
    flags = ["--num_epochs", 2, "--alpha", 0.3, "--delta", 0.02]
    with pytest.raises(utils.UserError, match=r"\(lamda: 0.4 on disk, 0.05 requested\)"):
        unlearn_cpu_in(trained, ["cpu_finetune"], *flags)


def test_overwrite_replaces_run_and_same_seed_gives_same_weights(everything, original):
    """Uses a copy of the original, because other tests read the folder ``trained``."""
    assert unlearn_in(original, ["salun"], "--num_epochs", 1, "--mask_ratio", 0.2)[0] == 0
    folder = original / "resnet18w8_few_seed1/random_0.7/salun"
    sparse = checkpoint.read(folder / "saliency_mask.pth")[0]
    num_weights = sum(mask.numel() for mask in sparse.values())
    assert sum(mask.sum() for mask in sparse.values()) == round(0.2 * num_weights)
    status, output = unlearn_in(original, ["salun"], "--num_epochs", 1, "--overwrite")
    assert status == 0 and "salun epoch 1" in output
    again, first = (
        checkpoint.read(path / "salun/unlearning_model.pth")[0]
        for path in (folder.parent, everything.root)
    )
    assert checkpoint.weights_hash(again) == checkpoint.weights_hash(first)


def test_saved_mask_is_used_and_recorded_in_identity(everything, original):
    path = everything.root / "salun/saliency_mask.pth"
    assert unlearn_in(original, ["salun"], "--num_epochs", 1, "--mask_path", path)[0] == 0
    folder = original / "resnet18w8_few_seed1/random_0.7/salun"

    def hashes(name):
        """The hash of the file ``name`` in both folders."""
        states = [checkpoint.read(parent / name)[0] for parent in (folder, path.parent)]
        return [checkpoint.weights_hash(state) for state in states]

    used_mask, saved_mask = hashes("saliency_mask.pth")
    assert results(folder)["identity"]["mask_path"] == saved_mask == used_mask
    model, expected = hashes("unlearning_model.pth")
    assert model == expected


def test_initialisation_differs_between_seeds_but_not_between_runs(trained, few):
    hashes = []
    for seed in (1, 1, 2):
        torch.rand(3)
        flags = ["--seed", seed, "--num_epochs", 1, "--overwrite"]
        (run,) = plan_in(trained, ["retrain"], few, *flags)
        network = main_unlearn.initial_network(run, few, torch.device("cpu"))
        hashes.append(checkpoint.weights_hash(network.state_dict()))
    assert hashes[0] == hashes[1] != hashes[2]


def test_retrain_starts_from_pretrained_network_and_original_loads_into_plain(
    original, few, monkeypatch
):
    calls, plain = [], models.build_model

    def build_model(*arguments, pretrained):
        calls.append(pretrained)
        return plain(*arguments, pretrained=pretrained)

    monkeypatch.setattr(models, "build_model", build_model)
    unlearn_in(original, ["retrain"], "--num_epochs", 1)
    assert calls == [False, True]  # for the original's weights, for Retrain


def test_run_that_retains_three_of_sixty_images_has_finite_numbers(original):
    names = ["ga_plus", "GA", "scrub"]
    status, output = unlearn_in(original, names, "--retain_ratio", 0.05, "--num_epochs", 1)
    assert status == 0 and "nan" not in output.lower()
    for name in names:
        actual = results(original / "resnet18w8_few_seed1/random_0.05" / name)
        assert actual["num_forget"] == 57
        assert all(0 <= value <= 1 for value in actual["accuracies"].values())


def test_original_of_other_data_or_with_infinite_outputs_is_refused(original, few):
    path = original / "resnet18w8_few_seed1/original_model.pth"
    state, meta = checkpoint.read(path)
    checkpoint.save(path, state, meta | {"data_name": "cifar10"})
    with pytest.raises(utils.UserError, match="original_model.pth: .*cifar10"):
        plan_in(original, ["retrain"], few)
    state["fc.weight"][:] = 3e38  # finite, but a product with the features is not
    checkpoint.save(path, state, meta)
    with pytest.raises(utils.UserError, match="original_model.pth: .* NaN or infinite"):
        plan_in(original, ["retrain"], few)


# ---------------------------------------------------------------- failures


def entry(run, name="broken", **fields):
    """A method for a test."""
    training = {"num_epochs": 3, "learning_rate": 0.1}
    return unlearn.Method(name=name, run=run, training=training, **fields)


def diverging(job):
    """A method that fails."""
    raise unlearn.Diverged("too fast")


BROKEN = unlearn.METHODS | {"broken": entry(diverging)}


def test_failed_method_is_a_row_and_the_other_methods_still_run(original):
    status, output = unlearn_in(original, ["broken", "finetune"], "--num_epochs", 1, methods=BROKEN)
    root = original / "resnet18w8_few_seed1/random_0.7"
    assert status == 2 and "broken (seed 1) failed: too fast" in output
    assert (root / "finetune/unlearning_model.pth").exists()
    assert not (root / "broken/unlearning_model.pth").exists()
    failure = json.loads((root / "broken/failure.json").read_text())
    assert failure["error"] == "too fast"
    assert failure["forget_set"] == results(root / "finetune")["forget_set"]
    broken, finetune = (line.split() for line in output.splitlines()[-2:])
    assert (broken[0], broken[-2:]) == ("broken", ["too", "fast"])
    assert (finetune[0], finetune[-1]) == ("finetune", "–")

    working = BROKEN | {"broken": unlearn.METHODS["finetune"]}
    assert unlearn_in(original, ["broken", "finetune"], "--num_epochs", 1, methods=working)[0] == 0
    assert not (root / "broken/failure.json").exists()


def wrong_file(job):
    """A method that cannot begin."""
    raise utils.UserError("wrong file")


def test_error_in_each_of_several_methods_is_a_row(original):
    methods = {"wrong": entry(wrong_file), "other": entry(wrong_file)}
    status, output = unlearn_in(original, methods, methods=methods)
    assert status == 2
    assert [line.split()[0] for line in output.splitlines()[-2:]] == ["wrong", "other"]


@pytest.mark.parametrize(
    ("error", "ends"), [(utils.UserError("wrong file"), True), (unlearn.Diverged("fast"), False)]
)
def test_on_several_processes_only_divergence_continues_with_other_methods(
    error, ends, original, few, monkeypatch
):
    """Other errors may occur on one process only, and the other processes would wait forever."""

    def unlearn_and_save(run, data, device):
        run.files.folder.mkdir(parents=True)
        raise error

    plain = main_unlearn.read_original

    def read_original(*arguments):
        read = plain(*arguments)
        monkeypatch.setattr(distributed, "world_size", lambda: 2)
        return read

    monkeypatch.setattr(main_unlearn, "unlearn_and_save", unlearn_and_save)
    monkeypatch.setattr(main_unlearn, "read_original", read_original)
    if ends:
        with pytest.raises(utils.UserError, match="wrong file"):
            unlearn_in(original, ["finetune", "RL"])
    else:
        status, output = unlearn_in(original, ["finetune", "RL"])
        assert status == 2
        assert [line.split()[0] for line in output.splitlines()[-2:]] == ["finetune", "RL"]


def test_failure_of_the_only_method_is_an_error(original):
    with pytest.raises(unlearn.Diverged, match="too fast"):
        unlearn_in(original, ["broken"], methods=BROKEN)


def test_failures_over_seeds_name_their_seeds(trained):
    status, output = unlearn_in(trained, ["broken"], "--seeds", "1,2", methods=BROKEN)
    assert status == 2 and "broken (seed 2) failed" in output
    assert "seed 1: too fast; seed 2: too fast" in output.splitlines()[-1]


def test_several_seeds_share_one_row_of_means(trained):
    status, output = unlearn_in(trained, ["teacher"], "--seeds", "1,2", "--num_epochs", 1)
    assert status == 0
    actual = [
        results(trained / f"resnet18w8_few_seed{seed}/random_0.7/teacher")["accuracies"]["test"]
        for seed in (1, 2)
    ]
    spread = Spread(sum(actual) / 2, abs(actual[0] - actual[1]) / math.sqrt(2))
    row = output.splitlines()[-1].split()
    assert row[0] == "teacher"
    assert row[5] == tables.format_cell(spread, "percent")


def test_method_without_a_return_is_an_error_that_names_it(original):
    def forgetful(job):
        unlearn.train(job, unlearn.retain_cross_entropy)

    method = replace(unlearn.METHODS["finetune"], run=forgetful)
    with pytest.raises(TypeError, match="forgetful returned no model"):
        unlearn_in(original, ["forgetful"], "--num_epochs", 1, methods={"forgetful": method})


def test_infinite_weights_are_not_saved(original):
    def infinite(job):
        with torch.no_grad():
            job.model.fc.bias[0] = math.inf
        return job.model

    methods = {"infinite": entry(infinite)}
    with pytest.raises(unlearn.Diverged, match="infinite diverged: some of its weights or outputs"):
        unlearn_in(original, ["infinite"], methods=methods)
    assert not list(original.glob("*/*/infinite/*.pth"))


# ---------------------------------------------------------------- interruption


def stops(kind, after=2):
    """Fine-tuning that raises ``kind`` once, after ``after`` saved epochs."""
    pending = [kind("stopped")]

    def method(job):
        plain = job.epoch_done

        def epoch_done(record):
            plain(record)
            if record["epoch"] == after + 1 and pending:
                raise pending.pop()

        return unlearn.train(replace(job, epoch_done=epoch_done), unlearn.retain_cross_entropy)

    return {"finetune": entry(method, "finetune")}


@pytest.fixture(scope="module")
def whole(trained, few):
    """The hash of the weights after four uninterrupted epochs of fine-tuning."""
    split = utils.make_split(few, flags_in("unused", *SCENARIO))
    model = model_of(trained / "resnet18w8_few_seed1/original_model.pth")
    job = unlearn.Job(
        name="finetune",
        label="finetune",
        model=model,
        data=few,
        split=split,
        recipe=unlearn.Recipe(4, 0.1, 16),
        seed=1,
        quiet=True,
    )
    unlearn.train(job, unlearn.retain_cross_entropy)
    return checkpoint.weights_hash(model.state_dict())


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_interrupted_run_resumes_to_same_weights(kind, original, whole):
    methods = stops(kind)
    flags = ["--num_epochs", 4, "--save_every", 1000]
    with pytest.raises(utils.Interrupted if kind is KeyboardInterrupt else kind) as caught:
        unlearn_in(original, ["finetune"], *flags, methods=methods)
    assert kind is not KeyboardInterrupt or "pass --resume to continue" in str(caught.value)
    folder = original / "resnet18w8_few_seed1/random_0.7/finetune"
    assert checkpoint.read_state(folder / ".unfinished" / "resume.pth")["epoch"] == 2
    assert not (folder / "unlearning_model.pth").exists()
    status, message = unlearn_in(original, ["finetune"], *flags, "--resume", methods=methods)
    assert status == 0 and "after epoch 2" in message
    assert "epoch 2/4" not in message and "epoch 3/4" in message
    resumed = checkpoint.read(folder / "unlearning_model.pth")[0]
    assert len((folder / "history.jsonl").read_text().splitlines()) == 4
    assert not (folder / ".unfinished").exists()
    assert checkpoint.weights_hash(resumed) == whole


def test_interruption_before_first_epoch_leaves_nothing_to_resume(original):
    with pytest.raises(KeyboardInterrupt) as caught:
        unlearn_in(original, ["finetune"], methods=stops(KeyboardInterrupt, after=0))
    assert not isinstance(caught.value, utils.Interrupted)
    assert not list(original.rglob("resume.pth"))


def test_divergence_leaves_no_state_to_resume(original):
    with pytest.raises(unlearn.Diverged):
        unlearn_in(original, ["finetune"], "--save_every", 1000, methods=stops(unlearn.Diverged))
    assert not list(original.rglob("resume.pth"))


def test_wandb_log_has_a_table_of_time_and_accuracies(original, monkeypatch):
    logged = []

    def log_table(log, title, rows):
        logged.append((title, rows))

    monkeypatch.setattr(utils.WandbRun, "log_table", log_table)
    unlearn_in(original, ["finetune"], "--num_epochs", 1)
    actual = results(original / "resnet18w8_few_seed1/random_0.7/finetune")
    row = {"method": "finetune", "seconds": actual["seconds"]} | actual["accuracies"]
    assert logged == [("run", [row])]


def test_flags_for_compiling_and_saving_reach_the_job(original):
    fields = []

    def method(job):
        fields.append((job.compile, job.progress.save_every, job.seed))
        fields.append((job.name, job.label, job.quiet))
        return job.model

    methods = {"cpu_finetune": entry(method, "finetune")}
    unlearn_in(original, methods, "--compile", "--save_every", 7, methods=methods)
    assert fields == [(True, 7.0, 1), ("finetune", "cpu_finetune", False)]


# ---------------------------------------------------------------- existing results


def test_run_with_other_settings_is_not_already_done(tmp_path):
    path, identity = tmp_path / "model.pth", {"num_epochs": 3, "precision": "fp32"}
    checkpoint.save(path, {"w": torch.zeros(1)}, {"identity": identity, "seconds": 2.5})

    def existing(identity, path=path, **flags):
        args = SimpleNamespace(**{"overwrite": False, "precision": "auto"} | flags)
        return unlearn.already_done(path, identity, args)

    assert existing(identity)["seconds"] == 2.5
    assert existing(identity, overwrite=True) is None
    assert existing(identity | {"precision": "bf16"})["seconds"] == 2.5  # another device's auto
    for other, flags in [
        (identity | {"precision": "bf16"}, {"precision": "bf16"}),
        (identity | {"num_epochs": 4}, {}),
        (identity | {"beta": 1}, {}),
        ({"precision": "fp32"}, {}),
    ]:
        with pytest.raises(utils.UserError, match="model.pth.*--overwrite"):
            existing(other, **flags)
    assert existing(identity, path=tmp_path / "absent.pth") is None
    path.write_text("torn")
    with pytest.raises(utils.UserError, match="--overwrite"):
        existing(identity)
    assert existing(identity, overwrite=True) is None


def test_mask_of_another_network_or_malformed_mask_is_refused(tmp_path):
    model = torch.nn.Linear(2, 3)
    path = tmp_path / "mask.pth"
    weight, bias = torch.tensor([[1, 0], [0, 0], [1, 1]]), torch.tensor([True, False, True])
    good = {"weight": weight, "bias": bias}
    checkpoint.save(path, good, {})
    masks = unlearn.read_mask(path, model)
    assert masks["weight"].tolist() == [[True, False], [False, False], [True, True]]
    assert masks["bias"].tolist() == [True, False, True]
    assert masks.keys() == good.keys()
    for wrong, words in [
        (good | {"weight": torch.ones(3, 3)}, "weight differs or is missing"),
        ({"weight": weight}, "bias differs or is missing"),
        (good | {"extra": torch.ones(1)}, "extra differs or is missing"),
        (good | {"weight": torch.full((3, 2), 0.5)}, "values other than 0 and 1"),
    ]:
        checkpoint.save(path, wrong, {})
        with pytest.raises(utils.UserError, match=f"--mask_path .*{words}"):
            unlearn.read_mask(path, model)
