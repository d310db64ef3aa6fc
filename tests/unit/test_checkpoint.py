"""Checkpoints of this and other training code are loaded, or refused with one line."""

import argparse
import collections
import copy
import gzip
import hashlib
import pathlib
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import models
import utils
from models import checkpoint, errors

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


def same(state, expected):
    equal = [state[name].equal(tensor) for name, tensor in expected.items() if name in state]
    return state.keys() == expected.keys() and all(equal)


EXTRAS = {
    "epoch": 3, "acc": np.float64(93.2), "best": np.float32(1.5), "count": np.int64(7),
    "args": argparse.Namespace(lr=0.1),
    "losses": np.ones(3), "file": pathlib.Path("a/b"), "counts": collections.Counter("aab"),
}  # fmt: skip


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "net", "model"])
@pytest.mark.parametrize("extras", [{}, EXTRAS])
def test_state_dict_under_a_usual_key_is_loaded(key, extras, network, tmp_path):
    torch.save({key: network.state_dict()} | extras, tmp_path / "model.pth")
    state, meta = load(tmp_path / "model.pth")
    assert same(state, network.state_dict()) and meta == {}


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


def test_prefix_of_the_network_is_kept():
    names = ["model.weight", "model.module.bias"]
    state = {name: torch.zeros(1) for name in ("module.model.weight", "model.module.bias")}
    assert list(checkpoint.match_names(state, names, "file")) == names


def test_one_tensor_under_two_names_is_refused(network, tmp_path):
    state = network.state_dict()
    torch.save(state | {"module.fc.bias": state["fc.bias"]}, tmp_path / "model.pth")
    with pytest.raises(utils.UserError, match=r"two of its tensors are fc\.bias"):
        load(tmp_path / "model.pth")


def test_missing_batch_norm_counters_and_extra_profiler_counters_are_accepted(network, tmp_path):
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


def test_normalize_layer_with_constants_of_the_data_is_ignored(network, tmp_path):
    mean, std = torch.tensor(SPEC.mean).view(3, 1, 1), torch.tensor(SPEC.std)
    constants = {"module.normalize.mean": mean, "module.normalize.std": std}
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
    loaded, _ = load(tmp_path / "model.pth")
    assert all(loaded[name].equal(tensor.to(loaded[name].dtype)) for name, tensor in state.items())


def test_safetensors_are_loaded(network, tmp_path):
    from safetensors.torch import save_file

    save_file(network.state_dict(), tmp_path / "model.safetensors")
    assert same(load(tmp_path / "model.safetensors")[0], network.state_dict())
    (tmp_path / "model.safetensors").write_bytes(b"short")
    with pytest.raises(utils.UserError, match="not a safetensors file"):
        load(tmp_path / "model.safetensors")


def test_unknown_or_missing_tensor_is_named(network, tmp_path):
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
def test_foreign_file_is_named_in_one_line(words, tmp_path):
    path = tmp_path / "model.pth"
    FOREIGN[words](path)
    with pytest.raises(utils.UserError) as caught:
        checkpoint.read(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: not a checkpoint: ")
    assert words.replace("os.", "") in line
    assert "\n" not in line


def test_folder_missing_file_and_unreadable_name_give_different_errors(tmp_path):
    with pytest.raises(utils.UserError, match="a folder or device"):
        checkpoint.read(tmp_path)
    with pytest.raises(utils.UserError, match="no such file; train it"):
        checkpoint.read(tmp_path / "none.pth", "train it")
    with pytest.raises(utils.UserError, match="cannot be read .*long"):
        checkpoint.read(tmp_path / ("n" * 300))


# ---------------------------------------------------------------- writing and hashing


def test_saved_checkpoint_is_read_with_its_meta(network, tmp_path):
    state = network.state_dict()
    checkpoint.save(tmp_path / "model.pth", state, {"epoch": 3})
    loaded, meta = load(tmp_path / "model.pth")
    assert same(loaded, state)
    assert meta == {"epoch": 3, "weights": checkpoint.weights_hash(state)}
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_tensors_of_a_checkpoint_are_saved_contiguous_and_without_gradient(tmp_path):
    weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    checkpoint.save(tmp_path / "model.pth", {"w": weight.T}, {})
    tensor = checkpoint.read(tmp_path / "model.pth")[0]["w"]
    assert tensor.equal(weight.T) and tensor.is_contiguous() and not tensor.requires_grad


def test_state_on_second_process_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "rank", lambda: 1)
    checkpoint.save_state(tmp_path / "state.pth", {"epoch": 3})
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_previous_file(tmp_path, monkeypatch):
    path = tmp_path / "state.pth"
    checkpoint.save_state(path, {"epoch": 1})

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.os, "replace", full)
    with pytest.raises(utils.UserError, match=r"cannot be written \(No space left on device\)"):
        checkpoint.save_state(path, {"epoch": 2})
    assert checkpoint.read_state(path) == {"epoch": 1} and list(tmp_path.iterdir()) == [path]


