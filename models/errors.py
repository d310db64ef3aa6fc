"""Errors that end a script with one line and status 2, and the text in such lines."""

import os
from contextlib import suppress


class UserError(Exception):
    """A mistake in the flags or files that a script was given: one line, exit status 2."""


class NotFinite(UserError):
    """A network's outputs are NaN or infinite."""


def printable(name):
    """A file name as text that every file and terminal can hold: bytes that are not UTF-8, and control characters,
    as ``\\xe9``."""
    name = os.fspath(name)
    with suppress(UnicodeEncodeError):
        name = os.fsencode(name).decode(errors="backslashreplace")
    name = name.encode(errors="backslashreplace").decode()
    return "".join(
        f"\\x{ord(char):02x}" if ord(char) < 32 or ord(char) == 127 else char for char in name
    )


def error_reason(error):
    """Why a file cannot be used: the system's words without number and path, else the whole message."""
    return getattr(error, "strerror", None) or next(
        iter(str(error).splitlines()), type(error).__name__
    )


def first_line(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]
