"""Builds the chain that a configuration describes: its tiers, their background work, its lock."""

import time
from collections.abc import Callable
from functools import partial
from math import inf
from pathlib import Path
from random import random
from typing import NamedTuple
from urllib.parse import urlsplit

from aiocache.base import BaseCache

from server.config.base import ConfigError
from server.config.folders import log_if_new
from server.config.schema import Config, DiskTierConfig, SharedTierConfig, TiersConfig
from server.config.secrets import parse_cipher_key
from server.config.shared_url import MEMCACHED_PORT
from server.telemetry.traced_tiers import TracedAnswerCache, TracedLock, TracedTier
from tiers import (
    AnswerCache,
    BackgroundWork,
    Chain,
    Demotion,
    DiskCache,
    FileLeases,
    FrequencySketch,
    GenerationLock,
    MemoryCache,
    Purges,
    SingleFlight,
    Tier,
    Transfers,
    WritePolicy,
)  # fmt: skip
from tiers.disk import KEY_BYTES, Durability, EncryptionKeyError
from tiers.purges.table import MAX_BYTES
from tiers.server_clock import ServerClock
from tiers.shared import NAME
from tiers.shared.leases import SharedLeases
from tiers.shared.purges import SharedPurges
from tiers.singleflight.leases import Leases
from tiers.tier import PATIENT_S

# The sketch counts as many keys as answers of this size fill the tiers, up to 4 MiB of counters.
_ENTRY_BYTES = 1024
_SKETCH_KEYS = 1024**2
# Demotions that wait for the disk.
_DEMOTION_BYTES = 16 * 1024**2
# The table of purges is kept in the disk tier's file, and should fill but a small part of it.
_PURGES_PART = 32


class TierStack(NamedTuple):
    """The chain of a server, its background work, and its generation lock."""

    chain: Chain
    background: BackgroundWork
    lock: GenerationLock

    def use(self, config: Config) -> None:
        """Put into effect what can change of the tiers while they are open.

        Raises:
            OSError: there is no memory for a tier of this size; nothing has changed.
        """
        for tier in self.chain.tiers:
            section = config.tiers.memory if tier.in_memory else config.tiers.disk
            if (local := tier.local) is None or section is None:
                continue
            if local.max_bytes != section.max_bytes:
                local.resize(section.max_bytes)
        self.chain.ttl_jitter = config.cache.ttl_jitter
        self.lock.wait_s = config.cache.wait_for_others_s

    async def close(self) -> None:
        """Store what is left, and close the tiers."""
        await self.lock.close()
        await self.background.close()
        await self.chain.close()


async def open_stack(config: Config) -> TierStack:
    """Open the tiers that a server needs.

    Raises:
        ConfigError: the disk tier's folder, or a file that the shared tier needs, can't be used.
    """
    chain, background = build(config)
    try:
        return TierStack(chain, background, build_lock(config, chain))
    except ConfigError:
        await chain.close()
        raise


def build(
    config: Config,
    *,
    quarantines: bool = True,
    clock: Callable[[], float] = time.time,
    chance: Callable[[], float] = random,
) -> tuple[Chain, BackgroundWork]:
    """Return the chain and its background work, which isn't started yet.

    Args:
        config: describes the tiers, and how entries move between them.
        quarantines: whether a disk tier's file that can't be used gives way to a new one.
        clock: returns Unix seconds.
        chance: returns a number from 0 to below 1.

    Raises:
        ConfigError: the disk tier's folder, or a file that the shared tier needs, can't be used.
        UntrustedError: the disk tier's file can't be used, and isn't to be quarantined.
    """
    tiers, cache = config.tiers, config.cache
    tier = Tier if config.tracing is None else TracedTier
    # First, since a disk tier that is open has to be closed again.
    shared = None if tiers.shared is None else _shared(tiers.shared, tier, clock)
    frequency = FrequencySketch(_sketch_keys(tiers))
    disk = _disk(tiers.disk, frequency, clock, quarantines=quarantines)
    farther = [] if disk is None else [tier(disk.NAME, disk, clock=clock)]
    transfers, purges = Transfers(), _purges(disk, clock)
    demotion = Demotion(
        farther, frequency, transfers, purges, max_bytes=_DEMOTION_BYTES, clock=clock
    )
    chained = list(farther)
    if tiers.memory is not None:
        memory = MemoryCache(
            tiers.memory.max_bytes,
            policy=tiers.memory.policy,
            on_evict=demotion.offer,
            clock=clock,
        )
        chained.insert(0, tier(memory.NAME, memory, clock=clock))
    shared_purges = None
    if shared is not None and tiers.shared is not None:
        chained.append(shared)
        shared_purges = SharedPurges(
            purges,
            shared.backend,
            server_clock=shared.server_clock,
            withholds=tiers.shared.when_unreachable == "miss",
        )
    chain = Chain(
        chained,
        frequency=frequency,
        max_answer_bytes=cache.max_answer_bytes,
        promote_after=tiers.promote_after,
        transfers=transfers,
        purges=purges,
        shared_purges=shared_purges,
        write=tiers.write,
        ttl_jitter=cache.ttl_jitter,
        clock=clock,
        chance=chance,
    )
    background = BackgroundWork(
        chained,
        disk,
        frequency,
        demotion,
        purges,
        shared_purges=shared_purges,
        write=tiers.write,
        clock=clock,
    )
    return chain, background


