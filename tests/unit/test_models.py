"""Networks by name: their properties, construction, and refused names."""

from types import SimpleNamespace

import pytest
import timm
import torch

import models
from models import Network, UserError, vit


def test_resnet18_is_trained_from_scratch_and_has_a_width():
    assert models.describe("resnet18") == Network(
        name="resnet18",
        trained_from_scratch=True,
        has_width=True,
        is_transformer=False,
        native_side=None,
    )


def test_vit_is_a_transformer_with_imagenet_weights():
    assert models.describe("vit") == Network(
        name="vit",
        trained_from_scratch=False,
        has_width=False,
        is_transformer=True,
        native_side=224,
    )


@pytest.mark.parametrize(
    ("name", "transformer"),
    [
        ("deit_tiny_patch16_224", True),
        ("swin_tiny_patch4_window7_224", True),
        ("beit_base_patch16_224", True),
        ("hiera_tiny_224", True),
        ("test_vit.r160_in1k", True),
        ("resnet50", False),
        ("seresnet50", False),
        ("convnext_atto", False),
        ("mobilenetv3_small_100", False),
        ("resnet50_clip", False),
    ],
)
def test_only_networks_of_attention_layers_are_transformers(name, transformer):
    state = torch.random.get_rng_state()
    assert models.describe(name).is_transformer == transformer
    assert torch.random.get_rng_state().equal(state)


def test_timm_that_cannot_build_without_memory_draws_no_random_numbers(monkeypatch):
    create, devices = timm.create_model, []

    def older(name, **options):
        devices.append(torch.empty(0).device.type)
        if devices[-1] == "meta":
            raise RuntimeError("Tensor.item() cannot be called on meta tensors")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", older)
    state = torch.random.get_rng_state()
    assert vit.is_transformer("test_vit") and devices == ["meta", "cpu"]
    assert torch.random.get_rng_state().equal(state)


@pytest.mark.parametrize(
    ("name", "side"), [("test_vit.r160_in1k", 160), ("inception_v3", 299), ("vit", 224)]
)
def test_native_side_is_that_of_the_weights(name, side):
    assert models.describe(name).native_side == side == models.input_size(name)


def test_native_side_is_224_where_timm_records_none(monkeypatch):
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    assert vit.native_side("resnet50") == 224


def test_unknown_name_is_refused():
    for function in (models.describe, lambda name: models.create_model(name, 10)):
        with pytest.raises(UserError, match="--model_name resnet19: not resnet18, vit or a timm"):
            function("resnet19")


def test_weights_for_resnet18_are_refused():
    with pytest.raises(UserError, match="--pretrained_path: resnet18 has no pre-trained weights"):
        models.create_model("resnet18", 10, pretrained_path="weights.pth")


def arguments(**changes):
    defaults = {"model_name": "resnet18", "width": 8, "no_pretrained": False}
    return SimpleNamespace(**defaults | {"pretrained_path": None} | changes)


@pytest.mark.parametrize(
    ("changes", "pretrained", "expected"),
    [
        ({}, True, (True, None)),
        ({}, False, (False, None)),
        ({"no_pretrained": True}, True, (False, None)),
        ({"pretrained_path": "file"}, True, (True, "file")),
        ({"pretrained_path": "file"}, False, (False, None)),
    ],
)
def test_weights_are_loaded_only_if_flags_and_caller_agree(
    changes, pretrained, expected, monkeypatch
):
    calls = []

    def create_model(*positional, **options):
        calls.append((positional, options))
        return torch.nn.Linear(8, 8)

    monkeypatch.setattr(models, "create_model", create_model)
    args = arguments(**changes)
    models.build_model(args, 10, 28, torch.device("cpu"), pretrained=pretrained)
    (positional, options), (loads, path) = calls[0], expected
    assert positional == ("resnet18", 10)
    sizes = {"width": 8, "image_size": 28}
    assert options == sizes | {"pretrained": loads, "pretrained_path": path}


def test_timm_model_gets_classes_size_and_weights_from_a_file(tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("test_vit", num_classes=1000)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    model = models.create_model(
        "test_vit", 7, image_size=32, pretrained_path=tmp_path / "weights.pth"
    )
    weight = "blocks.0.mlp.fc1.weight"
    assert model.get_parameter(weight).equal(source.get_parameter(weight))
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    # A convolutional network has no fixed size.
    convolutional = models.create_model("test_resnet", 7, image_size=40, pretrained=False)
    assert convolutional(torch.zeros(2, 3, 40, 40)).shape == (2, 7)


def test_files_without_weights_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(UserError, match=f"--pretrained_path {path}: no such file"):
        models.create_model("test_vit", 7, pretrained_path=path)
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError, match="not weights of test_vit"):
        models.create_model("test_vit", 7, pretrained_path=path)


def test_image_size_that_does_not_fit_the_network_is_named():
    with pytest.raises(UserError, match="--model_name pit_ti_224 --image_size 3: "):
        models.create_model("pit_ti_224", 7, image_size=3, pretrained=False)


def test_weights_that_cannot_be_downloaded_name_both_remedies(monkeypatch):
    def no_network(name, **options):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(UserError, match="downloaded .no network.*--pretrained_path.*no_pretrained"):
        models.create_model("resnet50", 7)
