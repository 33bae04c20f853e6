"""Errors that a user can act on, and the exit codes they end in.

Bad input ends in one line that says what is wrong, where, and what to do. Everything else is a
fault of the program and keeps its traceback.
"""

from __future__ import annotations


class SbirError(Exception):
    """Base of the errors that are shown to the user as one line, without a traceback."""

    exit_code = 1


class UserError(SbirError):
    """Input, configuration or a command line that has to be changed by the user.

    The message names the file or setting and the fix.
    """

    exit_code = 2


class UnavailableError(UserError):
    """Something outside the program is not to be had now (a store that does not answer, a folder
    that another process writes, a node): the same command may do without a change later."""


class DamagedError(SbirError):
    """A file that this program wrote is incomplete or was changed: the message says which."""

    exit_code = 3


class StoppedError(SbirError):
    """Training was asked to end (SIGTERM) and did so: the same command goes on from there."""

    exit_code = 143


def by_name(name: str) -> type[SbirError]:
    """The kind of an error that another process raised; that of one that is not known here is
    :class:`SbirError`."""
    kinds: list[type[SbirError]] = [UserError, UnavailableError, DamagedError, StoppedError]
    return next((kind for kind in kinds if kind.__name__ == name), SbirError)
