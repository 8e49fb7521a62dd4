"""Threads that write what is left when a log or a trace is closed have all the time they need."""

import pytest

from server.telemetry import logs, trace_log
from tests.waiting import HANGS_S


@pytest.fixture(autouse=True)
def _patient(monkeypatch) -> None:
    for module in (logs, trace_log):
        monkeypatch.setattr(module, "_CLOSE_S", HANGS_S)
