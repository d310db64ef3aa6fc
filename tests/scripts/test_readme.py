"""What the README says is tried as it stands."""

import shutil

from conftest import ROOT, TINY, readme_block, run_script, succeed
from test_scripts import PUBLISHED, table_of


def test_the_published_lines_stand_in_the_readme():
    text = (ROOT / "README.md").read_text()
    assert all(f"python {line}\n" in text for line in PUBLISHED)


def test_a_method_and_a_metric_are_added_as_the_readme_says(tmp_path, monkeypatch):
    project = tmp_path / "project"
    shutil.copytree(ROOT, project, ignore=shutil.ignore_patterns(".*", "data", "runs", "tests", "__pycache__"))
    methods = project / "unlearn.py"
    before = "def describe_methods"
    methods.write_text(methods.read_text().replace(before, f"{readme_block('method')}\n\n{before}"))
    (project / "metrics/confidence.py").write_text(readme_block("metric"))
    package = project / "metrics/__init__.py"
    text = package.read_text().replace("import CR, MIA, MIACR, accuracy", "import CR, MIA, MIACR, accuracy, confidence")
    package.write_text(
        text.replace("MODULES = (accuracy, MIA, CR, MIACR)", "MODULES = (accuracy, MIA, CR, MIACR, confidence)")
    )
    monkeypatch.setattr("conftest.ROOT", project)

    common = [*TINY, "--wandb_mode", "disabled"]
    succeed("main_original_model.py", *common, "--num_epochs", 1, cwd=tmp_path)
    assert "catastrophic" in run_script("main_unlearn.py", "--help", cwd=tmp_path).stdout
    succeed("main_unlearn.py", *common, "--unlearn_name", "catastrophic", cwd=tmp_path)
    succeed("main_unlearn_cpu.py", *common, "--unlearn_name", "catastrophic", cwd=tmp_path)
    done = succeed("main_evaluate.py", *common, "--unlearn_name", "all", "--resplits", 2, cwd=tmp_path)
    rows = table_of(tmp_path / "runs/resnet18w8_digits_seed1/random_0.9/results.csv")
    assert {row["method"] for row in rows} == {"original", "catastrophic", "cpu_catastrophic"}
    assert "p_f" in done.stdout and all(0 <= float(row["forget_confidence"]) <= 1 for row in rows)
