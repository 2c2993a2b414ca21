"""Errors a person can act on, and how a program shows them."""

import re

from dschat.console.text import printable

LONGEST_MESSAGE = 2000


class UserError(ValueError):
    """The input cannot work. The message names the flag or the file and line, the value, and the remedy.

    It quotes what files and libraries say, so it is made one readable line here. Further `details` are a line
    each, with the spaces in front of them.
    """

    def __init__(self, message: str, *details: str) -> None:
        super().__init__(one_line(message), *(_indent(line) + one_line(line) for line in details))

    def __str__(self) -> str:
        return "\n".join(self.args)


def one_line(message: str) -> str:
    """The message in one line; the middle is left out of one with more than `LONGEST_MESSAGE` characters.

    Control characters are escaped, as a file's content must not steer the terminal.
    """
    line = printable(re.sub(r"\s*\n\s*", " ", message.strip()), keep="")
    if len(line) <= LONGEST_MESSAGE:
        return line
    half = LONGEST_MESSAGE // 2 - 25
    return f"{line[:half]} ... ({len(line) - 2 * half:,} characters) ... {line[-half:]}"


def _indent(line: str) -> str:
    return " " * (len(line) - len(line.lstrip(" ")))


EXIT_TRY_AGAIN = 75
"""EX_TEMPFAIL of sysexits.h: a run that was asked to stop and can go on from its checkpoint."""


class Stopped(Exception):
    """The run was asked to stop and has; the message says what is kept. Every rank raises it."""


STORAGE_REMEDY = (
    "Make room or repair the disk; a run with checkpoints goes on with --resume_from_checkpoint latest."
)
