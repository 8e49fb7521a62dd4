"""Serves the admin API: at a Unix socket of this user's, and at a port to clients with its key."""

import asyncio
import fcntl
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    ExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)  # fmt: skip
from functools import partial
from pathlib import Path

from aiohttp import web

from server.audit.acts import Audit
from server.config.folders import log_if_new
from server.config.schema import Config, ServerConfig
from server.web.access import AccessCheck, allow_anyone, require_key
from server.web.listener import addresses, listen, listen_at, listen_unix, make_server
from server.web.request import Endpoint

logger = logging.getLogger(__name__)

# Short, since a client can repeat an export.
_SHUTDOWN_GRACE_S = 1
_CHECK_EVERY_S = 10


@asynccontextmanager
async def serve_admin_api(
    config: Config,
    handler_for: Callable[[AccessCheck], Endpoint],
    tls: ssl.SSLContext | None,
    audit: Audit,
    inherited: Sequence[socket.socket] = (),
) -> AsyncIterator[None]:
    """Serve the admin API at the socket and the port that are configured.

    Args:
        config: has the addresses.
        handler_for: returns the API's handler behind an access check.
        tls: of the port.
        audit: records clients of the port that don't have the key.
        inherited: sockets that listen already, in place of the port.

    Raises:
        OSError: the socket or the port can't be used.
    """
    async with AsyncExitStack() as stack:
        if (path := config.admin.socket) is not None:
            at_socket = _serve_socket(path, handler_for(allow_anyone), config.server)
            await stack.enter_async_context(at_socket)
        key, has_port = config.admin.key, inherited or config.admin.port is not None
        if has_port and key is not None:
            handler = handler_for(require_key(key, audit))
            at_port = _serve_port(config, handler, tls, inherited)
            await stack.enter_async_context(at_port)
        yield


@asynccontextmanager
async def _serve_socket(
    path: Path, handler: Endpoint, options: ServerConfig
) -> AsyncIterator[None]:
    async with _server(handler, options) as server, AsyncExitStack() as stack:
        listening = partial(_listen_at_socket, server, path, options)
        await stack.enter_async_context(listening())
        restoring = asyncio.create_task(_restore(path, stack, listening))
        try:
            yield
        finally:
            restoring.cancel()
            await asyncio.wait([restoring])


@asynccontextmanager
async def _listen_at_socket(
    server: web.Server, path: Path, options: ServerConfig
) -> AsyncIterator[None]:
    with _bind(path) as bound:
        listener = await listen_unix(server, bound, options)
        try:
            yield
        finally:
            listener.close()


async def _restore(
    path: Path,
    stack: AsyncExitStack,
    listening: Callable[[], AbstractAsyncContextManager[None]],
) -> None:
    """Listen again whenever the socket is removed, for instance by a cleaner of caches."""
    last_message = ""
    while True:
        await asyncio.sleep(_CHECK_EVERY_S)
        try:
            if await asyncio.to_thread(path.exists):
                continue
            await stack.aclose()
            await stack.enter_async_context(listening())
            message = f"admin.socket: {path} was removed; it is created again"
        except OSError as exc:
            message = str(exc)
        if message != last_message:
            logger.warning("%s", message)
        last_message = message


@asynccontextmanager
async def _serve_port(
    config: Config,
    handler: Endpoint,
    tls: ssl.SSLContext | None,
    inherited: Sequence[socket.socket],
) -> AsyncIterator[None]:
    async with _server(handler, config.server) as server:
        try:
            listeners = [
                await listen_at(server, each, config.server, tls, None) for each in inherited
            ]
            if not listeners:
                host, port = config.admin.host, config.admin.port or 0
                listeners = [await listen(server, host, port, config.server, tls)]
        except OSError as exc:
            raise OSError(f"admin.port: can't be used: {exc}") from exc
        for listener in listeners:
            logger.info("the admin API listens on %s", addresses(listener, tls))
        try:
            yield
        finally:
            for listener in listeners:
                listener.close()


@asynccontextmanager
async def _server(handler: Endpoint, options: ServerConfig) -> AsyncIterator[web.Server]:
    server = make_server(handler, options)
    runner = web.ServerRunner(server, shutdown_timeout=_SHUTDOWN_GRACE_S)
    await runner.setup()
    try:
        yield server
    finally:
        await runner.cleanup()


@contextmanager
def _bind(path: Path) -> Iterator[socket.socket]:
    """Yield a socket bound to `path`, which is removed at the end.

    The folder is created, private to this user, if it doesn't exist. The server holds a lock on a
    file beside the socket; the system releases it when the process ends, so the socket of a killed
    server is replaced. The lock file is removed at the end, too.

    Raises:
        OSError: another server uses the path, or no socket can be created there.
    """
    log_if_new("admin.socket", path.parent)
    with ExitStack() as stack:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = _lock(lock_file := path.with_name(f"{path.name}.lock"))
            stack.callback(os.close, lock)
            stack.callback(_remove, lock_file, os.fstat(lock))
            bound = stack.enter_context(socket.socket(socket.AF_UNIX))
            if path.is_socket():
                path.unlink()
            bound.bind(str(path))
            # Nobody can connect before the socket listens.
            path.chmod(0o600)
            stack.callback(_remove, path, path.stat())
        except BlockingIOError as exc:
            raise OSError(f"admin.socket: another server answers at {path}") from exc
        except OSError as exc:
            should = "should be a path where a socket can be made, or null"
            raise OSError(f"admin.socket: {should}, not {path}: {exc.strerror}") from exc
        yield bound


def _remove(file: Path, ours: os.stat_result) -> None:
    """Remove a file, unless another server has replaced it."""
    with suppress(FileNotFoundError):
        if os.path.samestat(ours, file.stat()):
            file.unlink()


def _lock(file: Path) -> int:
    """Create `file` if it doesn't exist, and return it open and locked.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: the file can't be opened.
    """
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the file after we opened it.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), file.stat()):
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
