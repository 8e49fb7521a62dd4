"""The budget of the hit path, in Python calls: features pay for their steps elsewhere."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import free_port
from tests.waiting import HANGS_S


# Calls of one hit, aiohttp's included. Lower them when a way gets shorter.
@pytest.mark.parametrize(
    ("way", "tier", "budget"),
    [("short", "memory", 26), ("short", "disk", 35), ("long", "memory", 60), ("long", "disk", 69)],
)
def test_a_hit_makes_few_calls(tmp_path: Path, way: str, tier: str, budget: int) -> None:
    # Ports of its own: a process of which we don't know could give itself one of ours.
    ports = str(free_port()), str(free_port())
    counted = subprocess.run(
        [sys.executable, "-m", "tests.server.hit_calls", str(tmp_path), *ports, way, tier],
        capture_output=True, text=True, timeout=HANGS_S, check=True,
    )  # fmt: skip
    assert float(counted.stdout) <= budget
