"""Terminals without Unicode, and closed output pipes."""

from helpers import COMMON, check, forks, run_forked, start_script

pytestmark = forks


def test_characters_that_the_terminal_cannot_show_are_replaced(tmp_path):
    def run(script, *arguments):
        done = run_forked(script, *COMMON, *arguments, cwd=tmp_path, encoding="ascii")
        return check(done).stdout

    run("main_original_model.py", "--num_epochs", 1)
    finetune = ["--unlearn_name", "finetune", "--num_epochs", 1]
    assert "epoch 1/1" in run("main_unlearn_cpu.py", *finetune)
    arguments = ["--unlearn_name", "cpu_finetune", "--resplits", 2, "--alphas", 0.001]
    output = run("main_evaluate.py", *arguments, "--no_pictures")
    assert "?" in output and "cpu_finetune" in output  # q̂


def test_closed_pipe_ends_a_training_that_can_be_resumed(tmp_path):
    process = start_script("main_original_model.py", *COMMON, "--num_epochs", 500, cwd=tmp_path)
    while "epoch 2/500" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(60) == 141 and "Traceback" not in errors
    assert next(tmp_path.rglob(".resume.pth")).stat().st_size > 100_000
