"""Images beyond --memory_gb stay on disk, with the same results; images that cannot be read are named or left out."""

import json
import shutil

import numpy as np
import pytest
from conftest import TINY, fails_in_one_line, flags, read_json, run_script, succeed
from PIL import Image

import utils
from models import checkpoint

COMMON = ["--data_name", "image_folder", "--wandb_mode", "disabled"]
FOLDER = "resnet18w8_image_folder-pictures_seed1"
TIMES = {"seconds", "images_per_second", "date", "original_seconds", "RTE", "minus_retrain", "flags"}


def make_pictures(root, train, test, side=8):
    """Two classes, the second brighter, as PNG files of noise."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for number in range(count):
            name = ("ant", "bee")[number % 2]
            path = root / part / name / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            low = 60 * (number % 2)
            Image.fromarray(rng.integers(low, low + 150, (side, side, 3)).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "pictures"
    make_pictures(root, 90, 60)
    return root


def run_all(pictures, where, *how, epochs=2):
    """Original, fine-tuning and evaluation in the folder ``where``."""
    common = [*TINY, *COMMON, "--data_dir", pictures, *how]
    succeed("main_original_model.py", *common, "--num_epochs", epochs, cwd=where)
    succeed("main_unlearn.py", *common, "--unlearn_name", "finetune", "--num_epochs", epochs, cwd=where)
    done = succeed(
        "main_evaluate.py", *common, "--unlearn_name", "finetune", "--resplits", 2, "--alphas", 0.2, cwd=where
    )
    folder = where / "runs" / FOLDER / "random_0.9/finetune"
    weights = checkpoint.weights_hash(checkpoint.read(folder / "unlearning_model.pth")[0])
    return weights, plain(read_json(folder / "results.json")), done.stdout


def plain(record):
    """A record without times, dates and the flags themselves."""
    if isinstance(record, dict):
        return {key: plain(value) for key, value in record.items() if key not in TIMES}
    return [plain(item) for item in record] if isinstance(record, list) else record


@pytest.fixture(scope="module")
def in_memory(pictures, tmp_path_factory):
    return run_all(pictures, tmp_path_factory.mktemp("memory"))


def test_the_same_flags_give_the_same_results_twice(pictures, in_memory, tmp_path):
    again = run_all(pictures, tmp_path)
    assert again[:2] == in_memory[:2] and len(json.dumps(again[1])) > 2000


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_images_on_disk_give_the_same_results_with_any_number_of_workers(workers, pictures, in_memory, tmp_path):
    weights, results, said = run_all(pictures, tmp_path, "--memory_gb", 0, "--workers", workers)
    assert "streamed from disk" in said and "streamed from disk" not in in_memory[2]
    assert weights == in_memory[0] and results == in_memory[1]


def test_data_larger_than_memory(tmp_path):
    """570 MB of pixels (160×160 from small files) where 530 MB are left at the start."""
    make_pictures(tmp_path / "pictures", 40, 7400)
    limit = tmp_path / "limit"
    limit.mkdir()
    (limit / "sitecustomize.py").write_text(
        "import resource, sys\n"
        "if sys.argv[0].endswith('main_original_model.py'):\n"
        "    import torch, timm, sklearn.datasets, torchvision.transforms.v2, tqdm\n"
        "    torch.nn.Conv2d(3, 8, 3)(torch.zeros(64, 3, 160, 160)).sum().backward()\n"
        "    (line,) = (line for line in open('/proc/self/status') if line.startswith('VmSize'))\n"
        "    most = int(line.split()[1]) * 1024 + 530_000_000\n"
        "    resource.setrlimit(resource.RLIMIT_AS, (most, most))\n"
    )
    arguments = [
        "--model_name",
        "test_vit.r160_in1k",
        "--no_pretrained",
        "--image_size",
        160,
        "--num_epochs",
        1,
        "--batch_size",
        16,
    ]
    command = ["main_original_model.py", *COMMON, "--data_dir", "pictures", "--device", "cpu", *arguments]
    fails_in_one_line(
        run_script(*command, cwd=tmp_path, python_path=limit, env={"MALLOC_ARENA_MAX": "1"}),
        "--memory_gb 8",
        "lower it",
    )
    done = run_script(*command, "--memory_gb", 0.1, cwd=tmp_path, python_path=limit, env={"MALLOC_ARENA_MAX": "1"})
    assert done.returncode == 0, done.stderr
    assert "0.57 GB of pixels, more than --memory_gb 0.1" in done.stdout


@pytest.fixture
def damaged(pictures, tmp_path):
    """The pictures with one training image cut off in the middle and a held-out one that is text."""
    shutil.copytree(pictures, tmp_path / "pictures")
    path = tmp_path / "pictures/train/bee/0041.png"
    path.write_bytes(path.read_bytes()[:120])
    (tmp_path / "pictures/test/ant/0004.png").write_text("not a picture")
    return tmp_path


@pytest.mark.parametrize("how", [[], ["--image_size", 8, "--memory_gb", 0]], ids=["in memory", "on disk"])
def test_a_corrupt_image_is_named_or_left_out(how, damaged):
    command = ["main_original_model.py", *TINY, *COMMON, "--data_dir", "pictures", "--num_epochs", 1, *how]
    fails_in_one_line(run_script(*command, cwd=damaged), ".png: cannot read image", "--skip_corrupt")
    done = succeed(*command, "--skip_corrupt", cwd=damaged)
    assert "skipping 2 unreadable images: bee/0041.png, ant/0004.png" in done.stdout
    assert "89 images" in done.stdout


def test_a_folder_without_one_readable_image(damaged):
    for path in (damaged / "pictures/test").rglob("*.png"):
        path.write_text("nothing")
    command = ["main_original_model.py", *TINY, *COMMON, "--data_dir", "pictures", "--skip_corrupt"]
    fails_in_one_line(run_script(*command, cwd=damaged), "none of 60 images")


@pytest.mark.parametrize("how", [[], ["--skip_corrupt"]])
def test_a_reader_that_dies_is_an_error_of_one_line(how, pictures, tmp_path):
    """As when the system runs out of memory and kills it."""
    stub = tmp_path / "stub"
    stub.mkdir()
    (stub / "sitecustomize.py").write_text(
        "import multiprocessing, os, signal\n"
        "from PIL import Image\n"
        "plain = Image.open\n"
        "def dies(path, *arguments, **options):\n"
        "    if multiprocessing.parent_process():\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return plain(path, *arguments, **options)\n"
        "Image.open = dies\n"
    )
    command = ["main_original_model.py", *TINY, *COMMON, "--data_dir", pictures, "--memory_gb", 0, "--num_epochs", 1]
    done = run_script(*command, *how, cwd=tmp_path, python_path=stub)
    fails_in_one_line(done, "a data-loading worker died", "--workers")


def test_a_picture_on_disk_is_the_one_in_memory(pictures):
    import torch

    both = [
        utils.load_data(flags(data_name="image_folder", data_dir=str(pictures), memory_gb=size), torch.device("cpu"))
        for size in (8, 0)
    ]
    assert both[0].train.pixels[7].equal(both[1].train.pixels[7]) and both[0].fingerprint == both[1].fingerprint
    state = torch.get_rng_state()
    assert both[1].train.batch(torch.tensor([3, 1])).equal(both[0].train.batch(torch.tensor([3, 1])))
    assert torch.get_rng_state().equal(state)  # of dropout
