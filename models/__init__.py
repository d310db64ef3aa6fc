"""Networks by name: ``resnet18`` for small images, ``vit``, and every model of timm.

A new network of one's own is a new file here and a branch in :func:`create_model`.
"""

from . import vit
from .layout import choose_layout
from .resnet import ResNet18


def create_model(model_name, num_classes, *, width=64, image_size=None, pretrained=True, pretrained_path=None):
    """A network that maps N×3×H×W images to N×num_classes logits.

    Raises ValueError, with the flag at fault, for an unknown name or weights that cannot be had.
    """
    if model_name == "resnet18":
        if pretrained_path:
            raise ValueError("--pretrained_path: resnet18 for small images has no pre-trained weights; leave it out")
        return choose_layout(ResNet18(num_classes, width))
    return choose_layout(vit.create(model_name, num_classes, image_size, pretrained, pretrained_path))


def input_size(model_name, native_size):
    """Side of the square images the model works on: the data's own for resnet18, the pre-training size for timm."""
    return native_size if model_name == "resnet18" else vit.input_size(model_name)
