"""How a run goes on, on standard error: a line that is renewed, or one each ten seconds."""

import shutil
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import TextIO

import numpy as np

from server.bench.load import Progress
from server.bench.report.units import in_order, seconds, three_digits

_WINDOW_S = 5.0
"""Rates and percentiles are of the last seconds."""
_RENEW_S = 0.2
_LINE_S = 10.0
_CLEAR_LINE = "\r\x1b[K"


def say(text: str) -> None:
    """Tell a person something beside the result."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


class LiveProgress:
    """Shows what client processes report; call it with each report.

    Args:
        name: stands before each line, such as a probe's rate.
        stream: where lines go. On a terminal one line is renewed.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        name: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._is_terminal = self._stream.isatty()
        self._name, self._clock = name, clock
        self._recent: deque[Progress] = deque()
        self._shown_at = clock()

    def __call__(self, progress: Progress) -> None:
        """Take a report, and show it if the last one was shown long enough ago."""
        self._recent.append(progress)
        while progress.elapsed_s - self._recent[0].elapsed_s > _WINDOW_S:
            self._recent.popleft()
        now = self._clock()
        if now - self._shown_at < (_RENEW_S if self._is_terminal else _LINE_S):
            return
        self._shown_at = now
        line = " ".join(filter(None, (self._name, self._line(progress))))
        if self._is_terminal:
            columns = shutil.get_terminal_size().columns
            self._stream.write(_CLEAR_LINE + line[: columns - 1])
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Remove the renewed line."""
        if self._is_terminal:
            self._stream.write(_CLEAR_LINE)
            self._stream.flush()

    def _line(self, now: Progress) -> str:
        first = self._recent[0]
        span = now.elapsed_s - first.elapsed_s
        ended, elapsed = (
            (now.ended - first.ended, span) if span > 0 else (now.ended, now.elapsed_s or 1.0)
        )
        of = "" if now.planned_s is None else f" of {now.planned_s:.0f}"
        parts = [
            f"{now.elapsed_s:.0f}{of} s",
            f"{three_digits(ended / elapsed)}/s",
            f"{now.in_flight:,} in flight",
        ]
        parts += [
            f"{name} {now.outcomes[name] / now.ended:.0%}"
            for name in in_order(now.outcomes)
            if now.ended
        ]
        times = [each for progress in self._recent for each in progress.recent_s]
        if times:
            middle, high = np.percentile(times, (50, 99))
            parts.append(f"p50 {seconds(float(middle))} p99 {seconds(float(high))}")
        if now.failed:
            parts.append(f"{now.failed:,} failed")
        return " · ".join(parts)
