"""A wandb that stops responding at a chosen moment: "init", "log" or "finish". Its exit handler
hangs too.

The script waits two seconds for it in the place of a minute.
"""

import atexit
import sys
import threading

moment = None


def hang(reached):
    if reached == moment:
        threading.Event().wait()


class Run:
    def log(self, *_):
        hang("log")

    def finish(self):
        hang("finish")


def install(chosen):
    global moment
    moment = chosen
    sys.modules["wandb"] = sys.modules[__name__]
    atexit.register(threading.Event().wait)


def login(**_):
    import utils

    utils.WandbRun.patience = 2


def Settings(**_):
    return None


def Table(**_):
    return None


def init(**_):
    hang("init")
    return Run()
