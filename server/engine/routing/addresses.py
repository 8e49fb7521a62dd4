"""The addresses of a model's upstreams. Those of a name are looked up again while the server runs.

A lookup that fails keeps the last addresses: probes tell which of them still answer.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from socket import AF_INET, SOCK_STREAM
from typing import NamedTuple

from yarl import URL

from server.config.models import EACH_ADDRESS

logger = logging.getLogger(__name__)

# CoreDNS lets others keep what it says of a Kubernetes Service for so long (its plugin's `ttl`).
_EVERY_S = 5.0

LookUp = Callable[[str], Awaitable[Sequence[str]]]
"""Returns the IP addresses of a host.

Raises:
    OSError: there are none, or nobody could say.
"""


class UpstreamAddress(NamedTuple):
    """Where an upstream is."""

    url: str
    """Its base address; may have a user and a password."""
    ip: str | None = None
    """The address that stands for the host, where each of its addresses is an upstream."""


async def look_up(host: str) -> Sequence[str]:
    """Return the addresses of a host by IPv4, or by IPv6 if it has no others.

    A machine with both counts once.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, None, type=SOCK_STREAM)
    addresses = sorted({(family, str(address[0])) for family, *_, address in found})
    by_ipv4 = [ip for family, ip in addresses if family == AF_INET]
    return by_ipv4 or [ip for _, ip in addresses]


class Addresses:
    """The addresses of a model's upstreams.

    Args:
        urls: as the configuration names them.
        look_up: returns the addresses of a host.
        every_s: seconds between two lookups.
    """

    def __init__(
        self, urls: Iterable[str], look_up: LookUp = look_up, every_s: float = _EVERY_S
    ) -> None:
        self._look_up, self._every_s = look_up, every_s
        self._of_name: dict[str, Sequence[str]] = {}
        self._failed: set[str] = set()
        self._renamed = asyncio.Event()
        self.use(urls)

    def use(self, urls: Iterable[str]) -> None:
        """Have these URLs from now on; new names among them are looked up soon."""
        self._urls = tuple(urls)
        self._renamed.set()

    @property
    def all(self) -> Sequence[UpstreamAddress]:
        """All that are known."""
        found: list[UpstreamAddress] = []
        for url in self._urls:
            if (one := url.removeprefix(EACH_ADDRESS)) == url:
                found.append(UpstreamAddress(url))
            else:
                found += [UpstreamAddress(one, ip) for ip in self._of_name.get(one, ())]
        return found

    async def follow(self, on_change: Callable[[], None]) -> None:
        """Look names up again and again, until cancelled.

        Args:
            on_change: called when `all` has changed.
        """
        while True:
            self._renamed.clear()
            named = [
                url.removeprefix(EACH_ADDRESS) for url in self._urls if url.startswith(EACH_ADDRESS)
            ]
            for url in self._of_name.keys() - {*named}:
                del self._of_name[url]
            await asyncio.gather(*(self._renew(url, on_change) for url in named))
            with suppress(TimeoutError):
                async with asyncio.timeout(self._every_s if named else None):
                    await self._renamed.wait()

    async def _renew(self, url: str, on_change: Callable[[], None]) -> None:
        try:
            found = await self._look_up(URL(url).raw_host or "")
        except (OSError, UnicodeError) as exc:
            if url not in self._failed:
                self._failed.add(url)
                why = getattr(exc, "strerror", None) or type(exc).__name__
                logger.warning("the addresses of %s stay as they were: %s", _public(url), why)
            return
        self._failed.discard(url)
        if found != self._of_name.get(url):
            self._of_name[url] = found
            logger.info("%s has the addresses %s", _public(url), ", ".join(found))
            on_change()


def _public(url: str) -> str:
    return str(URL(url).with_user(None))
