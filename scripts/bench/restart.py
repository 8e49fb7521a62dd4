"""What a restart costs: seconds until the first hit from disk, and until the first miss.

Runs `scripts/serve` twice over one disk tier of its own. The first run generates an answer. The
second has no memory tier, which would be refilled: it answers from disk while the engine still
loads. How long hits and misses take afterwards is what `headline.py` measures.

Usage: restart.py
"""

import http.client
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import orjson
from rows import print_row
from servers import free_port, running

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Measure and print."""
    subprocess.run([ROOT / "scripts/setup"], check=True)
    with tempfile.TemporaryDirectory(prefix="tierserve-bench-") as folder:
        with _serving(Path(folder), memory="{}") as (process, port, _):
            _until(process, port, "Are you there?", "fwd=miss")
        with _serving(Path(folder), memory="null") as (process, port, started):
            _until(process, port, "Are you there?", "detail=disk")
            hit_s = time.monotonic() - started
            _until(process, port, "Are you back?", "fwd=miss")
            miss_s = time.monotonic() - started
    print(f"restart: {hit_s:.1f} s to the first disk hit, {miss_s:.1f} s to the first miss")
    print_row("restart: first disk hit, first miss", f"{hit_s:.1f} s, {miss_s:.0f} s")
    return 0


@contextmanager
def _serving(
    folder: Path, *, memory: str
) -> Iterator[tuple["subprocess.Popen[bytes]", int, float]]:
    """Run `scripts/serve`; gives its process, the port, and when it was started."""
    port = free_port()
    env = {
        "TIERSERVE__SERVER__PORT": str(port),
        "TIERSERVE__TIERS__DISK__PATH": str(folder / "disk"),
        "TIERSERVE__TIERS__MEMORY": memory,
    }
    command = [str(ROOT / "scripts/serve")]
    started = time.monotonic()
    # It is asked from the first moment on.
    with running(command, port, env=env, log=folder / "log", is_ready=lambda _: True) as process:
        yield process, port, started


def _until(process: "subprocess.Popen[bytes]", port: int, question: str, expected: str) -> None:
    """Ask until there is an answer, which has to be the expected kind of answer."""
    while process.poll() is None:
        with suppress(OSError, http.client.HTTPException):
            status, told = _ask(port, question)
            if status == 200:
                if expected not in told:
                    raise ValueError(f"expected {expected}, not {told}")
                return
        time.sleep(0.05)
    raise ChildProcessError(f"the server ended with status {process.returncode}")


def _ask(port: int, question: str) -> tuple[int, str]:
    """Return status and `Cache-Status`."""
    body = orjson.dumps(
        {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 8}
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        response.read()
        return response.status, response.headers.get("Cache-Status", "")
    finally:
        connection.close()


if __name__ == "__main__":
    sys.exit(main())
