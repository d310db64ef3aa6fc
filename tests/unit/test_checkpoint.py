"""Checkpoints of this and other training code are loaded, or refused with one line."""

import copy
import gzip
import hashlib
import io
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from models import UserError, checkpoint
from models.resnet import ResNet18


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return ResNet18(10, 4)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pth"


def load(path):
    """The state_dict of a network after it has loaded a checkpoint, and the checkpoint's meta."""
    state, meta = checkpoint.read(path)
    torch.manual_seed(1)
    model = ResNet18(10, 4)
    checkpoint.load_weights(model, state, path)
    return model.state_dict(), meta


def same(state, expected):
    return state.keys() == expected.keys() and all(map(torch.equal, *values(state, expected)))


def values(state, expected):
    return [state[name] for name in expected], expected.values()


def refused(path, *words):
    """Whether :func:`load` raises a UserError of one line with the path and ``words``."""
    with pytest.raises(UserError) as caught:
        load(path)
    line = str(caught.value)
    return line.startswith(f"{path}: ") and "\n" not in line and all(w in line for w in words)


# ---------------------------------------------------------------- files of other training code


@pytest.mark.parametrize("key", [None, "state_dict", "model_state_dict", "net", "model"])
def test_state_dict_under_a_usual_key_is_loaded(key, network, path):
    state = network.state_dict()
    torch.save({key: state, "epoch": 3, "optimizer": {"lr": 0.1}} if key else state, path)
    loaded, meta = load(path)
    assert same(loaded, state) and meta == {}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.module."])
def test_prefixes_of_wrappers_are_removed_in_any_order(prefix, network, path):
    state = network.state_dict()
    torch.save({prefix + name: tensor for name, tensor in state.items()}, path)
    assert same(load(path)[0], state)


def test_prefix_of_the_network_is_kept():
    names = ["module.weight", "module.module.bias"]
    state = {name: torch.zeros(1) for name in ("_orig_mod.module.weight", "module.module.bias")}
    assert list(checkpoint.match_names(state, names, "file")) == names


def test_one_tensor_under_two_names_is_refused(network, path):
    state = network.state_dict()
    torch.save(state | {"module.fc.bias": state["fc.bias"]}, path)
    assert refused(path, "fc.bias")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_type_is_loaded_as_float32(kind, network, path):
    state = network.state_dict()
    state |= {name: t.to(kind) for name, t in state.items() if t.is_floating_point()}
    torch.save(state, path)
    loaded = load(path)[0]
    assert loaded["fc.bias"].dtype == torch.float32
    assert all(loaded[name].equal(tensor.to(loaded[name].dtype)) for name, tensor in state.items())


def test_missing_batch_norm_counters_are_accepted(network, path):
    state = {name: t for name, t in network.state_dict().items() if "num_batches" not in name}
    torch.save(state, path)
    loaded = load(path)[0]
    assert all(loaded[name].equal(tensor) for name, tensor in state.items())
    assert loaded["bn1.num_batches_tracked"] == 0


