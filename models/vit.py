"""ViT-Small (Dosovitskiy et al. 2021, arXiv 2010.11929) and every other timm model."""

import timm

from . import checkpoint
from .errors import UserError, first_line


def timm_name(model_name):
    """The timm name behind --model_name: ``vit`` is the paper's ``vit_small_patch16_224``.

    Raises UserError for a name, or a tag behind its dot, that timm does not know.
    """
    name = "vit_small_patch16_224" if model_name == "vit" else model_name
    try:
        timm.get_pretrained_cfg(name)  # raises RuntimeError for an unknown tag
        known = timm.is_model(name)
    except RuntimeError:
        known = False
    if not known:
        raise UserError(
            f"--model_name {model_name}: not resnet18, vit or a timm model; list them with "
            'python -c "import timm; print(*timm.list_models(), *timm.list_pretrained())"'
        )
    return name


def native_side(model_name):
    """Side in pixels of the square images that a timm model was pre-trained on.

    It is 224 where timm does not record it. Raises UserError for an unknown name.
    """
    config = timm.get_pretrained_cfg(timm_name(model_name))
    return config.input_size[-1] if config else 224


def create(model_name, num_classes, *, image_size=None, pretrained=True, pretrained_path=None):
    """A timm model with a new head for ``num_classes``.

    If ``image_size`` (side in pixels) differs from :func:`native_side`, timm interpolates the
    position embedding. ``pretrained`` loads ImageNet weights from ``pretrained_path``, else by
    download. A model without published weights starts at random. Raises UserError if the weights
    cannot be loaded or do not fit.
    """
    name = timm_name(model_name)
    options = {"pretrained": pretrained and timm.models.is_model_pretrained(name)}
    if pretrained and pretrained_path:
        checkpoint.read(pretrained_path)  # it refuses pickled code, which timm might run
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(pretrained_path)}}
    try:
        try:
            return timm.create_model(name, num_classes=num_classes, img_size=image_size, **options)
        except TypeError:  # a network without a fixed input size has no img_size argument
            return timm.create_model(name, num_classes=num_classes, **options)
    except Exception as error:  # the hub, urllib, safetensors and torch each raise their own
        flags = f"--model_name {model_name} --image_size {image_size}"
        remedy = "load weights with --pretrained_path FILE, or omit them with --no_pretrained"
        raise UserError(f"{flags}: {first_line(error)[:200]}; {remedy}") from error
