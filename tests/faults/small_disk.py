"""Limits the size of every file that the process writes to 500 kB, as a disk with little space left
does.
"""

import resource


def install():
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))