def test_safetensors_are_loaded(network, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(network.state_dict(), path)
    assert same(load(path)[0], network.state_dict())
    path.write_bytes(b"short")
    assert refused(path)


class Code:
    """What unpickling would run."""

    def __reduce__(self):
        return print, ("unpickled",)


def archive(**arrays):
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


FOREIGN = {
    "empty": b"",
    "page": b"<!DOCTYPE html><html><body>Sign in</body></html>",
    "gzip": gzip.compress(b"weights"),
    "npz": archive(weight=np.zeros(3)),
    "code": pickle.dumps({"state_dict": Code()}, protocol=2),
    "truncated": b"PK\x03\x04 and no more",
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_file_is_refused_in_one_line(kind, path, capsys):
    path.write_bytes(FOREIGN[kind])
    assert refused(path)
    assert not capsys.readouterr().out


def test_pickled_network_is_refused_with_its_class(path):
    torch.save(nn.Linear(2, 2), path)
    assert refused(path, "torch.nn.modules.linear.Linear")


def test_missing_file_is_refused_with_the_hint(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError, match=f"{path}: .*; train it"):
            checkpoint.read(path, "train it")


SPARSE = {"a": torch.ones(2).to_sparse()}
WITHOUT_WEIGHTS = [{}, [1, 2], torch.zeros(3), {"model": {}}, {"a": torch.zeros(1), "b": 1}, SPARSE]


@pytest.mark.parametrize("content", WITHOUT_WEIGHTS)
def test_content_without_a_state_dict_is_refused(content, path):
    torch.save(content, path)
    assert refused(path)


# ---------------------------------------------------------------- writing and hashing


def test_saved_checkpoint_is_read_with_its_meta(network, path):
    state = network.state_dict()
    checkpoint.save(path, state, {"epoch": 3})
    loaded, meta = load(path)
    assert same(loaded, state)
    assert meta == {"epoch": 3, "weights": checkpoint.weights_hash(state)}
    assert list(path.parent.iterdir()) == [path]


def test_tensors_of_a_checkpoint_are_saved_contiguous_and_without_gradient(path):
    weight = nn.Parameter(torch.arange(6.0).view(2, 3))
    checkpoint.save(path, {"w": weight.T}, {})
    tensor = checkpoint.read(path)[0]["w"]
    assert tensor.equal(weight.T) and tensor.is_contiguous() and not tensor.requires_grad


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_writes(rank, path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", rank)
    checkpoint.save_state(path, {"epoch": 3})
    assert path.exists() == (rank == "0")


def test_failed_write_keeps_the_previous_file(path, monkeypatch):
    checkpoint.save_state(path, {"epoch": 1})

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=f"{path}: .*No space left"):
        checkpoint.save_state(path, {"epoch": 2})
    assert checkpoint.read_state(path) == {"epoch": 1} and list(path.parent.iterdir()) == [path]


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


# ---------------------------------------------------------------- damaged files and other networks


def test_weights_other_than_the_recorded_ones_are_refused(network, path):
    state = network.state_dict()
    meta = {"weights": checkpoint.weights_hash(state)}
    torch.save({"model": state, "meta": meta}, path)
    assert same(load(path)[0], state)
    torch.save({"model": state | {"fc.bias": torch.ones(10)}, "meta": meta}, path)
    assert refused(path, "damaged")


@pytest.mark.parametrize(("meta", "accepted"), [(None, True), ({}, True), ([1], False)])
def test_metadata_is_a_dict_or_missing(meta, accepted, network, path):
    torch.save({"model": network.state_dict(), "meta": meta}, path)
    assert checkpoint.read(path)[1] == {} if accepted else refused(path)


def test_file_with_a_changed_byte_is_refused(path):
    torch.save({"weights": torch.full((64,), 3.0)}, path)
    content, values = path.read_bytes(), np.full(64, 3, dtype="<f4").tobytes()
    path.write_bytes(content.replace(values, b"\1" + values[1:]))
    assert refused(path, "checksum")


OTHER_WEIGHTS = {
    "(11|shape)": lambda bias: torch.zeros(11),
    "complex64": lambda bias: bias.to(torch.complex64),
    "int64": lambda bias: bias.long(),
    "finite": lambda bias: bias.index_fill(0, torch.tensor([3]), -torch.inf),
}


@pytest.mark.parametrize("words", OTHER_WEIGHTS)
def test_weights_of_other_shape_or_type_are_refused(words, network):
    state = network.state_dict() | {"fc.bias": OTHER_WEIGHTS[words](network.fc.bias.detach())}
    with pytest.raises(UserError, match=f"model.pth: .*{words}"):
        checkpoint.load_weights(copy.deepcopy(network), state, "model.pth")


def test_missing_and_unknown_tensors_are_named(network):
    state = network.state_dict()
    del state["fc.bias"]
    with pytest.raises(UserError, match=r"model.pth: .*fc\.bias.*head"):
        checkpoint.load_weights(network, state | {"head": torch.zeros(1)}, "model.pth")


META = {"model_name": "resnet18", "width": 8, "num_classes": 10, "image_size": 32}
META |= {"data_name": "cifar10", "data_fingerprint": "12ab"}


@pytest.mark.parametrize("meta", [{}, META, dict.fromkeys(META), META | {"seed": 3}])
def test_checkpoint_of_requested_model_and_data_is_accepted(meta):
    checkpoint.check_meta("model.pth", meta, META)


@pytest.mark.parametrize("key", META)
def test_value_that_differs_from_the_checkpoint_is_named(key):
    with pytest.raises(UserError, match=f"model.pth: .*{key} other.*{META[key]}"):
        checkpoint.check_meta("model.pth", META | {key: "other"}, META)
