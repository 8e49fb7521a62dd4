"""Checks that this machine has what a configuration names. Nothing is started, made or fetched.

What may change within a minute is no mistake: a port in use, an upstream that doesn't answer, a hub
that can't be reached.
"""

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from server.auth.tenants import Tenants
from server.cache import encryption_key, encryption_key_error, open_shared
from server.config.base import ConfigError
from server.config.folders import NO_HOME, new_engine_folder
from server.config.load import LoadResult, load_partially
from server.config.schema import AdminConfig, Config, DiskTierConfig, ServerConfig
from server.engine.dtype import default_dtype
from server.engine.weights import local_folder, location_mistakes
from server.web.tls import Certificate
from tiers.disk import EncryptionKeyError, check_key

_ANY_HOST = {"0.0.0.0", "::"}  # noqa: S104


def load_checked(file: Path) -> Config:
    """Read a configuration that a server can be started with.

    Raises:
        ConfigError: the file can't be read, or has mistakes; the error names all of them.
    """
    result = load_partially(file)
    # A field with a mistake has its default now, so checks of it mean nothing.
    wrong = tuple(f"{path}{end}" for path in result.invalid_paths for end in (".", ":"))
    missing = [each for each in _missing(result) if not each.startswith(wrong)]
    if mistakes := result.mistakes + missing:
        raise ConfigError(mistakes)
    return result.config


def choices(config: Config) -> Iterator[str]:
    """Yield a line for each value that this machine decides and the configuration leaves open."""
    for name, model in config.models.items():
        if not model.upstreams and (dtype := default_dtype(model, local_folder(model))) is not None:
            yield f"models.{name}.engine.args.dtype: {dtype}, by this CPU's instructions"


def _missing(result: LoadResult) -> Iterator[str]:
    config = result.config
    yield from _mistakes_of(lambda: Tenants(config.tenants))
    if (tls := config.server.tls) is not None:
        yield from _mistakes_of(lambda: Certificate(tls))
    if not {"server.host", "server.port"} & {*result.invalid_paths}:
        yield from _check_addresses(config.server, config.admin)
    for name, model in config.models.items():
        if not model.upstreams:
            yield from location_mistakes(name, model)
    if not all(model.upstreams for model in config.models.values()):
        yield from _mistakes_of(new_engine_folder)
    if (disk := config.tiers.disk) is not None:
        yield from _check_disk(disk)
    if (shared := config.tiers.shared) is not None:
        yield from _mistakes_of(lambda: open_shared(shared))
    yield from _check_socket(config.admin)
    if (trace := config.log.trace) is not None and (why := _no_file(trace)) is not None:
        yield f"log.trace: should be a file that we can write, not {trace}: {why}"


def _mistakes_of(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except ConfigError as exc:
        return exc.mistakes
    return []


def _check_addresses(server: ServerConfig, admin: AdminConfig) -> Iterator[str]:
    yield from _check_address("server", server.host, server.port)
    if admin.port is None:
        return
    yield from _check_address("admin", admin.host, admin.port)
    hosts = {server.host, admin.host}
    if admin.port == server.port != 0 and (len(hosts) == 1 or hosts & _ANY_HOST):
        yield f"admin.port: should be another than server.port, not {admin.port}"


def _check_address(section: str, host: str, port: int) -> Iterator[str]:
    """Yield why no server can use an address; one that is in use now may be free soon."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        refused = {_bind(family, address) for family, _, _, _, address in found}
    except OSError:
        refused = {errno.EADDRNOTAVAIL}
    if errno.EACCES in refused:
        yield f"{section}.port: should be one that this user may have, not {port}"
    elif not refused & {0, errno.EADDRINUSE}:
        yield f"{section}.host: should be a name or an address of this machine, not {host!r}"


def _bind(family: int, address: tuple[Any, ...]) -> int:
    """Bind an address once, without listening; returns the system's error number, or 0."""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as bound:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
    except OSError as exc:
        return exc.errno or errno.EADDRNOTAVAIL
    return 0


def _check_disk(disk: DiskTierConfig) -> Iterator[str]:
    if disk.path is None:
        yield f"tiers.disk.path: should be given: {NO_HOME}"
        return
    if (why := _no_folder(disk.path)) is not None:
        yield f"tiers.disk.path: should be a folder for us alone, not {disk.path}: {why}"
    try:
        check_key(disk.path, encryption_key(disk))
    except ConfigError as exc:
        yield from exc.mistakes
    except EncryptionKeyError as exc:
        yield from encryption_key_error(disk.path, exc).mistakes


def _check_socket(admin: AdminConfig) -> Iterator[str]:
    if (path := admin.socket) is not None:
        should = f"admin.socket: should be a path where a socket can be made, or null, not {path}"
        if (why := _no_folder(path.parent)) is not None:
            yield f"{should}: {why}"
        elif path.exists() and not path.is_socket():
            yield f"{should}: something else is there"
    elif "socket" not in admin.model_fields_set:
        yield f"admin.socket: should be given, or null: {NO_HOME}"


def _no_folder(folder: Path) -> str | None:
    """Return why we can't write files in a folder, which may have to be made; `None` if we can."""
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
    """Return why we can't write a file; `None` if we can."""
    try:
        if not file.exists():
            is_there = file.parent.exists()
            return _no_folder(file.parent) if is_there else os.strerror(errno.ENOENT)
    except OSError as exc:
        return exc.strerror
    if file.is_dir():
        return os.strerror(errno.EISDIR)
    return None if os.access(file, os.R_OK | os.W_OK) else os.strerror(errno.EACCES)
