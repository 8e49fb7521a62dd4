"""What is asked before a run, of targets of all kinds."""

from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from server.bench.load import Target
from server.bench.target import find_model, is_ready
from server.config.base import ConfigError
from tests.servers import free_port


@contextmanager
def answering(status: int, body: bytes) -> Iterator[tuple[Target, list[str]]]:
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers['X-Key']}")
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield Target(f"http://127.0.0.1:{server.server_port}/base", (("X-Key", "k"),)), asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


MODELS = b'{"data": [{"id": "first"}, {"id": "second"}]}'


def test_the_first_model_is_taken() -> None:
    with answering(200, MODELS) as (target, asked):
        assert find_model(target, None) == "first"
        assert find_model(target, "other") == "other"
    assert asked == ["/base/v1/models k"] * 2


@pytest.mark.parametrize("body", [b"", b"[]", b'{"data": []}', b'{"data": [{"name": "x"}]}'])
def test_a_target_that_names_no_model(body: bytes) -> None:
    with answering(200, body) as (target, _):
        assert find_model(target, "other") == "other"
        with pytest.raises(ConfigError, match="--model: should be given"):
            find_model(target, None)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key(status: int) -> None:
    with (
        answering(status, b"") as (target, _),
        pytest.raises(ConfigError, match="refuses the key"),
    ):
        find_model(target, "other")


def test_whether_an_engine_is_there() -> None:
    for status, expected in ((200, True), (404, True), (503, False)):
        with answering(status, b"") as (target, asked):
            assert is_ready(target) == expected
        assert asked == ["/base/ready k"]


def test_nobody_listens() -> None:
    with pytest.raises(ConfigError, match="can't be reached: Connection refused"):
        find_model(Target(f"http://127.0.0.1:{free_port()}"), None)


def test_a_name_that_nobody_knows() -> None:
    with pytest.raises(ConfigError, match="can't be reached: its name isn't known"):
        find_model(Target("http://name.invalid"), None)


def test_a_name_that_can_not_be() -> None:
    with pytest.raises(ConfigError, match="can't be reached: its name isn't known"):
        find_model(Target("http://a..b"), None)


def test_no_http(tmp_path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"SSH-2.0-OpenSSH\r\n")

        thread = Thread(target=answer)
        thread.start()
        with pytest.raises(ConfigError, match="its answer isn't HTTP"):
            find_model(Target(f"http://127.0.0.1:{server.getsockname()[1]}"), None)
        thread.join()
