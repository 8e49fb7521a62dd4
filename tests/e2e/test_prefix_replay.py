"""The simulator predicts what a real engine with the prefix tier reuses of a trace's prompts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from server.config.load import load
from server.preparation.embedded_model import prepare

pytestmark = pytest.mark.engine

TRACE = "tests/data/mooncake_synthetic_trace_end.jsonl"


def test_simulation_and_engine_agree() -> None:
    prepare(load(Path("configs/laptop.yaml")))
    # Its caches are so small that the engine evicts and loads, and the tier evicts, too.
    options = ["--requests", "60", "--blocks", "4", "--engine-blocks", "12", "--prefix", "128MiB"]
    command = [sys.executable, "scripts/bench/prefix_replay.py", TRACE, *options, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    reuse = json.loads(ended.stdout)
    measured, predicted = reuse["measured"], reuse["predicted"]
    assert measured["disk"] > 0.05
    assert sum(predicted.values()) == pytest.approx(sum(measured.values()), abs=0.03)
