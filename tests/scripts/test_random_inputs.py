"""Random flags and damaged checkpoints give a correct result, or one line and status 2.

The scripts run in this process.
"""

from types import SimpleNamespace

import pytest
import torch
from helpers import QUIET, TINY, check, read_json, run_in_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import checkpoint
from models.errors import UserError

FUZZ = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)
ODD_NUMBERS = ["1e-3", "1_0", "0x10", "", "-", "1,2", "inf", "nan", "²", "-1", "0"]
NUMBERS = st.one_of(
    st.sampled_from(["1", "2", "8", "0.01", "0.5"]),
    st.integers(-(10**20), 10**20).map(str),
    st.floats().map(str),
    st.sampled_from(ODD_NUMBERS),
    WORDS,
)
LISTS = st.lists(NUMBERS, max_size=3).map(",".join)
EVALUATION = {
    "--unlearn_name": st.sampled_from(["finetune", "RL,GA", "all", "none", ""]),
    "--unlearn_type": st.sampled_from(["random", "class", "subclass", "list", "half"]),
    "--forget_class": NUMBERS,
    "--alphas": LISTS,
    "--cal_sizes": LISTS,
    "--resplits": st.integers(-1, 4).map(str) | WORDS,
    "--score": st.lists(st.sampled_from(["thr", "aps", "raps", "lac"]), max_size=2).map(",".join),
    "--relearn": st.integers(-1, 3).map(str) | WORDS,
    "--relearn_on": st.sampled_from(["forget", "retain", "forget,retain", "test"]),
    "--batch_size": st.integers(-1, 600).map(str) | WORDS,
}


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


@settings(FUZZ, max_examples=25)
@given(
    pairs=st.sampled_from(sorted(EVALUATION)).flatmap(
        lambda flag: st.tuples(st.just(flag), EVALUATION[flag])
    )
)
def test_random_flag_of_an_evaluation_is_refused_or_gives_possible_numbers(pairs, trained):
    chosen = {"--unlearn_name": "finetune", "--resplits": "2", "--alphas": "0.1"} | dict([pairs])
    arguments = [text for pair in chosen.items() for text in pair]
    command = ["main_evaluate.py", *arguments, *TINY, *QUIET, "--no_pictures"]
    done = run_in_process(*command, cwd=trained.folder)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and len(lines) == 1 and ": error: " in lines[0], done
        return
    results = read_json(trained.root / "random_0.9/finetune/results.json")
    alphas = [float(text) for text in chosen["--alphas"].split(",") if text.strip()]
    for row in results["metrics"]["conformal"]:
        assert all(0 <= row[key] <= 1 for key in ("forget_coverage", "test_coverage", "MIACR"))
        assert all(0 <= row[key] <= 10 for key in ("forget_set_size", "test_set_size"))
        assert row["alpha"] in alphas


# ---------------------------------------------------------------- checkpoints


@settings(FUZZ, max_examples=200)
@given(kind=st.sampled_from(["flip", "cut", "insert"]), place=st.floats(0, 0.99999))
def test_damaged_checkpoint_is_refused_or_unchanged(kind, place, trained, tmp_path):
    expected, _ = checkpoint.read(trained.original)
    content = bytearray(trained.original.read_bytes())
    start = int(place * len(content))
    if kind == "cut":
        del content[start:]
    elif kind == "insert":
        content[start:start] = b"x"
    else:
        content[start] ^= 1 << start % 8
    path = tmp_path / "damaged.pth"
    path.write_bytes(content)
    try:
        state, _ = checkpoint.read(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert kind != "cut" and state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
