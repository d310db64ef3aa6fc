"""A wandb whose service dies after the start."""

import sys


class Run:
    def log(self, *_):
        raise BrokenPipeError("gone")

    def finish(self, **_):
        raise OSError


def install():
    sys.modules["wandb"] = sys.modules[__name__]


def login(**_):
    return False


def Settings(**_):
    return None


def init(**_):
    return Run()
