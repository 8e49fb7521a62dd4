"""The road of a run, from options to exit status, against a server of its own."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import jsonschema
import pytest

from server.bench import commands
from server.bench.clients.run import ClientError
from server.bench.load import Progress
from server.bench.report.progress import LiveProgress
from server.bench.results.result import write_json, write_records
from server.bench.results.result_schema import as_json_schema
from server.bench.runs import Finished
from server.cli import main
from tests.server.bench.made import measured, records, result

EVENTS = b"".join(
    b"data: %b\n\n" % json.dumps(event).encode()
    for event in (
        {"choices": [{"index": 0, "delta": {"content": "Yes"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {"content": "."}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11}},
    )
) + b"data: [DONE]\n\n"  # fmt: skip


class Cache:
    """A server that answers as a cache would, and keeps the bodies that it was sent."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        cache = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply(b'{"data": [{"id": "m"}]}', "application/json")

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                seen = [asked["messages"] for asked in cache.asked]
                cache.asked.append(body)
                self.reply(EVENTS, "text/event-stream", "HIT" if body["messages"] in seen else "M")

            def reply(self, content: bytes, kind: str, status: str = "") -> None:
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                if status:
                    told = "hit; detail=memory" if status == "HIT" else "fwd=miss"
                    self.send_header("Cache-Status", f"tierserve; {told}")
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"


@contextmanager
def running() -> Iterator[Cache]:
    cache = Cache()
    thread = Thread(target=cache.server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield cache
    finally:
        cache.server.shutdown()
        thread.join()
        cache.server.server_close()


@pytest.fixture
def cache() -> Iterator[Cache]:
    with running() as made:
        yield made


def test_a_run(cache: Cache, tmp_path: Path, capsys) -> None:
    status = main(["bench", cache.url, "--workload", "zipf:prompts=3", "--requests", "40",
                   "--users", "2", "--out", str(tmp_path), "--format", "vllm,br"])  # fmt: skip
    said = capsys.readouterr()
    written = json.loads((tmp_path / "result.json").read_text())
    jsonschema.validate(written, json.loads(as_json_schema()))
    assert status == int(not written["valid"])
    assert written["whole"]["requests"] == len(cache.asked) == 40
    assert set(written["outcomes"]) == {"memory", "miss"}
    assert said.out.startswith("zipf:prompts=3 (cold) to m at http://127.0.0.1")
    assert f"written to {tmp_path}" in said.err
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {
        "result.json", "report.html", "records.npz", "vllm.json", "benchmark_report_whole.json",
        "benchmark_report_memory.json", "benchmark_report_miss.json",
    }  # fmt: skip


def test_a_warm_cache_is_asked_before_the_run_and_probes_are_apart(cache: Cache, capsys) -> None:
    main(["bench", cache.url, "--workload", "search:prompts=3,unique=0", "--cache", "warm",
          "--requests", "10", "--rate", "20", "--probe", "9", "--json"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert found["whole"]["requests"] == 10
    assert found["probe"]["requests"] >= 1
    # Three were warmed, and the probe, whose first request is a hit, too.
    limits = [body["max_tokens"] for body in cache.asked]
    assert limits[:4] == [40, 40, 40, 16]
    assert (limits.count(40), limits.count(16)) == (13, 1 + found["probe"]["requests"])
    assert set(found["outcomes"]) == {"memory"}


def test_a_ramp(cache: Cache, capsys, monkeypatch) -> None:
    monkeypatch.setattr("server.bench.results.ramp._LOWEST_OF_FIRST", 0.5)
    # A busy machine may well be the limit.
    monkeypatch.setattr("server.bench.results.ramp.client_limit", lambda _: None)
    # No rate holds: an answer has more than one µs.
    status = main(["bench", cache.url, "--ramp", "--objective", "e2e=1us@50%", "--rate", "40",
                   "--duration", "0.4", "--json"])  # fmt: skip
    said = capsys.readouterr()
    found = json.loads(said.out)
    jsonschema.validate(found, json.loads(as_json_schema()))
    assert status == 1
    assert found["ramp"]["rate"] is None
    rates = [probe["rate"] for probe in found["ramp"]["probes"]]
    assert rates == [40, 20]
    assert "40.0 sessions/s fails: " in said.err
    # No probe finds what another has left.
    assert len({body["messages"][0]["content"][:20] for body in cache.asked}) >= len(rates)


def test_ctrl_c_ends_a_ramp_and_keeps_what_it_knows(cache: Cache, capsys, monkeypatch) -> None:
    runs = iter((measured(), measured(records(10), interrupted=True)))
    monkeypatch.setattr("server.bench.runs.run_load", lambda *_: next(runs))
    status = main(["bench", cache.url, "--ramp", "--objective", "e2e=10s@50%", "--rate", "33",
                   "--duration", "60", "--json"])  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert (status, found["interrupted"]) == (130, True)
    assert (found["ramp"]["rate"], found["ramp"]["fails_at"]) == (33, None)
    assert found["whole"]["requests"] == 1960


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--workload", "nothing"], "--workload: should be a file, or the name of a workload"),
        (["--workload", "sharegpt:none.json"], "none.json"),
        (["--rate", "0"], "--rate: should be a number greater than 0"),
        (["--objective", "soon"], "--objective: "),
        (["--arrivals", "trace"], "--arrivals: trace is for workloads that have times"),
        (["--workload", "{images}"], "batch.jsonl:1: body should begin with text, which --cache"),
    ],
)
def test_nothing_is_sent_where_an_option_is_wrong(
    cache: Cache, tmp_path: Path, capsys, options, told
) -> None:
    images = tmp_path / "batch.jsonl"
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}
    images.write_text(json.dumps({"url": "/v1/chat/completions", "body": body}))
    options = [option.format(images=images) for option in options]
    assert main(["bench", cache.url, *options]) == 2
    said = capsys.readouterr()
    assert (said.out, cache.asked) == ("", [])
    assert told in said.err
    assert "entries" not in said.err


