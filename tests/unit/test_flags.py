"""Paths in flags, devices, and what reaches a terminal."""

import argparse
from pathlib import Path

import pytest
import torch

import utils


@pytest.mark.parametrize(
    "flag", ["--runs_dir", "--data_dir", "--pretrained_path", "--model_dir", "--forget_list"]
)
def test_home_directory_in_a_flag_is_expanded(flag, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    parser = utils.make_parser("")
    utils.add_scenario_flags(parser, "", "original_model.pth")
    for text, expected in (
        ("~/x", "/home/someone/x"),
        ("./~x", "./~x"),
        ("a/~", "a/~"),
        ("x y", "x y"),
    ):
        args = parser.parse_args(["--unlearn_name", "all", f"{flag}={text}"])
        assert getattr(args, flag[2:]) == expected


@pytest.mark.parametrize(
    ("text", "words"), [("", "empty"), ("  ", "empty"), ("~nobody-here/x", "no such user")]
)
def test_implausible_path_is_refused(text, words):
    with pytest.raises(utils.UserError, match=f"--runs_dir.*{words}"):
        utils.make_parser("").parse_args([f"--runs_dir={text}"])


@pytest.mark.parametrize(
    "device", ["mps", "xla", "meta", "cuda:99", "CPU", "", "gpu", "vulkan", "cpu:x", "hpu"]
)
def test_missing_device_is_refused_in_one_short_line(device, monkeypatch):
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    with pytest.raises(utils.UserError) as caught:
        utils.pick_device(argparse.Namespace(device=device))
    line = str(caught.value)
    assert line.startswith(f"--device {device}: ") and line.endswith("use --device cpu or auto")
    assert "\n" not in line and len(line) < 320


@pytest.mark.parametrize(("flag", "number"), [("auto", 0), ("cuda", 0), ("cuda:1", 1)])
def test_gpu_is_selected_by_its_number(flag, number, monkeypatch):
    """torch.cuda.set_device refuses "cuda" without a number."""
    selected = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(
        "torch.empty", lambda size, device: argparse.Namespace(device=torch.device("cuda", number))
    )
    monkeypatch.setattr("torch.cuda.set_device", selected.append)
    assert utils.pick_device(argparse.Namespace(device=flag)) == torch.device("cuda", number)
    assert [device.index for device in selected] == [number]


def test_every_script_imports_utils_before_torch():
    """utils sets OpenMP's variable, which torch reads when it is imported."""
    for script in Path(utils.__file__).parent.glob("main_*.py"):
        imports = [
            line
            for line in script.read_text().splitlines()
            if line.startswith(("import ", "from "))
        ]
        assert imports[0].startswith("import utils"), script
    lines = Path(utils.__file__).read_text().splitlines()
    policy = next(number for number, line in enumerate(lines) if "OMP_WAIT_POLICY" in line)
    assert policy < lines.index("import torch")
