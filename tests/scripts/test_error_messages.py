"""The three smoke tests that start an interpreter for an error. tests/unit/test_errors.py has the
others.
"""

import torch
from helpers import QUIET, TINY, fails_in_one_line, run_script

UNLEARN = ["main_unlearn.py", *TINY, *QUIET, "--unlearn_name", "finetune"]


def test_mistake_in_a_flag_ends_script_with_one_line(tmp_path):
    done = run_script(*UNLEARN, "--retain_ratio", "1.5", cwd=tmp_path)
    fails_in_one_line(done, "main_unlearn.py", "--retain_ratio 1.5")
    assert done.stdout == "" and not list(tmp_path.iterdir())


def test_truncated_checkpoint_ends_script_with_one_line(tmp_path):
    path = tmp_path / "half.pth"
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])
    done = run_script(*UNLEARN, "--model_dir", path, cwd=tmp_path)
    fails_in_one_line(done, "main_unlearn.py", "half.pth", "truncated")


def test_missing_compiler_ends_script_with_one_line(tmp_path):
    environment = {"CXX": "/nowhere/c++", "PATH": "/nowhere"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = ["main_original_model.py", *TINY, *QUIET, "--compile"]
    done = run_script(*command, cwd=tmp_path, env=environment)
    fails_in_one_line(done, "main_original_model.py", "--compile", "leave it out")
