"""Disturbs a run at one of the moments at which it changes a folder.

A moment is the opening of a file for writing, the syncing of a file, or the creation, renaming or
removal of a file or folder. Python reports all of them but syncing to audit hooks, whatever names
the files have and whatever code touches them. The moments of a run are counted from 1.
"""

import errno
import os
import signal
import sys
from pathlib import Path

WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = ("os.mkdir", "os.remove", "os.rmdir", "os.rename")


def watch(folder, act):
    """Call ``act(event, path)`` before every change below ``folder`` for the rest of this process.

    ``act`` may raise an OSError, which the code that makes the change receives.
    """
    folder = os.path.realpath(folder)
    sync = os.fsync

    def changed(event, path):
        if isinstance(path, int):
            return
        path = os.path.abspath(os.fsdecode(path))
        if Path(path).is_relative_to(folder):
            act(event, path)

    def hook(event, arguments):
        if event in CHANGES or (event == "open" and arguments[2] & WRITES):
            changed(event, arguments[0])

    def fsync(file):
        number = file if isinstance(file, int) else file.fileno()
        changed("fsync", os.readlink(f"/proc/self/fd/{number}"))
        sync(file)

    sys.addaudithook(hook)
    os.fsync = fsync


def record(folder, log):
    """Append a line to the file ``log`` at each moment: the event and the path."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    watch(folder, lambda event, path: os.write(file, f"{event} {path}\n".encode()))


def act_at(number, action):
    """An ``act`` for :func:`watch` that calls ``action`` at the ``number``-th moment."""
    count = 0

    def act(event, path):
        nonlocal count
        count += 1
        if count == number:
            action(event, path)

    return act


def kill(folder, number):
    """Kill the process at the ``number``-th moment.

    A file that is being synced loses its second half first.
    """

    def action(event, path):
        if event == "fsync":
            os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    watch(folder, act_at(number, action))


def fill(folder, number):
    """Fill the disk at the ``number``-th moment.

    From then on files can be renamed and removed, but not written.
    """
    full = False

    def action(event, path):
        nonlocal full
        full = True

    count = act_at(number, action)

    def act(event, path):
        count(event, path)
        if full and event in ("open", "fsync", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    watch(folder, act)
