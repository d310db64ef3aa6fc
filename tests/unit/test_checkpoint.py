"""Checkpoints of this and other training code are loaded, or refused with one line."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

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
    return state.keys() == expected.keys() and all(state[key].equal(expected[key]) for key in state)


def refused(path, *words):
    """Whether :func:`load` raises a UserError of one line with the path and ``words``."""
    with pytest.raises(UserError) as caught:
        load(path)
    line = str(caught.value)
    return line.startswith(f"{path}: ") and "\n" not in line and all(w in line for w in words)


# ---------------------------------------------------------------- files of other training code


@pytest.mark.parametrize("key", [None, "state_dict", "net", "model"])
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


def test_one_tensor_under_two_names_is_refused(network, path):
    state = network.state_dict()
    torch.save(state | {"module.fc.bias": state["fc.bias"]}, path)
    assert refused(path, "fc.bias")


@pytest.mark.parametrize("kind", [torch.float16, torch.float64])
def test_any_float_type_is_loaded_as_float32(kind, network, path):
    state = network.state_dict()
    state |= {name: t.to(kind) for name, t in state.items() if t.is_floating_point()}
    torch.save(state, path)
    loaded = load(path)[0]
    assert loaded["fc.bias"].dtype == torch.float32
    assert all(loaded[name].equal(tensor.to(loaded[name].dtype)) for name, tensor in state.items())


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


@pytest.mark.parametrize(
    "content",
    [b"", b"<html>", b"PK\x03\x04 and no more", pickle.dumps({"state_dict": Code()}, protocol=2)],
    ids=["empty", "page", "truncated", "code"],
)
def test_foreign_file_is_refused_in_one_line(content, path, capsys):
    path.write_bytes(content)
    assert refused(path)
    assert not capsys.readouterr().out


def test_missing_file_is_refused_with_the_hint(path):
    with pytest.raises(UserError, match=f"{path}: .*; train it"):
        checkpoint.read(path, "train it")


WITHOUT_WEIGHTS = [{}, [1, 2], {"model": {}}, {"a": torch.zeros(1), "b": 1}]
WITHOUT_WEIGHTS += [{"a": Code()}, {"model": {"a": torch.zeros(1)}, "meta": [1]}]


@pytest.mark.parametrize("content", WITHOUT_WEIGHTS)
def test_content_without_a_state_dict_is_refused(content, path, capsys):
    torch.save(content, path)
    assert refused(path)
    assert not capsys.readouterr().out


# ---------------------------------------------------------------- writing and hashing


def test_saved_checkpoint_is_read_with_its_meta(network, path):
    state = network.state_dict()
    checkpoint.save(path, state, {"epoch": 3})
    loaded, meta = load(path)
    assert same(loaded, state)
    assert meta == {"epoch": 3, "weights": checkpoint.weights_hash(state)}
    assert list(path.parent.iterdir()) == [path]


def test_failed_write_keeps_the_previous_file(network, path, monkeypatch):
    checkpoint.save(path, network.state_dict(), {"epoch": 1})

    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match=f"{path}: .*No space left"):
        checkpoint.save(path, network.state_dict(), {"epoch": 2})
    assert load(path)[1]["epoch"] == 1 and list(path.parent.iterdir()) == [path]


def test_hash_depends_on_values_names_and_shapes_only():
    weight = torch.arange(6.0).view(2, 3)
    state = {"w": weight, "b": torch.zeros(2)}
    expected = checkpoint.weights_hash(state)
    assert len(expected) == 16
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


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(kind=st.sampled_from(["flip", "cut", "insert"]), place=st.floats(0, 0.99999))
def test_damaged_checkpoint_is_refused_or_unchanged(kind, place, network, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    checkpoint.save(path, network.state_dict(), {})
    content = bytearray(path.read_bytes())
    start = int(place * len(content))
    if kind == "cut":
        del content[start:]
    elif kind == "insert":
        content[start:start] = b"x"
    else:
        content[start] ^= 1 << start % 8
    path.write_bytes(content)
    try:
        state, _ = checkpoint.read(path)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error)
    else:
        assert kind != "cut" and same(state, network.state_dict())


OTHER_WEIGHTS = [torch.zeros(11), torch.tensor([0.0] * 9 + [-torch.inf])]
OTHER_WEIGHTS += [torch.zeros(10, dtype=kind) for kind in (torch.int64, torch.complex64)]


@pytest.mark.parametrize("bias", OTHER_WEIGHTS)
def test_weights_of_other_shape_or_kind_or_infinite_ones_are_refused(bias, network):
    state = network.state_dict() | {"fc.bias": bias}
    with pytest.raises(UserError, match="model.pth: "):
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
