"""Networks by name: ``resnet18`` for small images, ``vit``, and every model of timm.

A new network of one's own is a new file here and a branch in :func:`create_model`.
"""

import torch

from . import vit
from .errors import UserError
from .layout import choose_layout
from .resnet import ResNet18


def build_model(args, num_classes, size, device, *, pretrained):
    """The network of the flags, on ``device``; ``pretrained`` loads ImageNet weights where the model has them."""
    model = create_model(
        args.model_name,
        num_classes,
        width=args.width,
        image_size=size,
        pretrained=pretrained and not args.no_pretrained,
        pretrained_path=args.pretrained_path if pretrained else None,
    )
    return model.to(
        device,
        memory_format=torch.channels_last if device.type == "cuda" else torch.preserve_format,
    )


def create_model(
    model_name, num_classes, *, width=64, image_size=None, pretrained=True, pretrained_path=None
):
    """A network that maps N×3×H×W images to N×num_classes logits.

    Raises UserError, with the flag at fault, for an unknown name or weights that cannot be had.
    """
    if model_name == "resnet18":
        if pretrained_path:
            raise UserError(
                "--pretrained_path: resnet18 for small images has no pre-trained weights; leave it out"
            )
        return choose_layout(ResNet18(num_classes, width))
    return choose_layout(
        vit.create(model_name, num_classes, image_size, pretrained, pretrained_path)
    )


def input_size(model_name):
    """Side in pixels of the square images that a timm model was pre-trained on; None for resnet18, which takes any."""
    return None if model_name == "resnet18" else vit.input_size(model_name)
