"""Random flags and random bytes give a correct result, or one line and status 2. Never a traceback.

The scripts run in this process.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import QUIET, TINY, check, flags, read_json, run_in_process
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import unlearn
import utils
from models import checkpoint
from models.resnet import ResNet18

FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
USUAL = st.sampled_from(["1", "2", "3", "8", "0.01", "0.1", "0.5", "0.9"])
ODD_NUMBERS = ["1e-3", "1_0", "0x10", "", "-", "1,2", "inf", "nan", "²", "-1", "0"]
NUMBERS = st.one_of(
    USUAL,
    USUAL,
    USUAL,
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.floats(0, 1).map(str),
    st.sampled_from(ODD_NUMBERS),
    WORDS,
)
LISTS = st.lists(NUMBERS, max_size=3).map(",".join)


def counts(least, most):
    """Numbers small enough for short runs, and words."""
    return st.one_of(st.integers(least, most).map(str), WORDS)


COMMON = {
    "--num_classes": NUMBERS,
    "--image_size": NUMBERS,
    "--seed": NUMBERS,
    "--memory_gb": NUMBERS,
    "--workers": NUMBERS,
    "--data_name": st.sampled_from(["digits", "mnist", "image_folder"]),
    "--data_dir": WORDS,
    "--device": WORDS,
    "--model_name": WORDS,
    "--width": NUMBERS,
    "--wandb_mode": WORDS,
    "--seeds": LISTS,
}
TRAINING = {
    "--batch_size": NUMBERS,
    "--num_epochs": NUMBERS,
    "--learning_rate": NUMBERS,
    "--milestones": LISTS,
    "--save_every": NUMBERS,
    "--precision": st.sampled_from(["auto", "fp32", "fp8"]),
}
NAMES = ["finetune", "RL,GA", "scrub", "salun", "ssd", "sfron", "all", "none", ""]
SCENARIO = {
    "--unlearn_name": st.sampled_from(NAMES),
    "--unlearn_type": st.sampled_from(["random", "class", "subclass", "list", "half"]),
    "--retain_ratio": NUMBERS,
    "--forget_class": NUMBERS,
    "--forget_list": WORDS,
    "--model_dir": WORDS,
}
OPTIONS = {f"--{name}": NUMBERS for name in unlearn.OPTIONS}
CONFORMAL = {"--alpha": NUMBERS, "--delta": NUMBERS, "--lamda": NUMBERS}
SCORES = st.sampled_from(["thr", "aps", "raps", "saps", "lac"])
EVALUATION = {
    "--unlearn_name": SCENARIO["--unlearn_name"],
    "--unlearn_type": SCENARIO["--unlearn_type"],
    "--forget_class": SCENARIO["--forget_class"],
    "--alphas": LISTS,
    "--cal_sizes": LISTS,
    "--resplits": counts(-1, 4),
    "--score": st.lists(SCORES, max_size=2).map(",".join),
    "--raps_penalty": NUMBERS,
    "--raps_k": NUMBERS,
    "--saps_weight": NUMBERS,
    "--set_sizes": LISTS,
    "--relearn": counts(-1, 3),
    "--relearn_rate": NUMBERS,
    "--relearn_on": st.sampled_from(["forget", "retain", "forget,retain", "test"]),
    "--batch_size": counts(-1, 600),
}
SCRIPTS = {
    "main_original_model.py": COMMON | TRAINING,
    "main_unlearn.py": COMMON | TRAINING | SCENARIO | OPTIONS,
    "main_unlearn_cpu.py": COMMON | TRAINING | SCENARIO | OPTIONS | CONFORMAL,
}


class Reached(BaseException):
    """The flags were accepted: the training would begin."""


def some_of(known):
    """A few of the flags, each with a value: a list of (flag, value)."""
    pair = st.sampled_from(sorted(known)).flatmap(
        lambda flag: st.tuples(st.just(flag), known[flag])
    )
    return st.lists(pair, min_size=1, max_size=3, unique_by=lambda chosen: chosen[0])


def as_arguments(pairs):
    return [text for pair in pairs.items() for text in pair]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An original and a fine-tuned model of width 8. All examples run in their folder."""
    folder = tmp_path_factory.mktemp("random")
    common = [*TINY, *QUIET, "--num_epochs", 1]
    check(run_in_process("main_original_model.py", *common, cwd=folder))
    finetune = ["main_unlearn.py", *common, "--unlearn_name", "finetune"]
    check(run_in_process(*finetune, cwd=folder))
    root = folder / "runs/resnet18w8_digits_seed1"
    return SimpleNamespace(folder=folder, root=root, original=root / "original_model.pth")


