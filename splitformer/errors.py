"""The base of every error that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Something that the user gave cannot be used: an option, a file, a corpus, a machine that lacks something.

    The message names the value, the allowed choices and the remedy. Commands print it in one line and exit with
    `status` (`splitformer.cli`). Every other exception is a bug and keeps its traceback.
    """

    status = 1
