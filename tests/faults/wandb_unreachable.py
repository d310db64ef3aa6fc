"""A wandb that is logged in and cannot reach its server. Offline it writes what it receives to the
file ``logged``.
"""

import sys


class Run:
    def log(self, record):
        write(f"{record}\n")

    def finish(self):
        write("finished")


def write(text):
    with open("logged", "a") as file:
        file.write(text)


def install():
    sys.modules["wandb"] = sys.modules[__name__]


def login(**_):
    return True


def Settings(**_):
    return None


def Table(**_):
    return "table"


def init(mode, **_):
    if mode == "online":
        raise TimeoutError("no such host\nand more lines")
    return Run()