def test_size_of_a_run_is_three_times_its_weights_and_a_mebibyte():
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    numbers = 8 * 8 + 8 + 4 * 8
    assert checkpoint.size(model) == 3 * (4 * numbers + 8) + 1_048_576


def test_copy_on_the_cpu_has_the_same_structure():
    weight = nn.Parameter(torch.ones(2))
    copied = checkpoint.on_cpu({"state": [weight, {"step": 3}], "name": "sgd"})
    assert copied["name"] == "sgd" and copied["state"][1] == {"step": 3}
    assert copied["state"][0].equal(weight) and not copied["state"][0].requires_grad


def test_hash_is_sha256_of_names_shapes_and_bytes():
    state = {"b": torch.tensor(7), "a": torch.tensor([[1.0], [2.0]])}
    content = b"a(2, 1)" + np.array([1, 2], dtype="<f4").tobytes() + b"b()7"
    assert checkpoint.weights_hash(state) == hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (4, 2, 1, 1), (1, 1, 3, 3)])
def test_hash_of_channels_last_weights_is_that_of_contiguous_ones(shape):
    weight = torch.randn(shape)
    channels_last = weight.to(memory_format=torch.channels_last)
    assert checkpoint.weights_hash({"w": channels_last}) == checkpoint.weights_hash({"w": weight})


def test_hash_depends_on_values_names_and_shapes_only():
    weight = torch.arange(6.0).view(2, 3)
    state = {"w": weight, "b": torch.zeros(2)}
    expected = checkpoint.weights_hash(state)
    strided = {"b": torch.zeros(2), "w": weight.T.contiguous().T}
    assert checkpoint.weights_hash(strided) == expected
    others = [
        {"w": weight + 1, "b": torch.zeros(2)},
        {"v": weight, "b": torch.zeros(2)},
        {"w": weight.view(3, 2), "b": torch.zeros(2)},
        {"w": weight, "b": torch.zeros(2), "n": torch.tensor(1)},
        {"w": weight, "b": torch.zeros(2), "n": torch.tensor(2)},
    ]
    assert len({checkpoint.weights_hash(other) for other in others} | {expected}) == 6


# ---------------------------------------------------------------- damaged and malformed files


def test_weights_other_than_the_recorded_ones_are_refused(network, tmp_path):
    state = network.state_dict()
    meta = {"weights": checkpoint.weights_hash(state)}
    torch.save({"model": state, "meta": meta}, tmp_path / "model.pth")
    assert same(load(tmp_path / "model.pth")[0], state)
    torch.save({"model": state | {"fc.bias": torch.ones(10)}, "meta": meta}, tmp_path / "model.pth")
    with pytest.raises(utils.UserError, match="damaged: its weights differ"):
        load(tmp_path / "model.pth")


