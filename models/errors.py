"""Errors that end a script with one line and exit status 2."""


class UserError(Exception):
    """A mistake in the flags or files of a script. It is printed as one line; exit status 2."""


class NotFinite(UserError):
    """A network's outputs are NaN or infinite."""


def first_line(error):
    """The type and the first line of an error."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