def _disk(
    config: DiskTierConfig | None,
    frequency: FrequencySketch,
    clock: Callable[[], float],
    *,
    quarantines: bool,
) -> DiskCache | None:
    """Open the disk tier's backend, if there is one."""
    if config is None or config.path is None:
        return None
    log_if_new("tiers.disk.path", config.path)
    try:
        return DiskCache(
            config.path,
            config.max_bytes,
            quarantines=quarantines,
            encryption_key=encryption_key(config),
            durability=config.durability,
            interval_s=config.interval_ms / 1000,
            compresses=config.compression == "zstd",
            worth=lambda key, size: (1 + frequency.estimate(key)) / size,
            clock=clock,
        )
    except EncryptionKeyError as exc:
        raise encryption_key_error(config.path, exc) from exc
    except OSError as exc:
        raise _no_folder(config.path, exc) from exc


def encryption_key(disk: DiskTierConfig) -> bytes | None:
    """Return the key with which the disk tier's file is encrypted, if it is.

    Raises:
        ConfigError: its file can't be read, or holds none.
    """
    if (file := disk.encryption_key_file) is None:
        return None if disk.encryption_key is None else parse_cipher_key(disk.encryption_key)
    try:
        return parse_cipher_key(file.read_text(encoding="ascii"))
    except OSError as exc:
        text = f"tiers.disk.encryption_key_file: {file}: {exc.strerror}"
        raise ConfigError([text]) from exc
    except ValueError:
        should = f"should hold {KEY_BYTES} bytes in hexadecimal or base64"
        raise ConfigError([f"tiers.disk.encryption_key_file: {file} {should}"]) from None


def _purges(disk: DiskCache | None, clock: Callable[[], float]) -> Purges:
    room = inf if disk is None else disk.max_bytes // _PURGES_PART
    return Purges(disk, max_bytes=int(min(MAX_BYTES, room)), clock=clock)


def build_lock(config: Config, chain: Chain) -> GenerationLock:
    """Return the lock under which answers for `chain` are generated.

    Raises:
        ConfigError: the file of leases in the disk tier's folder can't be used.
    """
    disk = config.tiers.disk
    leases: list[Leases] = []
    # Only where others see an answer as soon as it is stored.
    if (
        config.tiers.write is WritePolicy.ON_INSERT
        and disk is not None
        and disk.path is not None
        and disk.durability is not Durability.INTERVAL
    ):
        try:
            leases.append(FileLeases(disk.path, partial(_sees_disk, chain)))
        except OSError as exc:
            raise _no_folder(disk.path, exc) from exc
    leases += [
        SharedLeases(
            tier.backend,
            deadline_s=max(tier.deadline_s, PATIENT_S),
            is_available=partial(_sees_shared, chain),
        )
        for tier in chain.tiers
        if tier.shared
    ]
    lock = GenerationLock if config.tracing is None else TracedLock
    return lock(chain, leases, wait_s=config.cache.wait_for_others_s)


def build_answers(config: Config, stack: TierStack, flights: SingleFlight) -> AnswerCache:
    """Return what looks answers up in the tiers, or has them generated."""
    answers = AnswerCache if config.tracing is None else TracedAnswerCache
    return answers(stack.chain, flights, stack.lock)


def _sees_shared(chain: Chain) -> bool:
    """Return whether answers that other machines store are found here."""
    return not chain.purges.shared_unknown


def _sees_disk(chain: Chain) -> bool:
    """Return whether answers that other processes store on disk are found here."""
    return all(tier.is_open for tier in chain.tiers) and not chain.purges.withholds


def _shared(config: SharedTierConfig, tier: type[Tier], clock: Callable[[], float]) -> Tier:
    backend, deadline_s = open_shared(config), config.deadline_ms / 1000
    server_clock = ServerClock(backend, clock=clock)
    return tier(
        NAME,
        backend,
        deadline_s=deadline_s,
        shared=True,
        server_clock=server_clock,
        clock=clock,
    )


def open_shared(config: SharedTierConfig) -> BaseCache:
    """Return the shared tier's backend; it connects when it is first used.

    Raises:
        ConfigError: a file that it needs can't be used.
    """
    try:
        return open_cache(config.url)
    except OSError as exc:
        problem = f"its TLS files can't be used: {exc.strerror or exc}"
        raise ConfigError([f"tiers.shared.url: {problem}"]) from exc


def encryption_key_error(path: Path, exc: EncryptionKeyError) -> ConfigError:
    """Return the error of a key that doesn't fit the file in the folder `path`."""
    return ConfigError([f"tiers.disk.encryption_key: the file in {path} stays as it is: {exc}"])


def _no_folder(path: Path, exc: OSError) -> ConfigError:
    should = f"should be a folder for us alone, not {path}: {exc.strerror or exc}"
    return ConfigError([f"tiers.disk.path: {should}"])


def _sketch_keys(tiers: TiersConfig) -> int:
    """Return how many keys the tiers may hold, as far as the sketch's size is worth it."""
    sizes = [tier.max_bytes for tier in (tiers.memory, tiers.disk) if tier is not None]
    keys = min(sum(sizes) // _ENTRY_BYTES, _SKETCH_KEYS)
    if tiers.disk is not None:
        # The sketch itself is kept there.
        keys = min(keys, tiers.disk.max_bytes // 256)
    return max(keys, 1024)


def open_cache(url: str) -> BaseCache:
    """Return the backend for a URL that is right; it connects when it is first used."""
    parts = urlsplit(url)
    # Imported here, since each needs an extra.
    if parts.scheme == "memcached":
        from tiers.shared.memcached import MemcachedBytes

        return MemcachedBytes(parts.hostname or "", parts.port or MEMCACHED_PORT)
    from tiers.shared.redis import RedisBytes

    return RedisBytes(url)