@pytest.mark.parametrize("meta", [[1], "text", {"identity": [1]}, {"recipe": "text"}])
def test_malformed_metadata_is_refused(meta, network, tmp_path):
    torch.save({"model": network.state_dict(), "meta": meta}, tmp_path / "model.pth")
    with pytest.raises(utils.UserError, match="malformed metadata"):
        checkpoint.read(tmp_path / "model.pth")


@pytest.mark.parametrize("meta", [None, {}, {"identity": None, "recipe": {"num_epochs": 2}}])
def test_metadata_may_be_missing(meta, network, tmp_path):
    torch.save({"model": network.state_dict(), "meta": meta}, tmp_path / "model.pth")
    assert checkpoint.read(tmp_path / "model.pth")[1] == (meta or {})


@pytest.mark.parametrize(
    "content",
    [{}, [1, 2], torch.zeros(3), {"model": {}}, {"a": torch.zeros(1), "b": 1}, {"epoch": 3}],
)
def test_content_without_a_state_dict_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(utils.UserError, match="contains no state_dict of tensors"):
        checkpoint.read(tmp_path / "model.pth")


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda tensor: tensor.to("meta")])
def test_sparse_or_meta_tensor_is_named(change, tmp_path):
    torch.save({"a": torch.ones(2), "b": change(torch.ones(2))}, tmp_path / "model.pth")
    with pytest.raises(utils.UserError, match="b is not a dense tensor"):
        checkpoint.read(tmp_path / "model.pth")


def test_state_with_a_changed_byte_is_refused(tmp_path):
    path = tmp_path / "state.pth"
    checkpoint.save_state(path, {"weights": torch.full((64,), 3.0)})
    content = path.read_bytes()
    values = np.full(64, 3, dtype="<f4").tobytes()
    path.write_bytes(content.replace(values, b"\1" + values[1:]))
    with pytest.raises(utils.UserError, match="damaged: it contains a wrong checksum"):
        checkpoint.read_state(path)


@pytest.mark.parametrize("method", ["stat", "open"])
def test_file_without_permission_is_named(method, tmp_path, monkeypatch):
    def refuse(*positional, **options):
        raise PermissionError(13, "Permission denied")

    checkpoint.save_state(tmp_path / "state.pth", {"model": torch.zeros(1)})
    monkeypatch.setattr(pathlib.Path, method, refuse)
    with pytest.raises(utils.UserError, match=r"state.pth: cannot be read \(Permission denied\)"):
        checkpoint.read(tmp_path / "state.pth")


def test_system_error_is_named_with_its_reason(tmp_path, monkeypatch):
    def fail(*positional, **options):
        raise OSError(5, "Input/output error")

    checkpoint.save_state(tmp_path / "state.pth", {})
    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(utils.UserError, match=r"state.pth: cannot be read \(Input/output error\)"):
        checkpoint.read(tmp_path / "state.pth")


# ---------------------------------------------------------------- agreement with flags and network


def data_like():
    """A stand-in for utils.Data: ten classes, 32×32 images."""
    differences = {"other-0": "other training images"}
    return SimpleNamespace(
        classes=[*"abcdefghij"], train=SimpleNamespace(size=32), difference=differences.get
    )


META = {
    "model_name": "resnet18",
    "width": 8,
    "num_classes": 10,
    "image_size": 32,
    "data_name": "cifar10",
}
ARGS = argparse.Namespace(model_name="resnet18", width=8, data_name="cifar10", data_dir="d\n")


def test_checkpoint_of_same_model_and_data_is_accepted(capsys):
    for meta in ({}, META, META | {"data_fingerprint": "same-0"}, dict.fromkeys(META)):
        checkpoint.check_meta("model.pth", meta, ARGS, data_like())
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value", "requested"),
    [
        ("model_name", "vit", "resnet18"),
        ("width", 16, "8"),
        ("num_classes", 100, "10"),
        ("image_size", 64, "32"),
        ("data_name", "digits", "cifar10"),
    ],
)
def test_flag_that_differs_from_the_checkpoint_is_named(key, value, requested):
    message = f"model.pth: made with --{key} {value}, but the flags ask for {requested}$"
    with pytest.raises(utils.UserError, match=message):
        checkpoint.check_meta("model.pth", META | {key: value}, ARGS, data_like())


