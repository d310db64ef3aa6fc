"""Networks by name: their properties, construction, and refused names."""

from types import SimpleNamespace

import pytest
import timm
import torch

import models
from models import UserError

CPU = torch.device("cpu")


def test_resnet18_is_the_cifar_variant_trained_from_scratch():
    model = models.create_model("resnet18", 10)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962
    assert model.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert models.input_size("resnet18") is None and "resnet18" in models.FROM_SCRATCH


@pytest.mark.parametrize(
    ("name", "side"), [("test_vit.r160_in1k", 160), ("inception_v3", 299), ("vit", 224)]
)
def test_timm_network_starts_from_weights_of_its_native_side(name, side):
    assert models.input_size(name) == side and name not in models.FROM_SCRATCH


def test_vit_is_the_papers_network_for_images_of_any_size():
    model = models.create_model("vit", 10, image_size=32, pretrained=False)
    assert len(model.blocks) == 12 and model.embed_dim == 384
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


@pytest.mark.parametrize("name", ["resnet19", "resnet50.a1_in1K", "test_vit.none"])
def test_unknown_name_or_tag_is_refused_in_one_short_line(name):
    for function in (models.input_size, lambda name: models.create_model(name, 10)):
        with pytest.raises(UserError, match=f"--model_name {name}: ") as caught:
            function(name)
        assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The path of weights for ``test_vit``, and the network that they are from."""
    torch.manual_seed(0)
    source = timm.create_model("test_vit", num_classes=1000)
    path = tmp_path_factory.mktemp("weights") / "weights.pth"
    torch.save(source.state_dict(), path)
    return SimpleNamespace(path=path, source=source)


def has_weights_of(model, source):
    name = "blocks.0.mlp.fc1.weight"
    return model.get_parameter(name).equal(source.get_parameter(name))


@pytest.mark.parametrize(
    ("pretrained", "no_pretrained", "loaded"),
    [(True, False, True), (False, False, False), (True, True, False)],
)
def test_weights_are_loaded_only_if_flags_and_caller_agree(
    pretrained, no_pretrained, loaded, weights
):
    args = SimpleNamespace(model_name="test_vit", width=64, no_pretrained=no_pretrained)
    args.pretrained_path = weights.path
    model = models.build_model(args, 7, 32, CPU, pretrained=pretrained)
    assert has_weights_of(model, weights.source) == loaded
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_files_without_weights_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    for _ in range(2):  # a missing file, and a pickled network
        with pytest.raises(UserError, match=f"{path}: "):
            models.create_model("test_vit", 7, pretrained_path=path)
        torch.save(torch.nn.Linear(2, 2), path)


def test_weights_that_cannot_be_downloaded_name_both_remedies(monkeypatch):
    def no_network(name, **options):
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(UserError, match="no network.*--pretrained_path.*--no_pretrained"):
        models.create_model("resnet50", 7)
