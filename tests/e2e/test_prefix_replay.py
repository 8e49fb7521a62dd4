"""The simulator predicts what a real engine with the prefix tier reuses of a trace's prompts."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

from server.config.load import load
from server.preparation.embedded_model import prepare
from tests.servers import free_port

from .prefix.engine import patient

pytestmark = pytest.mark.engine

TRACE = "tests/data/mooncake_synthetic_trace_end.jsonl"


def test_simulation_and_engine_agree(monkeypatch, capsys) -> None:
    prepare(load(Path("configs/laptop.yaml")))
    monkeypatch.syspath_prepend("scripts/bench")
    servers, script = import_module("servers"), import_module("prefix_replay")
    monkeypatch.setattr(servers, "free_port", free_port)
    monkeypatch.setitem(servers.VLLM_ENV, "VLLM_PORT", str(free_port()))
    options_of = script._options
    monkeypatch.setattr(script, "_options", lambda *given: patient(options_of(*given)))
    # Its caches are so small that the engine evicts and loads, and the tier evicts, too.
    options = ["--requests", "60", "--blocks", "4", "--engine-blocks", "12", "--prefix", "128MiB"]
    monkeypatch.setattr(sys, "argv", ["prefix_replay.py", TRACE, *options, "--json"])
    assert script.main() == 0
    reuse = json.loads(capsys.readouterr().out)
    measured, predicted = reuse["measured"], reuse["predicted"]
    assert measured["disk"] > 0.05
    assert sum(predicted.values()) == pytest.approx(sum(measured.values()), abs=0.03)