def test_checkpoint_of_other_images_is_refused():
    with pytest.raises(utils.UserError, match=r"made on other training images than .* d\\x0a$"):
        checkpoint.check_meta("model.pth", {"data_fingerprint": "other-0"}, ARGS, data_like())


def test_fingerprint_of_an_earlier_version_is_accepted_and_mentioned(capsys):
    checkpoint.check_meta("model.pth", {"data_fingerprint": "1234"}, ARGS, data_like())
    assert capsys.readouterr().out.startswith("model.pth: saved by an earlier version")


@pytest.mark.parametrize("constants", ["mean", "std"])
def test_each_constant_of_a_normalize_layer_is_compared(constants, network, tmp_path):
    state = network.state_dict()
    layer = {"normalize.mean": torch.tensor(SPEC.mean), "normalize.std": torch.tensor(SPEC.std)}
    torch.save(state | layer, tmp_path / "model.pth")
    assert same(load(tmp_path / "model.pth")[0], state)
    assert same(load(tmp_path / "model.pth", None)[0], state)
    layer[f"normalize.{constants}"] += 0.01
    torch.save(state | layer, tmp_path / "model.pth")
    with pytest.raises(utils.UserError, match=f"normalises images with {constants} "):
        load(tmp_path / "model.pth")


def test_normalize_layer_of_the_network_is_loaded():
    model = nn.ModuleDict({"normalize": nn.Module()})
    model["normalize"].register_buffer("mean", torch.zeros(3))
    checkpoint.load_weights(model, {"normalize.mean": torch.ones(3)}, "model.pth", SPEC)
    assert model["normalize"].mean.tolist() == [1, 1, 1]


def test_counter_of_the_network_is_loaded():
    model = nn.Module()
    model.register_buffer("total_ops", torch.zeros(1))
    checkpoint.load_weights(model, {"total_ops": torch.ones(1)}, "model.pth")
    assert model.total_ops.tolist() == [1]


REFUSED = {
    "fc.bias is (11,), not (10,)": lambda bias: torch.zeros(11),
    "fc.bias is torch.complex64, not torch.float32": lambda bias: bias.to(torch.complex64),
    "fc.bias is torch.int64, not torch.float32": lambda bias: bias.long(),
    "fc.bias is torch.qint8": lambda bias: torch.quantize_per_tensor(bias, 0.1, 0, torch.qint8),
    "its weights are not finite": lambda bias: bias.index_fill(0, torch.tensor([3]), -torch.inf),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("words", REFUSED)
def test_tensor_of_wrong_shape_or_type_is_named_and_nothing_is_loaded(words, network):
    state = network.state_dict() | {"fc.bias": REFUSED[words](network.fc.bias.detach())}
    model = models.create_model("resnet18", 10, width=8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(utils.UserError) as caught:
        checkpoint.load_weights(model, state, "model.pth")
    assert str(caught.value).startswith("model.pth: ") and words in str(caught.value)
    assert same(model.state_dict(), before)


def test_missing_and_unknown_tensors_are_counted_in_one_message(network):
    state = network.state_dict()
    for name in ("fc.weight", "fc.bias", "conv1.weight"):
        del state[name]
    state |= {"z": torch.zeros(1), "head": torch.zeros(1)}
    message = r"of its tensors 3 are missing, e\.g\. conv1\.weight and 2 are unknown, e\.g\. head$"
    with pytest.raises(utils.UserError, match=message):
        checkpoint.load_weights(network, state, "model.pth")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"BZh91AY&SY", "a bzip2 archive"),
        (b"Rar!\x1a\x07", "a RAR archive"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"BZhang/1.png", None),
        (b"GGUF.png", None),
        (b"", None),
    ],
)
def test_binary_files_are_recognised_by_their_first_bytes(content, kind):
    assert errors.binary_kind(content) == kind
