"""Prints how many Python calls a server makes for one hit in memory: `python -m … FOLDER PORT`.

The server runs in this process, in front of an upstream that a thread asks it for. Each hit is
counted by itself, and the median taken, so that no timer that goes off meanwhile counts.
"""

import os
import signal
import socket
import statistics
import sys
import threading
import time
from pathlib import Path

import orjson

from server import app
from server.config.load import load
from tests.server.conftest import Upstream, question

_HITS = 200
_calls = 0


def _count(_frame: object, event: str, _argument: object) -> None:
    global _calls
    _calls += event == "call"


def _ask(connection: socket.socket, request: bytes) -> bytes:
    """Return the head of the response, having read all of it."""
    connection.sendall(request)
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return head


def _connected(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.01)


def _drive(port: int) -> None:
    body = orjson.dumps(question(model="m"))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with _connected(port) as connection:
        while b"detail=memory" not in (answered := _ask(connection, request)):
            assert b" 200 " in answered or b" 503 " in answered, answered
        counts = []
        for _ in range(_HITS):
            before = _calls
            _ask(connection, request)
            # The server finishes a request after its client has the response.
            time.sleep(0.003)
            counts.append(_calls - before)
    sys.stdout.write(f"{statistics.median(counts)}\n")
    sys.stdout.flush()
    os.kill(os.getpid(), signal.SIGTERM)


def main(folder: Path, port: int) -> None:
    upstream = Upstream()
    run = app._run

    async def with_upstream(*args: object) -> int:
        await upstream.start()
        threading.Thread(target=_drive, args=[port]).start()
        try:
            return await run(*args)
        finally:
            await upstream.stop()

    app._run = with_upstream
    config = folder / "config.yaml"
    config.write_bytes(
        orjson.dumps(
            {
                "server": {"port": port},
                "models": {"m": {"upstreams": [upstream.url], "vllm": {}}},
                "admin": {"socket": None},
                "tiers": {"disk": {"path": str(folder / "disk"), "max_bytes": "4MiB"}},
                "log": {"level": "error"},
            }
        )
    )
    # The client's thread isn't counted, since a profile function is of one thread.
    sys.setprofile(_count)
    app.serve(load(config))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
