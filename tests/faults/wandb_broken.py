"""A wandb that cannot start its service."""

import sys


def install():
    sys.modules["wandb"] = sys.modules[__name__]


def Settings(**_):
    raise OSError("no service\nand more lines")
