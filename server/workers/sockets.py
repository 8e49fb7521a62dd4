"""The listening sockets of workers: one for each worker at each address, made by the master.

The kernel spreads connections over the sockets of one address (socket(7), SO_REUSEPORT). The master
keeps all of them open, so that connections to a dead worker wait for the one that replaces it. With
one socket for all, a worker that is idle already would get most connections.
"""

import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

from server.config.schema import is_dual
from server.web.listener import BACKLOG

_Address = tuple[int, tuple[object, ...]]


def bind(host: str, port: int, workers: int) -> list[list[socket.socket]]:
    """Return the sockets of each worker. They listen; connections wait for the worker.

    Raises:
        OSError: the address can't be used.
    """
    bound: list[list[socket.socket]] = [[] for _ in range(workers)]
    with ExitStack() as stack:
        for family, address in _addresses(host, port):
            # Unlike ours, this one doesn't share its address: not with another server either, which
            # is seen only while it listens.
            with _listen(family, address, is_dual(host)) as alone:
                address = alone.getsockname()
            for own in bound:
                shared = _listen(family, address, is_dual(host), shares=True)
                own.append(stack.enter_context(shared))
        stack.pop_all()
    return bound


def _addresses(host: str, port: int) -> Iterator[_Address]:
    if is_dual(host):
        yield socket.AF_INET6, ("::", port)
        return
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    yield from dict.fromkeys((family, address) for family, _, _, _, address in found)


def _listen(
    family: int, address: Sequence[object], is_dual: bool, *, shares: bool = False
) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shares)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_dual)
        made.bind(tuple(address))
        made.listen(BACKLOG)
    except OSError as exc:
        made.close()
        at = f"{address[0]} port {address[1]}"
        raise OSError(exc.errno, f"can't listen at {at}: {exc.strerror}") from exc
    return made
