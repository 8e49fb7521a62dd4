"""Checks that this machine has what a configuration names. Nothing is started, made or fetched.

What may change within a minute is no mistake: a port in use, an upstream that doesn't answer, a hub
that can't be reached.
"""

import errno
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from server.audit.chain import read_key
from server.auth.tenants import Tenants
from server.cache import encryption_key, encryption_key_error, open_shared
from server.config.base import ConfigError
from server.config.folders import NO_HOME, new_engine_folder
from server.config.load import LoadResult, load_partially
from server.config.prefix_tier import PrefixTierConfig
from server.config.schema import AdminConfig, Config, DiskTierConfig, LogConfig, ServerConfig
from server.engine.dtype import default_dtype
from server.engine.threads import worker_count
from server.engine.weights import lacks_embedded, local_folder, location_mistakes
from server.terminal import human_size
from server.web.tls import Certificate
from tiers.disk import EncryptionKeyError, check_key

_ANY_HOST = {"0.0.0.0", "::"}  # noqa: S104


def load_checked(file: Path, *, listens: bool = True) -> Config:
    """Read a configuration that a server can be started with.

    Args:
        file: holds it.
        listens: whether the server listens at its own address, and not at inherited sockets.

    Raises:
        ConfigError: the file can't be read, or has mistakes; the error names all of them.
    """
    result = load_partially(file)
    # A field with a mistake has its default now, so checks of it mean nothing.
    wrong = tuple(f"{path}{end}" for path in result.invalid_paths for end in (".", ":"))
    missing = [each for each in _missing(result, listens=listens) if not each.startswith(wrong)]
    if mistakes := result.mistakes + missing:
        raise ConfigError(mistakes)
    return result.config


def choices(config: Config) -> Iterator[str]:
    """Yield a line for each value that this machine decides and the configuration leaves open.

    And one where the machine can't give all that the configuration allows.
    """
    if config.server.workers == "auto":
        yield f"server.workers: {worker_count(config)}, by this machine's CPUs and the engines"
    for name, model in config.models.items():
        if lacks_embedded(model):
            yield f"models.{name}.source: prepared at the first start, which fetches 93 MB"
        if not model.upstreams and (dtype := default_dtype(model, local_folder(model))) is not None:
            yield f"models.{name}.engine.args.dtype: {dtype}, by this CPU's instructions"
    if config.tiers.prefix is not None:
        yield from _lacks_room(config.tiers.prefix)


def _missing(result: LoadResult, *, listens: bool) -> Iterator[str]:
    config = result.config
    yield from _mistakes_of(lambda: Tenants(config.tenants))
    if (tls := config.server.tls) is not None:
        yield from _mistakes_of(lambda: Certificate(tls))
    if not {"server.host", "server.port"} & {*result.invalid_paths}:
        yield from _check_addresses(config.server, config.admin, listens=listens)
    for name, model in config.models.items():
        if not model.upstreams:
            yield from location_mistakes(name, model)
    if not all(model.upstreams for model in config.models.values()):
        yield from _mistakes_of(new_engine_folder)
    if (disk := config.tiers.disk) is not None:
        yield from _check_disk(disk)
    if (prefix := config.tiers.prefix) is not None:
        yield from _check_prefix(prefix, config.tiers.disk)
    if (shared := config.tiers.shared) is not None:
        yield from _mistakes_of(lambda: open_shared(shared))
    yield from _check_socket(config.admin)
    yield from _check_log(config.log)


def _mistakes_of(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except ConfigError as exc:
        return exc.mistakes
    return []


def _check_addresses(server: ServerConfig, admin: AdminConfig, *, listens: bool) -> Iterator[str]:
    if listens:
        yield from _check_address("server", server.host, server.port)
    if admin.port is None:
        return
    yield from _check_address("admin", admin.host, admin.port)
    hosts = {server.host, admin.host}
    if listens and admin.port == server.port != 0 and (len(hosts) == 1 or hosts & _ANY_HOST):
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


def _check_prefix(prefix: PrefixTierConfig, disk: DiskTierConfig | None) -> Iterator[str]:
    if prefix.path is None:
        yield f"tiers.prefix.path: should be given: {NO_HOME}"
    elif disk is not None and disk.path is not None and _is_same(prefix.path, disk.path):
        yield f"tiers.prefix.path: should be another folder than tiers.disk.path, not {prefix.path}"
    elif (why := _no_folder(prefix.path)) is not None:
        yield f"tiers.prefix.path: should be a folder for us alone, not {prefix.path}: {why}"


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.resolve() == other.resolve()
    except (OSError, RuntimeError):
        return False


def _lacks_room(prefix: PrefixTierConfig) -> Iterator[str]:
    """Yield what the prefix tier can have, where its disk has less room than it may take."""
    folder = prefix.path
    try:
        while folder is not None and not folder.exists():
            folder = folder.parent
        if folder is None:
            return
        # What it has taken already is its own.
        taken = sum(each.stat().st_blocks * 512 for each in folder.glob("*") if each.is_file())
        free = shutil.disk_usage(folder).free + (taken if folder == prefix.path else 0)
    except OSError:
        return
    if free < prefix.max_bytes:
        sizes = f"{human_size(free)} of {human_size(prefix.max_bytes)}"
        yield f"tiers.prefix.max_bytes: there is room for {sizes}; blocks beyond aren't stored"


def _check_socket(admin: AdminConfig) -> Iterator[str]:
    if (path := admin.socket) is not None:
        should = f"admin.socket: should be a path where a socket can be made, or null, not {path}"
        if (why := _no_folder(path.parent)) is not None:
            yield f"{should}: {why}"
        elif path.exists() and not path.is_socket():
            yield f"{should}: something else is there"
    elif "socket" not in admin.model_fields_set:
        yield f"admin.socket: should be given, or null: {NO_HOME}"


def _check_log(log: LogConfig) -> Iterator[str]:
    files = {} if log.trace is None else {"trace": log.trace}
    if (audit := log.audit) is not None:
        files["audit.file"] = audit.file
    for name, file in files.items():
        if (why := _no_file(file)) is not None:
            yield f"log.{name}: should be a file that we can write, not {file}: {why}"
    if audit is not None:
        yield from _mistakes_of(lambda: read_key(audit.key_file, "log.audit.key_file"))


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
