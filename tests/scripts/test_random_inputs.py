"""Whatever the flags and the bytes of a checkpoint: a right result, or one line and status 2; never
a traceback.
"""

import contextlib
import io
import math
import sys

import pytest
import torch
from conftest import TINY, flags, read_json, succeed
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import main_evaluate
import main_original_model
import main_unlearn
import main_unlearn_cpu
import unlearn
import utils
from models.resnet import ResNet18

FUZZ = settings(
    derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
USUAL = st.sampled_from(["1", "2", "3", "8", "0.01", "0.1", "0.5", "0.9"])
NUMBERS = st.one_of(
    USUAL, USUAL, USUAL, st.integers(-(10**20), 10**20).map(str), st.floats().map(str), st.floats(0, 1).map(str),
    st.sampled_from(["1e-3", "1_0", "0x10", "", "-", "1,2", "inf", "nan", "²", "-1", "0"]), WORDS,
)  # fmt: skip
LISTS = st.lists(NUMBERS, max_size=3).map(",".join)
COMMON = {
    "--num_classes": NUMBERS, "--image_size": NUMBERS, "--seed": NUMBERS, "--memory_gb": NUMBERS, "--workers": NUMBERS,
    "--data_name": st.sampled_from(["digits", "mnist", "image_folder"]), "--data_dir": WORDS, "--device": WORDS,
    "--model_name": WORDS, "--width": NUMBERS, "--wandb_mode": WORDS, "--seeds": LISTS,
}  # fmt: skip
TRAINING = {
    "--batch_size": NUMBERS, "--num_epochs": NUMBERS, "--learning_rate": NUMBERS, "--milestones": LISTS,
    "--save_every": NUMBERS, "--precision": st.sampled_from(["auto", "fp32", "fp8"]),
}  # fmt: skip
SCENARIO = {
    "--unlearn_name": st.sampled_from(["finetune", "RL,GA", "scrub", "salun", "ssd", "sfron", "all", "none", ""]),
    "--unlearn_type": st.sampled_from(["random", "class", "subclass", "list", "half"]),
    "--retain_ratio": NUMBERS, "--forget_class": NUMBERS, "--forget_list": WORDS, "--model_dir": WORDS,
}  # fmt: skip
OPTIONS = {f"--{name}": NUMBERS for name in unlearn.OPTIONS}
CONFORMAL = {"--alpha": NUMBERS, "--delta": NUMBERS, "--lamda": NUMBERS}
EVALUATION = {
    "--alphas": LISTS, "--cal_sizes": LISTS, "--resplits": st.one_of(st.integers(-1, 4).map(str), WORDS),
    "--score": st.lists(st.sampled_from(["thr", "aps", "raps", "saps", "lac"]), max_size=2).map(",".join),
    "--raps_penalty": NUMBERS, "--raps_k": NUMBERS, "--saps_weight": NUMBERS, "--set_sizes": LISTS,
    "--relearn": st.one_of(st.integers(-1, 3).map(str), WORDS), "--relearn_rate": NUMBERS,
    "--batch_size": st.one_of(st.integers(-1, 600).map(str), WORDS),
}  # fmt: skip
SCRIPTS = {
    main_original_model: COMMON | TRAINING,
    main_unlearn: COMMON | TRAINING | SCENARIO | OPTIONS,
    main_unlearn_cpu: COMMON | TRAINING | SCENARIO | OPTIONS | CONFORMAL,
}


class Reached(BaseException):
    """The flags were accepted: the training would begin."""


def some_of(known):
    """A few of the flags, each with a value: a list of (flag, value)."""
    pair = st.sampled_from(sorted(known)).flatmap(lambda flag: st.tuples(st.just(flag), known[flag]))
    return st.lists(pair, min_size=1, max_size=3, unique_by=lambda chosen: chosen[0])


def call(script, *arguments, cwd):
    """Run a script's main in this process. Returns (status, stderr)."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        sys.argv = [f"{script.__name__}.py", *map(str, arguments)]
        try:
            utils.run_script(script.main)
        except SystemExit as end:
            return end.code, err.getvalue()
        finally:
            sys.argv = argv


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """An original and a fine-tuned model, of width 8, where all examples run."""
    folder = tmp_path_factory.mktemp("fuzz")
    common = [*TINY, "--wandb_mode", "disabled", "--num_epochs", 1]
    succeed("main_original_model.py", *common, cwd=folder)
    succeed("main_unlearn.py", *common, "--unlearn_name", "finetune", cwd=folder)
    return folder


def is_one_line(status, said, arguments):
    lines = said.strip().splitlines()
    assert status == 2 and len(lines) == 1 and ": error: " in lines[0], f"{arguments}\n{status}\n{said}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
@settings(FUZZ, max_examples=120)
@given(data=st.data())
def test_flags(script, data, done, monkeypatch):
    """They are refused in one line, or what they say is what the run would do."""
    jobs = []

    def execute(job, *_):
        jobs.append(job)
        raise Reached

    monkeypatch.setattr(unlearn, "execute", execute)
    chosen = dict(data.draw(some_of(SCRIPTS[script])))
    arguments = [part for flag, value in chosen.items() for part in (flag, value)]
    fixed = {"--width": "8", "--device": "cpu", "--wandb_mode": "disabled", "--num_epochs": "2"}
    fixed |= (
        {} if script is main_original_model else {"--unlearn_name": data.draw(st.sampled_from(["finetune", "all"]))}
    )
    fixed = {flag: value for flag, value in fixed.items() if flag not in chosen}
    arguments += [part for flag, value in fixed.items() for part in (flag, value)]
    try:
        status, said = call(script, *arguments, "--overwrite", cwd=done)
    except Reached:
        job = jobs[0]
        for flag, value in chosen.items():
            if flag in ("--num_epochs", "--batch_size", "--learning_rate") and job.recipe:
                assert getattr(job.recipe, flag[2:]) == float(value)
            if flag[2:] in job.options and flag != "--mask_path":
                assert job.options[flag[2:]] == float(value)
            if flag in CONFORMAL:
                assert getattr(job.term, flag[2:]) == float(value)
            if flag == "--retain_ratio" and job.split.folder.startswith("random"):
                assert len(job.split.retain) == round(797 * float(value))
    else:
        is_one_line(status, said, arguments)


@settings(FUZZ, max_examples=40)
@given(
    chosen=some_of(EVALUATION | {key: SCENARIO[key] for key in ("--unlearn_name", "--unlearn_type", "--forget_class")})
)
def test_flags_of_an_evaluation(chosen, done):
    """They are refused in one line, or every number is one that can be."""
    given_flags = dict(chosen)
    fixed = {"--unlearn_name": "finetune", "--resplits": "2", "--alphas": "0.1"}
    fixed = {flag: value for flag, value in fixed.items() if flag not in given_flags}
    arguments = [part for pair in (*fixed.items(), *given_flags.items()) for part in pair]
    arguments += [*TINY, "--wandb_mode", "disabled", "--no_pictures"]
    status, said = call(main_evaluate, *arguments, cwd=done)
    if status:
        return is_one_line(status, said, arguments)
    folder = done / "runs/resnet18w8_digits_seed1/random_0.9/finetune"
    for row in read_json(folder / "results.json")["metrics"]["conformal"]:
        assert 0 <= row["forget_coverage"] <= 1 and 0 <= row["test_coverage"] <= 1 and 0 <= row["MIACR"] <= 1
        assert 0 <= row["forget_set_size"] <= 10 and 0 <= row["test_set_size"] <= 10
        assert str(row["alpha"]) in map(
            str, map(float, (given_flags | fixed)["--alphas"].strip(",").replace(",,", ",").split(","))
        )


# ---------------------------------------------------------------- bytes of a checkpoint


def load(path, digits):
    """Read a model as all scripts do."""
    model = ResNet18(10, 8)
    state, meta = utils.read_checkpoint(path)
    utils.check_meta(path, meta, flags(), digits)
    utils.load_weights(model, state, path)
    return model.state_dict()


CHANGES = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "insert", "zero"]), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=3,
)


@settings(FUZZ, max_examples=200)
@given(changes=CHANGES)
@example(changes=[("insert", 1.0, b"x")])
@example(changes=[("mark", 0.0, b"x")])
def test_bytes_of_a_checkpoint(changes, done, digits, tmp_path):
    """It is refused, or holds the very same weights."""
    source = done / "runs/resnet18w8_digits_seed1/original_model.pth"
    content, expected = bytearray(source.read_bytes()), utils.read_checkpoint(source)[0]
    for kind, place, more in changes:
        at = int(place * len(content))
        if kind == "mark":  # an entry of the archive becomes a folder
            content[content.rindex(b"PK\1\2") + 38] ^= 0x10
        elif kind == "cut":
            del content[at:]
        elif kind == "insert":
            content[at:at] = more
        else:
            for offset, byte in enumerate(more):
                if at + offset < len(content):
                    content[at + offset] = 0 if kind == "zero" else content[at + offset] ^ byte
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    try:
        found = load(path, digits)
    except utils.UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert all(found[name].equal(tensor) for name, tensor in expected.items())


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


@settings(FUZZ, max_examples=150)
@given(
    place=st.integers(0, 121), kind=st.sampled_from(sorted(TENSORS)), more=st.dictionaries(WORDS, PLAIN, max_size=1),
    meta=st.one_of(st.none(), PLAIN, st.fixed_dictionaries({}, optional={
        "identity": PLAIN, "recipe": PLAIN, "width": PLAIN, "data_fingerprint": PLAIN, "forget_set": PLAIN,
    })),
)  # fmt: skip
def test_contents_of_a_checkpoint(place, kind, more, meta, done, digits, tmp_path):
    """Tensors of another kind, missing and superfluous ones, and any meta: refused in one line, or
    read as they are.
    """
    state, good = utils.read_checkpoint(done / "runs/resnet18w8_digits_seed1/original_model.pth")
    good.pop("weights")  # the hash, which would find all of these
    name = list(state)[place]
    original = state.pop(name)
    if TENSORS[kind]:
        state[name] = TENSORS[kind](original)
    path = tmp_path / "model.pth"
    torch.save({"model": state | more, "meta": good if meta is None else meta}, path)
    try:
        found = load(path, digits)
    except utils.UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert not more and all(found[key].equal(state[key].to(found[key].dtype)) for key in state)
        assert all(tensor.isfinite().all() for tensor in found.values())
