"""Errors that end a script with one line and exit status 2, and the parts of their messages."""

import os
import re


class UserError(Exception):
    """A mistake in the flags or files of a script. It is printed as one line; exit status 2."""


class NotFinite(UserError):
    """A network's outputs are NaN or infinite."""


def printable(name):
    """A file name as text for files and terminals.

    Bytes that are not UTF-8, and control characters, are written as ``\\xe9``.
    """
    text = os.fsencode(name).decode(errors="backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda match: f"\\x{ord(match[0]):02x}", text)


def error_reason(error):
    """Why a file cannot be used: the system's reason without path, else the first line."""
    reason = getattr(error, "strerror", None)
    return reason or next(iter(str(error).splitlines()), type(error).__name__)


def first_line(error):
    """The type and the first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
