"""Listening sockets that a service manager has opened, and that this process takes over."""

import os
import socket
from collections.abc import MutableMapping
from typing import NamedTuple

from server.config.base import ConfigError

_FIRST_INHERITED = 3
_VARIABLES = "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"
_ADMIN = "admin"
_FAMILIES = socket.AF_INET, socket.AF_INET6


class InheritedSockets(NamedTuple):
    """Listening sockets that a service manager has opened, and that this process inherits.

    They stay open there, so connections that come while this server is restarted wait for the next
    one. Where there are none, the configuration has the addresses.
    """

    front: tuple[socket.socket, ...] = ()
    """For clients: in place of `server.host` and `server.port`."""
    admin: tuple[socket.socket, ...] = ()
    """For the admin API: in place of `admin.host` and `admin.port`."""


def take_inherited_sockets(
    environment: MutableMapping[str, str] = os.environ, first: int = _FIRST_INHERITED
) -> InheritedSockets:
    """Return the inherited sockets; the one of the name `admin` is for the admin API.

    The protocol is systemd's (sd_listen_fds(3)), and others speak it, too. The variables are
    removed, and no child inherits a socket, unless it is passed on.

    Args:
        environment: of this process.
        first: the number of the first socket.

    Raises:
        ConfigError: what is inherited aren't listening TCP sockets.
    """
    pid, number, names = (environment.pop(name, "") for name in _VARIABLES)
    if pid != str(os.getpid()):
        # They were another process's, which has started us.
        return InheritedSockets()
    if not number.isdecimal():
        raise ConfigError([f"LISTEN_FDS: should be the number of sockets, not {number!r}"])
    named = names.split(":") if names else []
    if named and len(named) != int(number):
        raise ConfigError([f"LISTEN_FDNAMES: should be {number} names, not {names!r}"])
    front: list[socket.socket] = []
    admin: list[socket.socket] = []
    for each in range(int(number)):
        found = _listening_socket(first + each)
        (admin if named and named[each] == _ADMIN else front).append(found)
    return InheritedSockets(tuple(front), tuple(admin))


def _listening_socket(file: int) -> socket.socket:
    """Return the socket with a file descriptor.

    Raises:
        ConfigError: it isn't a listening TCP socket.
    """
    try:
        found = socket.socket(fileno=file)
        is_listening = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as exc:
        raise ConfigError([f"LISTEN_FDS: file {file} should be a socket: {exc.strerror}"]) from exc
    if not (is_listening and found.family in _FAMILIES and found.type == socket.SOCK_STREAM):
        found.detach()
        text = f"file {file} should be a TCP socket that listens, as of ListenStream=8000"
        raise ConfigError([f"LISTEN_FDS: {text}"])
    found.setblocking(False)
    found.set_inheritable(False)
    return found
