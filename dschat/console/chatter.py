"""What libraries print of their own work: kept in the log file and not on the console."""

import contextlib
import io
import logging
from typing import Any

from dschat.console.log_file import Lines
from dschat.console.streams import log_of_streams

CHATTY_LOGGERS = ("DeepSpeed", "torch.utils.cpp_extension")


class _OnlyErrors(logging.Filter):
    """Errors pass; what is less goes to the log, where there is one."""

    def filter(self, record: logging.LogRecord) -> bool:
        log = log_of_streams()
        if log is None or record.levelno >= logging.ERROR:
            return True
        log.add(f"{record.name}: {record.levelname}: {record.getMessage()}")
        return False


class _InLog(io.TextIOBase):
    """A stream into the log alone."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines

    def write(self, text: str) -> int:
        self._lines.add(text)
        return len(text)


def quieten_loggers() -> None:
    """Before the libraries are imported: they warn as they are."""
    for name in CHATTY_LOGGERS:
        logger = logging.getLogger(name)
        if not logger.filters:
            logger.addFilter(_OnlyErrors())


def bar_in_log(factory: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """For transformers' `set_tqdm_hook`: its bars ("Loading weights") in the log, where there is one."""
    log = log_of_streams()
    return factory(*args, **settings) if log is None else factory(*args, **settings, file=_InLog(Lines(log)))


def prints_in_log() -> contextlib.AbstractContextManager[Any]:
    """What is printed inside goes to the log, where there is one."""
    log = log_of_streams()
    return contextlib.redirect_stdout(_InLog(Lines(log))) if log else contextlib.nullcontext()
