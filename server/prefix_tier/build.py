"""Builds the prefix tier that a configuration describes, and what engines are told of it."""

from server.auth.tenants import Tenants
from server.cache import encryption_key
from server.config.folders import log_if_new
from server.config.schema import Config
from server.engine.prefix_options import PrefixOptions
from server.prefix_tier.labels import PrefixLabels
from server.prefix_tier.tier import PrefixTier
from tiers import Purges
from tiers.prefix_kv.store import StoreConfig


def prefix_options(config: Config) -> PrefixOptions | None:
    """Return what engines are told of the prefix tier, if there is one.

    Raises:
        ConfigError: the file of the key can't be read, or holds none.
    """
    prefix = config.tiers.prefix
    return None if prefix is None else PrefixOptions(prefix, _key(config))


def build_prefix_tier(config: Config, purges: Purges, tenants: Tenants) -> PrefixTier | None:
    """Return the prefix tier, if there is one. Its store isn't open yet.

    Raises:
        ConfigError: the file of the key can't be read, or holds none.
    """
    prefix = config.tiers.prefix
    if prefix is None or prefix.path is None:
        return None
    log_if_new("tiers.prefix.path", prefix.path)
    store = StoreConfig(prefix.path, prefix.max_bytes, _key(config), prefix.ttl_s)
    return PrefixTier(store, purges, PrefixLabels(tenants))


def _key(config: Config) -> bytes | None:
    disk = config.tiers.disk
    return None if disk is None else encryption_key(disk)