def is_one_line(done):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and ": error: " in lines[0], done


# ---------------------------------------------------------------- flags


@pytest.mark.parametrize("script", SCRIPTS)
@settings(FUZZ, max_examples=120)
@given(data=st.data())
def test_random_flags_are_refused_or_used_as_given(script, data, trained, monkeypatch):
    jobs = []

    def run_and_save(job, *_, **__):
        jobs.append(job)
        raise Reached

    monkeypatch.setattr(unlearn, "run_and_save", run_and_save)
    chosen = dict(data.draw(some_of(SCRIPTS[script])))
    fixed = {"--width": "8", "--device": "cpu", "--wandb_mode": "disabled", "--num_epochs": "2"}
    if script != "main_original_model.py":
        fixed["--unlearn_name"] = data.draw(st.sampled_from(["finetune", "all"]))
    arguments = as_arguments(fixed | chosen)
    try:
        done = run_in_process(script, *arguments, "--overwrite", cwd=trained.folder)
    except Reached:
        is_used(chosen, jobs[0])
    else:
        is_one_line(done)


def is_used(chosen, job):
    """Assert that a job has the numbers of the flags ``chosen``."""
    for flag, value in chosen.items():
        name = flag[2:]
        if name in ("num_epochs", "batch_size", "learning_rate") and job.recipe:
            assert getattr(job.recipe, name) == float(value)
        if name in job.options and name != "mask_path":
            assert job.options[name] == float(value)
        if flag in CONFORMAL:
            assert getattr(job.term, name) == float(value)
        if name == "retain_ratio" and job.split.folder.startswith("random"):
            assert len(job.split.retain) == round(797 * float(value))


@settings(FUZZ, max_examples=40)
@given(pairs=some_of(EVALUATION))
def test_random_flags_of_an_evaluation_are_refused_or_give_possible_numbers(pairs, trained):
    chosen = {"--unlearn_name": "finetune", "--resplits": "2", "--alphas": "0.1"} | dict(pairs)
    arguments = [*as_arguments(chosen), *TINY, *QUIET, "--no_pictures"]
    done = run_in_process("main_evaluate.py", *arguments, cwd=trained.folder)
    if done.returncode:
        return is_one_line(done)
    results = read_json(trained.root / "random_0.9/finetune/results.json")
    alphas = [float(text) for text in chosen["--alphas"].split(",") if text.strip()]
    for row in results["metrics"]["conformal"]:
        assert all(0 <= row[key] <= 1 for key in ("forget_coverage", "test_coverage", "MIACR"))
        assert all(0 <= row[key] <= 10 for key in ("forget_set_size", "test_set_size"))
        assert row["alpha"] in alphas


# ---------------------------------------------------------------- checkpoints


def load(path, digits):
    """A state_dict, read and checked as the scripts do."""
    model = ResNet18(10, 8)
    state, meta = checkpoint.read(path)
    checkpoint.check_meta(path, meta, flags(), digits)
    checkpoint.load_weights(model, state, path)
    return model.state_dict()


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "zero"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=3,
)


