"""Networks by name: ``resnet18`` for small images, ``vit``, and every timm model.

To add a network, write a file here and extend :func:`input_size` and :func:`create_model`.
"""

import torch

from . import vit
from .errors import UserError
from .layout import choose_layout
from .resnet import ResNet18

FROM_SCRATCH = ("resnet18",)  # all others start from ImageNet weights by default


def input_size(model_name):
    """Side in pixels of the images that a network was pre-trained on. None if it takes any size.

    Raises UserError for an unknown name.
    """
    return None if model_name in FROM_SCRATCH else vit.native_side(model_name)


def build_model(args, num_classes, size, device, *, pretrained):
    """The network that the flags ask for, on ``device``.

    ``pretrained`` loads ImageNet weights where the network has them, unless --no_pretrained is set.
    Raises UserError as :func:`create_model` does.
    """
    model = create_model(
        args.model_name,
        num_classes,
        width=args.width,
        image_size=size,
        pretrained=pretrained and not args.no_pretrained,
        pretrained_path=args.pretrained_path if pretrained else None,
    )
    layout = torch.channels_last if device.type == "cuda" else torch.preserve_format
    return model.to(device, memory_format=layout)


def create_model(
    model_name, num_classes, *, width=64, image_size=None, pretrained=True, pretrained_path=None
):
    """A network that maps N×3×H×W images to N×num_classes logits.

    ``width`` applies to resnet18, ``image_size`` (side in pixels) and the weights to timm models.
    Raises UserError, naming the flag, for an unknown name or for weights that cannot be loaded.
    """
    if model_name == "resnet18":
        if pretrained_path:
            raise UserError("--pretrained_path: resnet18 has no pre-trained weights; omit it")
        return choose_layout(ResNet18(num_classes, width))
    weights = {"pretrained": pretrained, "pretrained_path": pretrained_path}
    return choose_layout(vit.create(model_name, num_classes, image_size=image_size, **weights))
