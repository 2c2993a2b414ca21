"""Progress: a bar on a terminal, elsewhere a line now and then."""

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
BAR = "{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed}, {remaining} left{postfix}"
LINE = "{desc} {n_fmt} of {total_fmt}, {elapsed}, {remaining} left{postfix}"
WITHOUT_TOTAL = "{desc} {n_fmt}{unit}, {elapsed}{postfix}"


class Progress(tqdm):
    """tqdm's bar with time left, and where stderr is no terminal lines now and then and at the end."""

    def __init__(self, iterable: Any = None, **settings: Any) -> None:
        self._is_plain = not sys.stderr.isatty()
        has_end = settings.get("total") is not None or hasattr(iterable, "__len__")
        form = (LINE if self._is_plain else BAR) if has_end else WITHOUT_TOTAL
        super().__init__(iterable, dynamic_ncols=True, bar_format=form, **settings)
        if self.disable:
            return
        self._last_line = (self.initial, time.monotonic())

    def update(self, n: float | None = 1) -> bool | None:
        """Go on by `n`."""
        if not self._is_plain or self.disable:
            return super().update(n)
        self.n += n or 0
        self.last_print_n = self.n  # which tqdm's iterator reads
        if time.monotonic() - self._last_line[1] >= SECONDS_BETWEEN_LINES:
            self._write_line()
        return None

    def refresh(self, *args: Any, **settings: Any) -> None:
        """Draw the bar; nothing to draw without a terminal."""
        if not self._is_plain:
            super().refresh(*args, **settings)

    def clear(self, *args: Any, **settings: Any) -> None:
        """Take the bar away for a line beside it."""
        if not self._is_plain:
            super().clear(*args, **settings)

    def close(self) -> None:
        """End the bar as it stands, or with a line."""
        if self.disable or not self._is_plain:
            super().close()
            return
        self.disable = True
        type(self)._decr_instances(self)  # type: ignore[attr-defined]
        is_long = time.monotonic() - self._last_line[1] >= (self.delay or 0)
        if self.n != self._last_line[0] and is_long:
            self._write_line()

    def _write_line(self) -> None:
        self._last_line = (self.n, time.monotonic())
        self.fp.write(self.format_meter(**self.format_dict) + "\n")
        self.fp.flush()
