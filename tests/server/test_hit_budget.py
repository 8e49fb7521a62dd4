"""The budget of the hit path, in Python calls: features pay for their steps elsewhere."""

import subprocess
import sys
from pathlib import Path

from tests.servers import free_port

BUDGET = 93
"""Calls of one hit in memory, aiohttp's included. Lower it when the path gets shorter."""


def test_a_hit_makes_few_calls(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.server.hit_calls", str(tmp_path), str(free_port())]
    counted = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert float(counted.stdout) <= BUDGET
