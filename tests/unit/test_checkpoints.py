"""Checkpoints from other training code: the same network is loaded, anything else is named in one line."""

import argparse
import collections
import copy
import gzip
import pathlib
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import models
import utils
from models import checkpoint, inference

SPEC = utils.SPECS["cifar10"]


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return models.create_model("resnet18", 10, width=8)


def load(path, spec=SPEC):
    state, meta = checkpoint.read(path)
    torch.manual_seed(1)
    model = models.create_model("resnet18", 10, width=8)
    checkpoint.load_weights(model, state, path, spec)
    return model.state_dict(), meta


def same(one, other):
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


EXTRAS = {
    "epoch": 3, "acc": np.float64(93.2), "best": np.float32(1.5), "count": np.int64(7),
    "args": argparse.Namespace(lr=0.1),
    "losses": np.ones(3), "file": pathlib.Path("a/b"), "counts": collections.Counter("aab"),
}  # fmt: skip


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "net", "model"])
@pytest.mark.parametrize("extras", [{}, EXTRAS])
def test_a_state_dict_under_a_usual_key_is_loaded(key, extras, network, tmp_path):
    torch.save({key: network.state_dict()} | extras, tmp_path / "model.pth")
    found, meta = load(tmp_path / "model.pth")
    assert same(found, network.state_dict()) and meta == {}


def test_nested_keys_are_followed_to_the_state_dict(network, tmp_path):
    torch.save({"model": {"state_dict": network.state_dict(), "epoch": 1}}, tmp_path / "model.pth")
    assert same(load(tmp_path / "model.pth")[0], network.state_dict())


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "_orig_mod.",
        "model.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.module.",
        "net.",
    ],
)
def test_prefixes_of_wrappers_are_removed_in_any_order(prefix, network, tmp_path):
    torch.save(
        {prefix + name: tensor for name, tensor in network.state_dict().items()},
        tmp_path / "model.pth",
    )
    assert same(load(tmp_path / "model.pth")[0], network.state_dict())


def test_a_prefix_that_belongs_to_the_network_is_kept():
    names = ["model.weight", "model.module.bias"]
    state = {name: torch.zeros(1) for name in ("module.model.weight", "model.module.bias")}
    assert list(checkpoint.match_names(state, names, "file")) == names


def test_one_tensor_under_two_names_is_refused(network, tmp_path):
    state = network.state_dict()
    torch.save(state | {"module.fc.bias": state["fc.bias"]}, tmp_path / "model.pth")
    with pytest.raises(utils.UserError, match=r"two of its tensors are fc\.bias"):
        load(tmp_path / "model.pth")


def test_counters_are_optional_and_those_of_profilers_are_left_out(network, tmp_path):
    state = network.state_dict()
    kept = {
        name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")
    }
    counters = {
        "total_ops": torch.tensor([1.0]),
        "layer1.0.conv1.total_params": torch.tensor([2.0]),
    }
    torch.save(kept | counters, tmp_path / "model.pth")
    assert same(load(tmp_path / "model.pth")[0], state)


def test_a_normalize_layer_with_the_constants_of_the_data_is_left_out(network, tmp_path):
    constants = {
        "module.normalize.mean": torch.tensor(SPEC.mean).view(3, 1, 1), "module.normalize.std": torch.tensor(SPEC.std)
    }  # fmt: skip
    torch.save(
        {f"module.{name}": tensor for name, tensor in network.state_dict().items()} | constants,
        tmp_path / "m",
    )
    assert same(load(tmp_path / "m")[0], network.state_dict())
    with pytest.raises(
        utils.UserError, match=r"normalises images with mean .*0\.49.* while this data .*0\.3053"
    ):
        load(tmp_path / "m", utils.SPECS["digits"])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_loaded(kind, network, tmp_path):
    state = {
        name: tensor.to(kind) if tensor.is_floating_point() else tensor
        for name, tensor in network.state_dict().items()
    }
    torch.save(state, tmp_path / "model.pth")
    found, _ = load(tmp_path / "model.pth")
    assert all(found[name].equal(tensor.to(found[name].dtype)) for name, tensor in state.items())


def test_safetensors_are_loaded(network, tmp_path):
    from safetensors.torch import save_file

    save_file(network.state_dict(), tmp_path / "model.safetensors")
    assert same(load(tmp_path / "model.safetensors")[0], network.state_dict())
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(utils.UserError, match="not a safetensors file"):
        load(tmp_path / "model.safetensors")


def test_an_unknown_or_missing_tensor_is_named(network, tmp_path):
    state = network.state_dict()
    torch.save(
        {name: tensor for name, tensor in state.items() if name != "fc.bias"}, tmp_path / "less.pth"
    )
    with pytest.raises(utils.UserError, match=r"1 are missing, e\.g\. fc\.bias"):
        load(tmp_path / "less.pth")
    torch.save(state | {"head.weight": torch.zeros(3)}, tmp_path / "more.pth")
    with pytest.raises(utils.UserError, match=r"1 are unknown, e\.g\. head\.weight"):
        load(tmp_path / "more.pth")


def whole_model(path):
    torch.save(nn.Sequential(nn.Linear(2, 2)), path)


def older_whole_model(path):
    torch.save(nn.Sequential(nn.Linear(2, 2)), path, _use_new_zipfile_serialization=False)


def model_under_a_key(path):
    torch.save({"net": nn.Linear(2, 2)}, path)


def torchscript(path):
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(path)


FOREIGN = {
    "whole pickled model": whole_model,
    "a whole pickled model": older_whole_model,
    "whole pickled model with Python objects (torch.nn": model_under_a_key,
    "TorchScript": torchscript,
    "Git LFS pointer": lambda path: path.write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    ),
    "web page": lambda path: path.write_text("\n<!DOCTYPE html><html><body>Sign in</body></html>"),
    "HDF5": lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100)),
    "gzip": lambda path: path.write_bytes(gzip.compress(b"weights")),
    "NumPy": lambda path: np.save(open(path, "wb"), np.zeros(3)),  # noqa: SIM115
    "zip archive without": lambda path: np.savez(open(path, "wb"), weight=np.zeros(3)),  # noqa: SIM115
    "the file is empty": lambda path: path.write_bytes(b""),
    "os.getcwd": lambda path: path.write_bytes(pickle.dumps({"state_dict": Code()}, protocol=2)),
    "truncated": lambda path: path.write_bytes(b"PK\x03\x04 and no more"),
}


class Code:
    def __reduce__(self):
        import os

        return os.getcwd, ()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", FOREIGN)
def test_a_foreign_file_is_named_in_one_line(words, tmp_path):
    path = tmp_path / "model.pth"
    FOREIGN[words](path)
    with pytest.raises(utils.UserError) as caught:
        checkpoint.read(path)
    line = str(caught.value)
    assert (
        line.startswith(f"{path}: not a checkpoint: ")
        and words.replace("os.", "") in line
        and "\n" not in line
    )


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path):
    with pytest.raises(utils.UserError, match="a folder or device"):
        checkpoint.read(tmp_path)
    with pytest.raises(utils.UserError, match="no such file; train it"):
        checkpoint.read(tmp_path / "none.pth", "train it")
    with pytest.raises(utils.UserError, match="cannot be read .*long"):
        checkpoint.read(tmp_path / ("n" * 300))


def test_outputs_that_are_not_finite_are_an_error(network, digits):
    damaged = copy.deepcopy(network)
    damaged.bn1.running_var.fill_(-1.0)
    with pytest.raises(utils.NotFinite, match="NaN or infinite for 20 of 20 images"):
        inference.compute_logits(damaged, digits.train, torch.arange(20))
