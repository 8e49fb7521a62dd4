"""The live line on a terminal, and lines where there is none."""

import io

from server.bench.load import Progress
from server.bench.report.progress import LiveProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def report(at_s: float, ended: int, *, planned_s: float | None = 60.0) -> Progress:
    outcomes = {"miss": ended // 4, "memory": ended - ended // 4}
    return Progress(at_s, planned_s, ended + 3, ended, 1, 3, outcomes, [0.001, 0.002, 1.0])


def test_lines_come_each_ten_seconds() -> None:
    stream, now = io.StringIO(), [100.0]
    progress = LiveProgress(stream=stream, clock=lambda: now[0])
    for second in range(1, 26):
        now[0] += 1
        progress(report(second, second * 8))
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0] == (
        "10 of 60 s · 8.00/s · 3 in flight · memory 75% · miss 25% · p50 2.00 ms p99 1.00 s · "
        "1 failed"
    )


def test_a_terminal_has_one_line(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream, now = Terminal(), [0.0]
    progress = LiveProgress("probe of 2/s:", stream, lambda: now[0])
    for step in range(1, 11):
        now[0] += 0.1
        progress(report(step / 10, 40, planned_s=None))
    progress.close()
    written = stream.getvalue().split("\r\x1b[K")
    assert "\n" not in stream.getvalue()
    assert written[-1] == ""
    assert 4 <= len(written) - 2 <= 5
    assert all(each.startswith("probe of 2/s: ") and len(each) <= 39 for each in written[1:-1])


def test_before_anything_has_ended() -> None:
    stream, now = io.StringIO(), [0.0]
    progress = LiveProgress(stream=stream, clock=lambda: now[0])
    now[0] = 11.0
    progress(Progress(0.0, None, 0, 0, 0, 0, {}, []))
    assert stream.getvalue() == "0 s · 0/s · 0 in flight\n"
