"""--jobs and --dry_run: several runs in parallel, with the results of one process."""

import os
import shlex
import signal
import sys
from pathlib import Path

from helpers import COMMON, ROOT, check, run_in_process, same_weights, start_script

ORIGINAL = ["main_original_model.py", *COMMON]


def test_dry_run_prints_commands_that_give_the_results_of_jobs(tmp_path):
    seeds = [*ORIGINAL, "--num_epochs", 2, "--seeds", "1,2"]
    done = check(run_in_process(*seeds, "--dry_run", cwd=tmp_path))
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(commands) == 2 and not list(tmp_path.iterdir())
    assert all("--num_epochs=2" in words and "--seeds" not in str(words) for words in commands)
    (tmp_path / "alone").mkdir()
    for words in commands:
        assert words[:2] == [sys.executable, str(ROOT / "main_original_model.py")]
        check(run_in_process(ORIGINAL[0], *words[2:], cwd=tmp_path / "alone"))
    done = check(run_in_process(*seeds, "--jobs", 2, cwd=tmp_path))
    assert done.stderr == ""
    for seed in (1, 2):
        assert f"seed {seed}: original epoch 2/2" in done.stdout
        path = Path(f"runs/resnet18w8_digits_seed{seed}/original_model.pth")
        assert same_weights(tmp_path / path, tmp_path / "alone" / path)


def test_interrupted_jobs_save_their_states_and_resume(tmp_path):
    command = [*ORIGINAL, "--seeds", "1,2", "--num_epochs", 20, "--jobs", 2]
    process = start_script(*command, cwd=tmp_path)
    seen = set()
    while seen != {"seed 1", "seed 2"}:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        seen |= {line[:6]} if " epoch 2/" in line else set()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and errors.count("\n") == 1 and "--resume" in errors
    assert len(list(tmp_path.glob("runs/*/.resume.pth"))) == 2
    done = check(run_in_process(*command, "--resume", cwd=tmp_path))
    assert done.stdout.count("resuming after epoch") == 2


def test_failed_run_gives_a_status_and_the_others_finish(tmp_path):
    """Nothing can be written below a file."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/resnet18w8_digits_seed1").write_text("a file")
    command = [*ORIGINAL, "--num_epochs", 1, "--seeds", "1,2", "--jobs", 2]
    done = run_in_process(*command, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    assert os.path.exists(tmp_path / "runs/resnet18w8_digits_seed2/original_model.pth")
