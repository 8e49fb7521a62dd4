"""A client over sockets, of which a test decides every byte."""

import asyncio
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_HEAD_END = b"\r\n\r\n"
# Closing sends a reset instead of an end.
_RESET = struct.pack("ii", 1, 0)


class Reply(NamedTuple):
    """One response, its body without the chunks in which it came."""

    line: str
    """The status line; empty for a response that was cut short."""
    headers: tuple[tuple[str, str], ...]
    """As they were sent, in their order."""
    body: bytes

    @property
    def status(self) -> int:
        return int(self.line.split(" ", 2)[1]) if self.line else 0

    def header(self, name: str) -> str | None:
        """Return the value of a header that stands at most once."""
        values = [value for known, value in self.headers if known.lower() == name.lower()]
        assert len(values) <= 1, f"{name} stands twice: {self}"
        return values[0] if values else None


class RawConnection:
    """A connection to a port of this machine, or to a Unix socket."""

    def __init__(self, to: int | Path) -> None:
        is_port = isinstance(to, int)
        self._address = ("127.0.0.1", to) if is_port else str(to)
        self._socket = socket.socket(socket.AF_INET if is_port else socket.AF_UNIX)
        self._socket.setblocking(False)
        if is_port:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._got = bytearray()
        self.has_ended = False
        """Whether the server has closed it, and all that it sent before is known."""
        self.waits_since: float | None = None
        """When the first of the bytes was sent that aren't answered; who reads the answer sets it
        to `None`."""

    async def open(self) -> None:
        await asyncio.get_running_loop().sock_connect(self._socket, self._address)

    async def send(self, data: bytes) -> None:
        """Send bytes; they are lost if the server has closed the connection."""
        if self.waits_since is None:
            self.waits_since = time.time()
        with suppress(ConnectionError):
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

    def half_close(self) -> None:
        """Tell the server that nothing more comes."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()

    def abort(self) -> None:
        """Close by a reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._socket.close()

    async def reply_to(self, method: str) -> Reply | None:
        """Return the next response, an interim one too; `None` if the connection ends before it.

        A response that was cut short has status 0.
        """
        while (end := self._got.find(_HEAD_END)) < 0:
            if not await self._read():
                rest, self._got = bytes(self._got), bytearray()
                return Reply("", (), rest) if rest else None
        line, *lines = self._got[:end].decode("latin-1").split("\r\n")
        reply = Reply(line, tuple(_pairs(lines)), b"")
        del self._got[: end + len(_HEAD_END)]
        named = {name.lower(): value for name, value in reply.headers}
        if method == "HEAD" or reply.status < 200 or reply.status in (204, 304):
            body: bytes | None = b""
        elif "content-length" in named:
            body = await self._take(int(named["content-length"]))
        elif named.get("transfer-encoding") == "chunked":
            body = await self._take_chunks()
        else:
            body = await self.rest()
        return reply._replace(line="") if body is None else reply._replace(body=body)

    async def rest(self) -> bytes:
        """Return all that comes until the server closes the connection."""
        while await self._read():
            pass
        rest, self._got = bytes(self._got), bytearray()
        return rest

    async def _read(self) -> bool:
        if self.has_ended:
            return False
        piece = b""
        with suppress(ConnectionError):
            piece = await asyncio.get_running_loop().sock_recv(self._socket, 256 * 1024)
        self.has_ended = not piece
        self._got += piece
        return bool(piece)

    async def _take(self, size: int) -> bytes | None:
        while len(self._got) < size:
            if not await self._read():
                return None
        taken = bytes(self._got[:size])
        del self._got[:size]
        return taken

    async def _take_chunks(self) -> bytes | None:
        body = bytearray()
        while True:
            while (end := self._got.find(b"\r\n")) < 0:
                if not await self._read():
                    return None
            size = int(self._got[:end], 16)
            chunk = await self._take(end + 2 + size + 2)
            if chunk is None:
                return None
            body += chunk[end + 2 : -2]
            if not size:
                return bytes(body)


def _pairs(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        name, _, value = line.partition(": ")
        yield name, value
