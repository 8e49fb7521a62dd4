"""Where the admin API is reached: a Unix socket of this user's."""

import fcntl
import os
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from aiohttp import web

from server.config import Config
from server.http_request import Handler
from server.listener import listen_on, make_server

# An export can be asked for again.
_GRACE_S = 1


@asynccontextmanager
async def administered(config: Config, handler: Handler) -> AsyncIterator[None]:
    """Have `handler` answer meanwhile at the socket that is configured, if there is one.

    Raises:
        OSError: the socket can't be had.
    """
    if (path := config.admin.socket) is None:
        yield
        return
    server = make_server(handler, config.server)
    runner = web.ServerRunner(server, shutdown_timeout=_GRACE_S)
    with _bound(path) as bound:
        await runner.setup()
        listener = await listen_on(server, bound, config.server)
        try:
            yield
        finally:
            listener.close()
            await runner.cleanup()


@contextmanager
def _bound(path: Path) -> Iterator[socket.socket]:
    """Yield a socket at `path`, which is removed after.

    Its folder is made, private to this user, if it isn't there. What a server left that was killed
    is replaced: who has the socket holds a lock on a file beside it, which ends with its process.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as exc:
        raise _refused(exc, path) from exc
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_socket():
                    path.unlink()
                bound.bind(str(path))
                # Nobody can connect before it listens.
                path.chmod(0o600)
            except BlockingIOError as exc:
                raise OSError(f"admin.socket: another server answers at {path}") from exc
            except OSError as exc:
                raise _refused(exc, path) from exc
            try:
                yield bound
            finally:
                path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _refused(exc: OSError, path: Path) -> OSError:
    should = "should be a path where a socket can be made, or null"
    return OSError(f"admin.socket: {should}, not {path}: {exc.strerror}")
