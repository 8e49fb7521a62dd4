"""Names with several addresses: each of these is an upstream, and they come and go."""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from socket import AF_INET, AF_INET6, gaierror

import pytest
from aiohttp import web

from server.engine.routing.addresses import Addresses, UpstreamAddress, look_up
from server.engine.routing.upstreams import Upstreams
from server.engine.turns import Turns
from server.engine.upstream import Upstream as EngineServer
from tests.server.conftest import CHAT, WHOLE, Upstream, held, question, skip_unless_runs
from tests.server.engine.routing.ejected import eject
from tests.server.workers.fleet import Fleet
from tests.servers import free_port
from tests.waiting import HANGS_S

NAME = "dns+http://user:secret@engines.test:8000"


class Names:
    """What a DNS server knows of one name; `None` if it doesn't answer."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: Sequence[str] | None = addresses
        self.asked: list[str] = []

    async def look_up(self, host: str) -> Sequence[str]:
        self.asked.append(host)
        if self.addresses is None:
            raise gaierror(-3, "Temporary failure in name resolution")
        return self.addresses

    async def asked_again(self) -> None:
        """Wait until two more lookups have begun, so that one has ended."""
        so_far = len(self.asked)
        await until(lambda: len(self.asked) > so_far + 1)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(HANGS_S):
        while not holds():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def at(*ips: str) -> list[UpstreamAddress]:
    return [UpstreamAddress("http://user:secret@engines.test:8000", ip) for ip in ips]


async def test_a_name_is_all_its_addresses(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    names = Names("10.0.0.1", "10.0.0.2")
    addresses = Addresses(["http://one:1", NAME], names.look_up, every_s=0.01)
    assert addresses.all == [UpstreamAddress("http://one:1")]
    changes = itertools.count()
    following = asyncio.create_task(addresses.follow(lambda: next(changes)))
    await until(
        lambda: addresses.all == [UpstreamAddress("http://one:1"), *at("10.0.0.1", "10.0.0.2")]
    )
    assert {*names.asked} == {"engines.test"}
    await names.asked_again()
    names.addresses = ["10.0.0.2", "10.0.0.3"]
    await until(lambda: addresses.all[1:] == at("10.0.0.2", "10.0.0.3"))
    # A lookup that fails keeps the last.
    names.addresses = None
    await names.asked_again()
    await names.asked_again()
    assert addresses.all[1:] == at("10.0.0.2", "10.0.0.3")
    assert caplog.text.count("stay as they were: Temporary failure") == 1
    names.addresses = ["10.0.0.4"]
    await until(lambda: addresses.all[1:] == at("10.0.0.4"))
    assert next(changes) == 3
    assert "http://engines.test:8000 has the addresses 10.0.0.2, 10.0.0.3" in caplog.text
    assert "secret" not in caplog.text
    addresses.use(["http://one:1"])
    assert addresses.all == [UpstreamAddress("http://one:1")]
    following.cancel()


async def test_a_new_name_is_looked_up_at_once() -> None:
    names = Names("10.0.0.1")
    addresses = Addresses([], names.look_up, every_s=3600)
    following = asyncio.create_task(addresses.follow(lambda: None))
    await asyncio.sleep(0)
    addresses.use([NAME])
    await until(lambda: addresses.all == at("10.0.0.1"))
    following.cancel()


@pytest.mark.parametrize(
    ("found", "addresses"),
    [
        ([(AF_INET6, "fd00::1"), (AF_INET, "10.0.0.2"), (AF_INET, "10.0.0.1")], 2),
        ([(AF_INET6, "fd00::2"), (AF_INET6, "fd00::1"), (AF_INET6, "fd00::1")], 2),
    ],
)
async def test_a_machine_with_both_families_counts_once(monkeypatch, found, addresses) -> None:
    async def getaddrinfo(*_: object, **__: object) -> list:
        return [(family, 1, 6, "", (ip, 0)) for family, ip in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    ips = await look_up("engines.test")
    assert len(ips) == addresses
    assert list(ips) == sorted(ips)


async def test_requests_go_to_each_address_under_the_same_name() -> None:
    port = free_port()
    names = Names("127.0.0.2", "127.0.0.3")
    go = asyncio.Event()

    async def host(http: web.Request) -> web.StreamResponse:
        return web.Response(text=http.headers["Host"])

    addresses = Addresses([f"dns+http://engines.test:{port}"], names.look_up, every_s=0.01)
    upstreams = Upstreams(
        addresses,
        lambda address: EngineServer(address.url, ip=address.ip, timeout_s=60),
        max_requests=8,
        turns=Turns(),
        routing="round_robin",
    )
    watching = asyncio.create_task(upstreams.watch())
    made = [Upstream(f"127.0.0.{last}", port) for last in (2, 3, 4)]
    async with made[0] as one, made[1] as two, made[2] as three:
        await until(lambda: [each.ready for each in upstreams.all] == [True, True])
        assert [each.label for each in upstreams.all] == [one.url, two.url]
        two.handler = host
        one.handler = held(go)
        async with upstreams.request("POST", CHAT, data=b"{}", headers={}) as under_way:
            async with upstreams.request("GET", "/", data=None, headers={}) as reply:
                assert await reply.text() == f"engines.test:{port}"
            assert (len(one.asked), len(two.asked)) == (1, 1)
            kept = upstreams.members[1]
            eject(kept.upstream)
            names.addresses = ["127.0.0.3", "127.0.0.4"]
            await until(lambda: [each.label for each in upstreams.all] == [two.url, three.url])
            await until(lambda: upstreams.all[1].ready)
            assert upstreams.members[0] is kept
            assert not kept.upstream.takes_requests
            async with upstreams.request("POST", CHAT, data=b"{}", headers={}) as reply:
                assert reply.status == 200
            assert len(three.asked) == 1
            go.set()
            assert await under_way.read() == b"".join(WHOLE)
    watching.cancel()
    await upstreams.close()


async def test_workers_follow_the_addresses_of_a_name(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    own = 'mount --bind "$0" /etc/hosts && exec "$@"'
    wrapper = ("unshare", "--mount", "sh", "-c", own, str(hosts))

    def say(*ips: str) -> None:
        hosts.write_text("".join(f"{ip} engines.test\n" for ip in ips))

    async def up(fleet: Fleet, *engines: Upstream) -> None:
        async with asyncio.timeout(HANGS_S):
            while True:
                async with fleet.session.get("/metrics") as reply:
                    lines = (await reply.text()).splitlines()
                if sorted(line for line in lines if line.startswith("tierserve_upstream_up{")) == [
                    f'tierserve_upstream_up{{model="m",upstream="{engine.url}"}} 1.0'
                    for engine in engines
                ]:
                    return
                await asyncio.sleep(0.05)

    async def until_asked(fleet: Fleet, *engines: Upstream) -> None:
        for client in fleet.clients.values():
            before = [len(engine.asked) for engine in engines]
            async with asyncio.timeout(HANGS_S):
                while any(
                    len(engine.asked) == then for engine, then in zip(engines, before, strict=True)
                ):
                    assert (await client.ask(question(temperature=1)))[0] == 200

    say("127.0.0.2", "127.0.0.3")
    skip_unless_runs(*wrapper)
    port = free_port()
    models = {"m": {"upstreams": [f"dns+http://engines.test:{port}"], "vllm": {}}}
    made = [Upstream(f"127.0.0.{last}", port) for last in (2, 3, 4)]
    async with made[0] as one, made[1] as two, made[2] as three:
        fleet = Fleet(tmp_path, models)
        fleet.wrapper = wrapper
        async with fleet:
            await up(fleet, one, two)
            await until_asked(fleet, one, two)
            say("127.0.0.2", "127.0.0.4")
            await up(fleet, one, three)
            gone = len(two.asked)
            await until_asked(fleet, one, three)
            assert len(two.asked) == gone