def test_nobody_listens(capsys) -> None:
    assert main(["bench", "http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err == (
        "URL: http://127.0.0.1:9 can't be reached: Connection refused\n"
    )


def test_a_client_that_fails(cache: Cache, capsys, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ClientError("client process 0 ended with status 9")

    monkeypatch.setattr("server.bench.runs.run_load", fail)
    assert main(["bench", cache.url]) == 1
    assert "the run failed: client process 0 ended with status 9\n" in capsys.readouterr().err


def test_what_cannot_be_written_is_shown(cache: Cache, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("server.bench.runs.run_load", lambda *_: measured())
    (tmp_path / "result.json").mkdir()
    assert main(["bench", cache.url, "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "1,960 requests" in said.out
    assert "result.json can't be written" in said.err
    assert "written to" not in said.err


def test_ctrl_c_shows_what_there_is(cache: Cache, capsys, monkeypatch) -> None:
    pressed = []

    def press(_: LiveProgress, progress: Progress) -> None:
        if progress.ended >= 3 and not pressed:
            pressed.append(signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(LiveProgress, "__call__", press)
    options = ["--duration", "2000", "--think", "0.1", "--json"]
    assert main(["bench", cache.url, *options]) == 130
    found = json.loads(capsys.readouterr().out)
    assert found["interrupted"]
    assert found["whole"]["requests"] >= 3


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, 0),
        ({"valid": False}, 1),
        ({"goodput": {"holds": True}}, 0),
        ({"goodput": {"holds": False}}, 1),
        ({"interrupted": True, "valid": False}, 130),
        ({"ramp": {"rate": 1.0}, "valid": False}, 0),
        ({"ramp": {"rate": None}}, 1),
    ],
)
def test_exit_statuses(changes: dict[str, Any], status: int) -> None:
    found = {"valid": True, "interrupted": False, "goodput": None, **changes}
    assert commands._status(Finished(found, measured(records(0)))) == status


def test_compare(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("server.bench.results.resample._RESAMPLES", 100)
    for name, seed in (("a", 1), ("b", 2)):
        folder = tmp_path / name
        folder.mkdir()
        rows = records(400, seed=seed)
        write_json(result(measured(rows)), folder / "result.json")
        write_records(rows, folder / "records.npz")
    runs = [str(tmp_path / name) for name in "ab"]
    assert main(["bench", "compare", *runs]) == 0
    assert "memory.ttft_s.p50" in capsys.readouterr().out
    assert main(["bench", "compare", *runs, "--fail-if", "miss.ttft.p50 > 0.5x"]) == 1
    assert "holds" in capsys.readouterr().out
    assert main(["bench", "compare", *runs, "--json"]) == 0
    assert "figures" in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["compare", "a"], "compare: should have two results"),
        (["compare", "a", "b"], "a: can't be read"),
        (["compare", "a", "b", "--rate", "1"], "--rate: should be left out"),
        (["schema", "--json"], "--json: should be left out"),
    ],
)
def test_what_needs_no_target(arguments: list[str], told: str, capsys) -> None:
    assert main(["bench", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_the_schema(capsys) -> None:
    assert main(["bench", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(as_json_schema())


def test_without_the_extra(monkeypatch, capsys) -> None:
    monkeypatch.setattr(commands, "find_spec", lambda name: None if name == "numpy" else name)
    assert main(["bench", "schema"]) == 2
    assert capsys.readouterr().err == "bench: needs numpy: install tierserve[bench]\n"
