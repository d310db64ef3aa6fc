"""Errors that end a script with one line and exit status 2, and what their messages are made of."""

import os
from contextlib import suppress


class UserError(Exception):
    """A mistake in the flags or files of a script. It is printed as one line; exit status 2."""


class NotFinite(UserError):
    """A network's outputs are NaN or infinite."""


def printable(name):
    """A file name as text that every file and terminal can hold.

    Bytes that are not UTF-8, and control characters, are written as ``\\xe9``.
    """
    name = os.fspath(name)
    with suppress(UnicodeEncodeError):
        name = os.fsencode(name).decode(errors="backslashreplace")
    name = name.encode(errors="backslashreplace").decode()
    return "".join(map(_printable_character, name))


def _printable_character(character):
    control = ord(character) < 32 or ord(character) == 127
    return f"\\x{ord(character):02x}" if control else character


def error_reason(error):
    """Why a file cannot be used: the system's reason without path, else the first line."""
    reason = getattr(error, "strerror", None)
    return reason or next(iter(str(error).splitlines()), type(error).__name__)


def first_line(error):
    """The type and the first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


# How binary files begin that are passed by mistake. Printable signatures are long enough not to
# match the first file name of a forget list.
SIGNATURES = {
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"PK\x03\x04": "a zip archive (a checkpoint, .npz or .xlsx)",
    b"\x1f\x8b": "a gzip archive",
    b"\xfd7zXZ": "an xz archive",
    **{b"BZh%d1AY&SY" % level: "a bzip2 archive" for level in range(1, 10)},
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file (Keras)",
    b"GGUF\x02\0": "a GGUF file",
    b"GGUF\x03\0": "a GGUF file",
    b"PAR1": "a Parquet table",
    b"SQLite format 3\0": "a database",
    b"%PDF": "a PDF",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}


def binary_kind(content):
    """What a file with this content is, e.g. ``a PDF``, by its first bytes; None if unknown."""
    kinds = (kind for signature, kind in SIGNATURES.items() if content.startswith(signature))
    return next(kinds, None)
