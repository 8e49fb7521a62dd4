"""Whether this machine has what a configuration names; nothing is started, made or fetched.

What may be otherwise in a minute is no mistake: a port that another server has, an upstream that
doesn't answer, a hub that is away.
"""

import errno
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from server.auth.tenants import Tenants
from server.cache import encryption_key, open_shared, sealed_otherwise
from server.config.base import ConfigError
from server.config.folders import NO_HOME, new_engine_folder
from server.config.load import LoadResult, load_partially
from server.config.schema import Config, is_dual
from server.engine.weights import location_mistakes
from server.web.tls import Certificate
from tiers.disk import EncryptionKeyError, check_key

_PORTS = {"http": 80, "https": 443}


class _Address(NamedTuple):
    family: socket.AddressFamily
    where: Any

    @property
    def host(self) -> IPv4Address | IPv6Address:
        return ip_address(self.where[0])


def load_checked(file: Path) -> Config:
    """Read a configuration that a server can be started with.

    Raises:
        ConfigError: the file can't be read, or something is wrong; it names all that is.
    """
    given = load_partially(file)
    wrong = [f"{path}{end}" for path in given.invalid_paths for end in (".", ":")]
    # Of what was left out, the default isn't what was meant.
    missing = [each for each in _missing(given) if not each.startswith(tuple(wrong))]
    if mistakes := given.mistakes + missing:
        raise ConfigError(mistakes)
    return given.config


def _missing(given: LoadResult) -> Iterator[str]:
    config = given.config
    yield from _told_by(lambda: Tenants(config.tenants))
    if (tls := config.server.tls) is not None:
        yield from _told_by(lambda: Certificate(tls))
    if not {"server.host", "server.port"} & {*given.invalid_paths}:
        yield from _of_addresses(config)
    for name, model in config.models.items():
        if not model.upstreams:
            yield from location_mistakes(name, model)
    if not all(model.upstreams for model in config.models.values()):
        yield from _told_by(new_engine_folder)
    yield from _of_tiers(config)
    yield from _of_socket(config)
    if (trace := config.log.trace) is not None and (why := _no_file(trace)) is not None:
        yield f"log.trace: should be a file that we can write, not {trace}: {why}"


def _told_by(look: Callable[[], object]) -> list[str]:
    try:
        look()
    except ConfigError as exc:
        return exc.mistakes
    return []


def _of_addresses(config: Config) -> Iterator[str]:
    server, admin = config.server, config.admin
    front = _addresses(server.host, server.port)
    yield from _unheard("server", server.host, server.port)
    if admin.port is not None:
        yield from _unheard("admin", admin.host, admin.port)
        back = _addresses(admin.host, admin.port)
        if admin.port == server.port != 0 and any(_is_at(each, front) for each in back):
            yield f"admin.port: should be another than server.port, not {admin.port}"
    for name, model in config.models.items():
        for number, url in enumerate(model.upstreams):
            parts = urlsplit(url)
            port = parts.port or _PORTS[parts.scheme]
            host = parts.hostname or ""
            # Where one can bind what isn't this machine's, as Kubernetes may have it, only these
            # are surely its own.
            if port == server.port and any(
                _is_at(each, front) and (each.host.is_loopback or host == server.host)
                for each in _addresses(host, port)
            ):
                yield f"models.{name}.upstreams.{number}: should be another server than this one"


def _addresses(host: str, port: int) -> list[_Address]:
    """Return what `host` stands for, which is nothing where that can't be told."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        if is_dual(host):
            found += socket.getaddrinfo("0.0.0.0", port, type=socket.SOCK_STREAM)  # noqa: S104
    except OSError:
        return []
    return [_Address(family, where) for family, _, _, _, where in found]


def _is_at(address: _Address, listening: Sequence[_Address]) -> bool:
    """Whether who has one of `listening` can't share it with `address`."""
    same = [each.host for each in listening if each.family is address.family]
    is_any = address.host.is_unspecified and bool(same)
    return is_any or any(each == address.host or each.is_unspecified for each in same)


def _unheard(section: str, host: str, port: int) -> Iterator[str]:
    """Yield why one can't listen there."""
    addresses = _addresses(host, port)
    # Of a family that this machine doesn't have, servers listen at the others.
    codes = [code for code in map(_refused, addresses) if code != errno.EAFNOSUPPORT]
    if errno.EACCES in codes:
        yield f"{section}.port: should be one that this user may have, not {port}"
    elif not codes or not {0, errno.EADDRINUSE}.issuperset(codes):
        yield f"{section}.host: should be a name or an address of this machine, not {host!r}"


def _refused(address: _Address) -> int:
    """Return the system's number for why one can't listen at an address, or 0."""
    try:
        with socket.socket(address.family, socket.SOCK_STREAM) as made:
            # As servers do; nobody can connect, since it doesn't listen.
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(address.where)
    except OSError as exc:
        return exc.errno or errno.EADDRNOTAVAIL
    return 0


def _of_tiers(config: Config) -> Iterator[str]:
    tiers = config.tiers
    if tiers.disk is not None and tiers.disk.path is None:
        yield f"tiers.disk.path: should be given: {NO_HOME}"
    if (disk := tiers.disk) is not None and disk.path is not None:
        if (why := _no_folder(disk.path)) is not None:
            yield f"tiers.disk.path: should be a folder for us alone, not {disk.path}: {why}"
        try:
            check_key(disk.path, encryption_key(disk))
        except ConfigError as exc:
            yield from exc.mistakes
        except EncryptionKeyError as exc:
            yield from sealed_otherwise(disk.path, exc).mistakes
    if (shared := tiers.shared) is not None:
        yield from _told_by(lambda: open_shared(shared))


def _of_socket(config: Config) -> Iterator[str]:
    if (path := config.admin.socket) is not None:
        should = f"admin.socket: should be a path where a socket can be made, or null, not {path}"
        if (why := _no_folder(path.parent)) is not None:
            yield f"{should}: {why}"
        elif path.exists() and not path.is_socket():
            yield f"{should}: something else is there"
    elif "socket" not in config.admin.model_fields_set:
        yield f"admin.socket: should be given, or null: {NO_HOME}"


def _no_folder(folder: Path) -> str | None:
    """Return why there can't be files of ours in a folder, which would be made."""
    try:
        while not folder.exists():
            if folder.is_symlink() or folder.parent == folder:
                return os.strerror(errno.ENOENT)
            folder = folder.parent
    except OSError as exc:
        return exc.strerror
    if not folder.is_dir():
        return os.strerror(errno.ENOTDIR)
    return None if os.access(folder, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


def _no_file(file: Path) -> str | None:
    """Return why a file can't be written."""
    try:
        if not file.exists():
            is_there = file.parent.exists()
            return _no_folder(file.parent) if is_there else os.strerror(errno.ENOENT)
    except OSError as exc:
        return exc.strerror
    if file.is_dir():
        return os.strerror(errno.EISDIR)
    return None if os.access(file, os.R_OK | os.W_OK) else os.strerror(errno.EACCES)
