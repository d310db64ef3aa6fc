"""Whole scripts on other data and other networks than the default, and the published commands."""

from faults import unchecked_cifar
from helpers import COMMON, QUIET, check, read_json, run_forked, write_cifar10, write_pictures
from test_pipeline import read_table

PUBLISHED = """
main_original_model.py --model_name resnet18 --data_name cifar10 --data_dir ./data --batch_size 64 --num_epochs 200 --learning_rate 0.1 --num_classes 10
main_unlearn.py --unlearn_name retrain --unlearn_type random --model_name resnet18 --data_name cifar10 --data_dir ./data --model_dir original_model.pth --num_epochs 200 --num_classes 10 --retain_ratio 0.9 --learning_rate 0.01
main_unlearn_cpu.py --unlearn_name finetune --unlearn_type random --model_name resnet18 --data_name cifar10 --data_dir ./data --model_dir original_model.pth --num_epochs 20 --num_classes 10 --retain_ratio 0.9 --learning_rate 0.1 --delta 0.01 --alpha 0.05 --lamda 0.5
main_evaluate.py --unlearn_name retrain --unlearn_type random --model_name resnet18 --data_name cifar10 --data_dir ./data --model_dir unlearning_model.pth --num_classes 10 --retain_ratio 0.9 --alphas 0.05
""".strip().splitlines()  # noqa: E501 - these lines are public and stay as they were published


def test_published_command_lines_run_and_use_their_flags(tmp_path):
    write_cifar10(tmp_path / "data", images_per_batch=12)
    for line in PUBLISHED:
        fewer = ["--width", "8"]
        fewer += [] if line.startswith("main_evaluate") else ["--num_epochs", "1"]
        check(run_forked(*line.split(), *fewer, cwd=tmp_path, before=unchecked_cifar.install))
    folder = tmp_path / "runs/resnet18w8_cifar10_seed1/random_0.9"
    assert [row["method"] for row in read_table(folder / "results.csv")] == ["original", "retrain"]
    assert read_json(folder / "retrain/results.json")["recipe"]["learning_rate"] == 0.01
    identity = read_json(folder / "cpu_finetune/results.json")["identity"]
    assert (identity["alpha"], identity["delta"], identity["lamda"]) == (0.05, 0.01, 0.5)


def test_list_of_file_names_of_an_image_folder_is_forgotten(tmp_path):
    write_pictures(tmp_path / "insects", 60, 60)
    (tmp_path / "request.txt").write_text("ant/0004.png\nbee/0007.png\nbee/0011.png\n")
    data = [*COMMON, "--data_name", "image_folder", "--data_dir", "insects", "--image_size", 12]
    scenario = [*data, "--unlearn_type", "list", "--forget_list", "request.txt"]
    evaluate = [*scenario, "--unlearn_name", "all", "--alphas", "0.2"]
    train = [*data, "--num_epochs", 3, "--num_classes", 2]
    check(run_forked("main_original_model.py", *train, cwd=tmp_path))
    check(run_forked("main_unlearn.py", *scenario, "--unlearn_name", "retrain", cwd=tmp_path))
    check(run_forked("main_evaluate.py", *evaluate, cwd=tmp_path))
    root = tmp_path / "runs/resnet18w8i12_image_folder-insects_seed1"
    (folder,) = root.glob("list_request_*/retrain")
    results = read_json(folder / "results.json")
    assert results["num_forget"] == 3
    assert results["recipe"]["num_epochs"] == 3  # the recipe of the original
    assert results["image_size"] == 12 and results["num_classes"] == 2
    files = [row["file"] for row in read_table(folder / "samples.csv")]
    assert files == ["ant/0004.png", "bee/0007.png", "bee/0011.png"]


def test_vit_trains_and_is_scored(tmp_path):
    """timm's test_vit has 0.4 million parameters and follows the code path of vit in seconds."""
    common = ["--model_name", "test_vit", "--image_size", 32, "--no_pretrained", *QUIET]
    finetune = [*common, "--unlearn_name", "finetune", "--num_epochs", 1]
    check(run_forked("main_original_model.py", *common, "--num_epochs", 1, cwd=tmp_path))
    check(run_forked("main_unlearn_cpu.py", *finetune, cwd=tmp_path))
    check(run_forked("main_evaluate.py", *common, "--unlearn_name", "all", cwd=tmp_path))
    folder = tmp_path / "runs/test-vit-randomi32_digits_seed1/random_0.9"
    assert (folder / "results.csv").is_file()
