"""Error messages of scripts in an interpreter of their own. tests/unit/test_errors.py has more."""

from helpers import QUIET, TINY, fails_in_one_line, run_script


def test_mistake_in_a_flag_ends_script_with_one_line(tmp_path):
    command = ["main_unlearn.py", *TINY, *QUIET, "--unlearn_name", "finetune"]
    done = run_script(*command, "--retain_ratio", "1.5", cwd=tmp_path)
    fails_in_one_line(done, "main_unlearn.py", "--retain_ratio 1.5")
    assert done.stdout == "" and not list(tmp_path.iterdir())


def test_missing_compiler_ends_script_with_one_line(tmp_path):
    environment = {"CXX": "/nowhere/c++", "PATH": "/nowhere"}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = ["main_original_model.py", *TINY, *QUIET, "--compile"]
    done = run_script(*command, cwd=tmp_path, env=environment)
    fails_in_one_line(done, "main_original_model.py", "--compile")
