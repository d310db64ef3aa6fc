"""ViT-Small (Dosovitskiy et al. 2021, arXiv 2010.11929) and every other timm model, with ImageNet weights."""

from pathlib import Path

import timm
import torch

from .errors import UserError, error_reason

PAPER_VIT = "vit_small_patch16_224"


def timm_name(model_name):
    """The timm name behind --model_name: ``vit`` stands for the paper's ``vit_small_patch16_224``.

    Raises UserError for a name that timm does not know.
    """
    name = PAPER_VIT if model_name == "vit" else model_name
    if not timm.is_model(name.split(".")[0]):
        raise UserError(
            f"--model_name {model_name}: not resnet18, vit or a timm model; "
            'list them with python -c "import timm; print(*timm.list_models())"'
        )
    return name


def input_size(model_name):
    """Side in pixels of the square images that the model was pre-trained on (224 where timm does not say)."""
    config = timm.get_pretrained_cfg(timm_name(model_name))
    return config.input_size[-1] if config else 224


def create(model_name, num_classes, image_size=None, pretrained=True, pretrained_path=None):
    """A timm model with a new head for ``num_classes``.

    ``image_size`` other than the model's own makes timm interpolate the position embedding. ``pretrained``
    loads ImageNet weights, from ``pretrained_path`` if given, else by download; a model that timm has no
    weights for starts at random. Raises UserError when the weights cannot be had or do not fit.
    """
    name = timm_name(model_name)
    options = {"num_classes": num_classes}
    if pretrained and pretrained_path:
        if not Path(pretrained_path).is_file():
            raise UserError(f"--pretrained_path {pretrained_path}: no such file")
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(pretrained_path)}}
    elif pretrained and timm.models.is_model_pretrained(name):
        options["pretrained"] = True
    try:
        if (
            pretrained
            and pretrained_path
            and Path(pretrained_path).suffix not in (".safetensors", ".npz")
        ):
            torch.load(
                pretrained_path, map_location="cpu", weights_only=True
            )  # older timm would run code in a pickle
        try:
            return timm.create_model(name, img_size=image_size, **options)
        except TypeError:  # networks without a fixed input size have no img_size argument
            return timm.create_model(name, **options)
    except Exception as error:  # the hub, urllib, safetensors and torch each raise their own
        if not options.get("pretrained"):
            raise UserError(
                f"--model_name {model_name} --image_size {image_size}: {error_reason(error)[:200]}"
            ) from error
        if pretrained_path:
            raise UserError(
                f"--pretrained_path {pretrained_path}: no weights of {name} ({error_reason(error)[:200]})"
            ) from error
        raise UserError(
            f"--model_name {model_name}: its ImageNet weights could not be downloaded ({error_reason(error)[:200]}). "
            "Two ways out: a weights file on disk with --pretrained_path FILE, or random weights with --no_pretrained"
        ) from error
