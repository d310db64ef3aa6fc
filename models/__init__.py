"""Networks by name: ``resnet18`` for small images, ``vit``, and every timm model.

To add a network, write a file here and extend :func:`describe` and :func:`create_model`.
"""

from dataclasses import dataclass
from functools import cache

import torch

from . import vit
from .errors import UserError
from .layout import choose_layout
from .resnet import ResNet18


@dataclass(frozen=True)
class Network:
    """What the defaults of the scripts need to know about a network before it is built.

    ``name`` is the value of --model_name. ``trained_from_scratch`` is False for a network that
    starts from ImageNet weights by default. ``has_width`` is True if --width applies.
    ``native_side`` is the side in pixels of the square images that the network was pre-trained on,
    None if it takes any size.
    """

    name: str
    trained_from_scratch: bool
    has_width: bool
    native_side: int | None


@cache
def describe(model_name):
    """The :class:`Network` behind --model_name, without building it or downloading weights.

    Raises UserError for an unknown name.
    """
    if model_name == "resnet18":
        return Network(model_name, trained_from_scratch=True, has_width=True, native_side=None)
    return Network(
        name=model_name,
        trained_from_scratch=False,
        has_width=False,
        native_side=vit.native_side(model_name),
    )


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
            raise UserError(
                "--pretrained_path: resnet18 has no pre-trained weights; leave the flag out"
            )
        return choose_layout(ResNet18(num_classes, width))
    model = vit.create(
        model_name,
        num_classes,
        image_size=image_size,
        pretrained=pretrained,
        pretrained_path=pretrained_path,
    )
    return choose_layout(model)


def input_size(model_name):
    """:attr:`Network.native_side` of a network."""
    return describe(model_name).native_side
