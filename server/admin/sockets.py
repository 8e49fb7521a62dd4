"""Where the admin API is reached: a Unix socket of this user's, and a port for who has its key."""

import asyncio
import fcntl
import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AsyncExitStack,
    asynccontextmanager,
    contextmanager,
    suppress,
)  # fmt: skip
from functools import partial
from pathlib import Path

from aiohttp import web

from server.config.folders import log_if_new
from server.config.schema import Config, ServerConfig
from server.web.access import AccessCheck, allow_anyone, require_key
from server.web.listener import addresses, listen, listen_unix, make_server
from server.web.request import Handler

logger = logging.getLogger(__name__)

# An export can be asked for again.
_GRACE_S = 1
_CHECK_EVERY_S = 10


@asynccontextmanager
async def serve_admin_api(
    config: Config, wrapped: Callable[[AccessCheck], Handler], tls: ssl.SSLContext | None
) -> AsyncIterator[None]:
    """Have the admin API answer meanwhile where that is configured.

    Args:
        config: says where.
        wrapped: returns its handler for those whom a door lets in.
        tls: for its port.

    Raises:
        OSError: the socket or the port can't be had.
    """
    async with _at_socket(config, wrapped(allow_anyone)), _at_port(config, wrapped, tls):
        yield


@asynccontextmanager
async def _at_socket(config: Config, handler: Handler) -> AsyncIterator[None]:
    if (path := config.admin.socket) is None:
        yield
        return
    async with _served(config, handler) as server, AsyncExitStack() as stack:
        listening = partial(_listening, server, path, config.server)
        await stack.enter_async_context(listening())
        keeping = asyncio.create_task(_keep(path, stack, listening))
        try:
            yield
        finally:
            keeping.cancel()
            await asyncio.wait([keeping])


@asynccontextmanager
async def _listening(server: web.Server, path: Path, options: ServerConfig) -> AsyncIterator[None]:
    with _bound(path) as bound:
        listener = await listen_unix(server, bound, options)
        try:
            yield
        finally:
            listener.close()


async def _keep(
    path: Path,
    stack: AsyncExitStack,
    listening: Callable[[], AbstractAsyncContextManager[None]],
) -> None:
    """Listen anew when somebody has removed the socket, such as a cleaner of folders."""
    logged = ""
    while True:
        await asyncio.sleep(_CHECK_EVERY_S)
        try:
            if await asyncio.to_thread(path.exists):
                continue
            await stack.aclose()
            await stack.enter_async_context(listening())
            found = f"admin.socket: {path} was removed, and is made anew"
        except OSError as exc:
            found = str(exc)
        if found != logged:
            logger.warning("%s", found)
        logged = found


@asynccontextmanager
async def _at_port(
    config: Config, wrapped: Callable[[AccessCheck], Handler], tls: ssl.SSLContext | None
) -> AsyncIterator[None]:
    admin = config.admin
    if admin.port is None or admin.key is None:
        yield
        return
    async with _served(config, wrapped(require_key(admin.key))) as server:
        try:
            listener = await listen(server, admin.host, admin.port, config.server, tls)
        except OSError as exc:
            raise OSError(f"admin.port: can't be had: {exc}") from exc
        logger.info("the admin API listens on %s", addresses(listener, tls))
        try:
            yield
        finally:
            listener.close()


@asynccontextmanager
async def _served(config: Config, handler: Handler) -> AsyncIterator[web.Server]:
    server = make_server(handler, config.server)
    runner = web.ServerRunner(server, shutdown_timeout=_GRACE_S)
    await runner.setup()
    try:
        yield server
    finally:
        await runner.cleanup()


@contextmanager
def _bound(path: Path) -> Iterator[socket.socket]:
    """Yield a socket at `path`, which is removed after.

    Its folder is made, private to this user, if it isn't there. What a server left that was killed
    is replaced: who has the socket holds a lock on a file beside it, which ends with its process,
    and is removed after, too.
    """
    log_if_new("admin.socket", path.parent)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _locked(beside := path.with_name(f"{path.name}.lock"))
    except BlockingIOError as exc:
        raise OSError(f"admin.socket: another server answers at {path}") from exc
    except OSError as exc:
        raise _refused(exc, path) from exc
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            try:
                if path.is_socket():
                    path.unlink()
                bound.bind(str(path))
                # Nobody can connect before it listens.
                path.chmod(0o600)
                made = path.stat()
            except OSError as exc:
                raise _refused(exc, path) from exc
            try:
                yield bound
            finally:
                _remove(path, made)
    finally:
        _remove(beside, os.fstat(lock))
        os.close(lock)


def _remove(file: Path, ours: os.stat_result) -> None:
    """Remove a file unless another server has made one of its name since."""
    with suppress(FileNotFoundError):
        if os.path.samestat(ours, file.stat()):
            file.unlink()


def _locked(file: Path) -> int:
    """Return `file` open and locked; it is made if it isn't there.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: it can't be opened.
    """
    while True:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it may have removed it meanwhile.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock), file.stat()):
                    return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def _refused(exc: OSError, path: Path) -> OSError:
    should = "should be a path where a socket can be made, or null"
    return OSError(f"admin.socket: {should}, not {path}: {exc.strerror}")
