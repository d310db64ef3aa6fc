"""Ends a script with status 0 when it asks for its first batch of images. The benchmark of the
start uses it.
"""

import os
import sys
from pathlib import Path


def install():
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import utils

    batches = utils.Images.batches

    def first(*arguments):
        for _ in batches(*arguments):
            os._exit(0)

    utils.Images.batches = first