def change(content, kind, place, more):
    """Change a bytearray near ``place``, a share of its length."""
    start = int(place * len(content))
    if kind == "folder":  # an entry of the archive is marked as a folder
        content[content.rindex(b"PK\1\2") + 38] ^= 0x10
    elif kind == "cut":
        del content[start:]
    elif kind == "insert":
        content[start:start] = more
    else:
        for index in range(start, min(start + len(more), len(content))):
            byte = more[index - start]
            content[index] = 0 if kind == "zero" else content[index] ^ byte


def is_refused_or_equal(path, expected, digits):
    """Whether a checkpoint is refused in one line. Otherwise it holds the expected tensors."""
    try:
        state = load(path, digits)
    except utils.UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return True
    for name, tensor in expected.items():
        assert state[name].equal(tensor.to(state[name].dtype)), name
    return False


@settings(FUZZ, max_examples=200)
@given(changes=CHANGES)
@example(changes=[("insert", 1.0, b"x")])
@example(changes=[("folder", 0.0, b"x")])
def test_checkpoint_with_changed_bytes_is_refused_or_unchanged(changes, trained, digits, tmp_path):
    content = bytearray(trained.original.read_bytes())
    expected = checkpoint.read(trained.original)[0]
    for kind, place, more in changes:
        change(content, kind, place, more)
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    is_refused_or_equal(path, expected, digits)


def test_checkpoint_with_a_flipped_bit_is_refused_or_unchanged(trained, digits, tmp_path):
    content = trained.original.read_bytes()
    expected = checkpoint.read(trained.original)[0]
    rng = torch.Generator().manual_seed(0)
    places = torch.randint(len(content), (150,), generator=rng).tolist()
    places += [0, 1, 30, len(content) - 20, len(content) - 1]
    path = tmp_path / "damaged.pth"
    refused = 0
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        refused += is_refused_or_equal(path, expected, digits)
    assert refused > len(places) // 2  # the others are padding


@pytest.mark.parametrize("share", [0.0, 1e-6, 1e-4, 0.3, 0.5, 0.99999])
def test_checkpoint_that_is_cut_off_anywhere_is_refused(share, trained, tmp_path):
    content = trained.original.read_bytes()
    path = tmp_path / "cut.pth"
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(utils.UserError, match="cut.pth"):
        checkpoint.read(path)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
TENSORS = {
    "nan": lambda tensor: tensor.double().fill_(math.nan),
    "infinite": lambda tensor: tensor.double().fill_(-math.inf),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "integers": lambda tensor: tensor.long(),
    "truth": lambda tensor: tensor.bool(),
    "sparse": lambda tensor: tensor.float().to_sparse(),
    "longer": lambda tensor: torch.cat([tensor.reshape(-1), tensor.reshape(-1)]),
    "empty": lambda tensor: torch.empty(0),
    "half": lambda tensor: tensor.half(),
    "meta": lambda tensor: tensor.to("meta"),
    "text": lambda tensor: "tensor",
    "missing": None,
}


META_KEYS = ("identity", "recipe", "width", "data_fingerprint", "forget_set")
META = st.fixed_dictionaries({}, optional=dict.fromkeys(META_KEYS, PLAIN))


@settings(FUZZ, max_examples=150)
@given(
    place=st.integers(0, 10_000),
    kind=st.sampled_from(sorted(TENSORS)),
    more=st.dictionaries(WORDS, PLAIN, max_size=1),
    meta=st.one_of(st.none(), PLAIN, META),
)
def test_checkpoint_with_other_contents_is_refused_or_read_as_it_is(
    place, kind, more, meta, trained, digits, tmp_path
):
    """Tensors of other types, missing and superfluous entries, and any metadata."""
    state, good = checkpoint.read(trained.original)
    good.pop("weights")  # the hash would detect all of these changes
    name = list(state)[place % len(state)]
    tensor = state.pop(name)
    if TENSORS[kind]:
        state[name] = TENSORS[kind](tensor)
    path = tmp_path / "model.pth"
    torch.save({"model": state | more, "meta": good if meta is None else meta}, path)
    if not is_refused_or_equal(path, state, digits):
        assert not more
        assert all(tensor.isfinite().all() for tensor in load(path, digits).values())
