"""The commands and instructions of the README work as written."""

import re
import shlex
import shutil
import sys
from functools import partial

from helpers import COMMON, QUIET, ROOT, check, readme_block, run_forked
from test_data_and_models import PUBLISHED
from test_pipeline import read_table


def shell_commands(block):
    """The words of every command of a shell script, with the values of its variables."""
    variables, commands = {}, []
    for line in block.splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words = shlex.split(line)
        if assignment := re.fullmatch(r"([A-Z]+)=(.*)", words[0]):
            variables[assignment[1]] = assignment[2]
        else:
            commands.append(words)
    return commands


def flags_of(words):
    """{flag: value} of the words after a script's name."""
    assert len(words) % 2 == 0 and all(flag.startswith("--") for flag in words[::2])
    return dict(zip(words[::2], words[1::2], strict=True))


def test_published_command_lines_are_in_the_readme():
    """The README breaks them over lines and defines common flags as variables."""
    written = shell_commands(readme_block("published"))
    for line, words in zip(PUBLISHED, written, strict=True):
        script, *flags = line.split()
        assert words[:2] == ["python", script]
        assert flags_of(words[2:]) == flags_of(flags)


def import_from(project):
    """Make the fork of a test import the project's modules from a copy of it."""
    modules_of_project = {path.stem for path in project.iterdir()}
    for name in [name for name in sys.modules if name.partition(".")[0] in modules_of_project]:
        del sys.modules[name]
    sys.path.insert(0, str(project))


def test_method_and_metric_are_added_as_the_readme_says(tmp_path):
    project = tmp_path / "project"
    left_out = shutil.ignore_patterns(".*", "data", "runs", "tests", "__pycache__")
    shutil.copytree(ROOT, project, ignore=left_out)
    with open(project / "unlearn.py", "a") as file:
        file.write(f"\n\n{readme_block('method')}")
    (project / "metrics/confidence.py").write_text(readme_block("metric"))
    package = project / "metrics/__init__.py"
    text = package.read_text()
    added = re.sub(
        r"^MODULES = \(([^)]*)\)",
        r"from . import confidence  # noqa: E402\n\nMODULES = (\1, confidence)",
        text,
        flags=re.MULTILINE,
    )
    assert added != text
    package.write_text(added)

    def run(*command):
        before = partial(import_from, project)
        return check(run_forked(*command, cwd=tmp_path, root=project, before=before))

    run("main_original_model.py", *COMMON, "--num_epochs", 1)
    assert re.search("catastrophic +num_epochs 5", run("main_unlearn.py", "--help").stdout)
    added = [*COMMON, "--unlearn_name", "catastrophic", "--num_epochs", 1]
    run("main_unlearn.py", *added)
    run("main_unlearn_cpu.py", *added)
    evaluate = [*COMMON, "--unlearn_name", "all", "--resplits", 2, "--alphas", 0.1]
    done = run("main_evaluate.py", *evaluate, "--columns", "all")
    rows = read_table(tmp_path / "runs/resnet18w8_digits_seed1/random_0.9/results.csv")
    assert {row["method"] for row in rows} == {"original", "catastrophic", "cpu_catastrophic"}
    assert "conf_f %" in done.stdout
    assert all(0 <= float(row["forget_confidence"]) <= 1 for row in rows)


def test_logits_of_another_program_are_evaluated_as_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = readme_block("logits")
    exec(program.replace('"..."', '""'), {})
    evaluate = ["main_evaluate.py", *QUIET, "--unlearn_name", "all", "--no_pictures"]
    done = check(run_forked(*evaluate, cwd=tmp_path))
    fingerprint = re.search("^data=([0-9a-f]+)$", done.stdout, re.MULTILINE)[1]
    exec(program.replace("...", fingerprint), {})
    check(run_forked(*evaluate, cwd=tmp_path))
    rows = read_table(tmp_path / "runs/resnet18_digits_seed1/random_0.9/results.csv")
    assert {row["method"] for row in rows} == {"my_method"} and rows[0]["weights"] == "mine"
    exec(program.replace("...", "0123"), {})
    refused = run_forked(*evaluate, cwd=tmp_path)
    assert refused.returncode == 2 and "my_method/logits.npz" in refused.stderr
