"""Prints how many Python calls a server makes for one hit.

`python -m … FOLDER PORT UPSTREAM_PORT WAY TIER`: WAY is `short` or `long`, TIER is `memory` or
`disk`.

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
from math import inf
from pathlib import Path

import orjson

from server import app
from server.config.load import load
from server.telemetry import finished
from server.web.inherited_sockets import InheritedSockets
from tests.server.conftest import Upstream, question
from tests.waiting import HANGS_S
from tiers.purges import purges

_HITS = 200
_STORED = b'tierserve_tier_stores_total{tier="disk"} 1.0\n'
_calls = 0


def _count(_frame: object, event: str, _argument: object) -> None:
    global _calls
    _calls += event == "call"


def _ask(connection: socket.socket, request: bytes) -> tuple[bytes, bytes]:
    """Return the head and the body of the response."""
    connection.sendall(request)
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536)
    return head, body


def _connected(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.01)


def _drive(port: int, tier: str) -> None:
    body = orjson.dumps(question(model="m"))
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    with _connected(port) as connection:
        while f"detail={tier}".encode() not in (head := _ask(connection, request)[0]):
            assert b" 200 " in head or b" 503 " in head, head
        while _STORED not in _ask(connection, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")[1]:
            # Before, a hit has to look whether a newer answer is being stored.
            time.sleep(0.01)
        for _ in range(4):
            # Until its bytes are known.
            _ask(connection, request)
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


def main(folder: Path, port: int, upstream_port: int, way: str, tier: str) -> None:
    upstream = Upstream(port=upstream_port)
    run = app._run

    async def with_upstream(*args: object) -> int:
        await upstream.start()
        threading.Thread(target=_drive, args=[port, tier]).start()
        try:
            return await run(*args)
        finally:
            await upstream.stop()

    app._run = with_upstream
    config = folder / "config.yaml"
    config.write_bytes(
        orjson.dumps(
            {
                "server": {"port": port, "known_requests": way == "short"},
                "models": {"m": {"upstreams": [upstream.url], "vllm": {}}},
                "admin": {"socket": None},
                "tiers": {
                    "disk": {"path": str(folder / "disk"), "max_bytes": "4MiB"},
                    "memory": {} if tier == "memory" else None,
                },
                "log": {"level": "error"},
            }
        )
    )
    # On a slow machine most hits would be the first of their 20 ms, which looks for purges, or of
    # their 200 ms, which counts those before.
    purges.FRESH_S, finished._FLUSH_S = inf, HANGS_S
    # The client's thread isn't counted, since a profile function is of one thread.
    sys.setprofile(_count)
    app.serve(load(config), config, InheritedSockets())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
