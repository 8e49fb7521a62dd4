"""Several workers behave as one server: limits, reloads, purges, reports, and the way it ends."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import yaml

from server.config.secrets import hash_key
from tests.server.conftest import ROLE, Upstream, alike, counting, held, question, stream
from tests.server.web.test_tls import certificate, certificate_shown
from tests.server.workers.fleet import Fleet, alive, until_gone
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

OPERATOR = {"Authorization": "Bearer operator"}


def tenants(**more: dict) -> str:
    made = {"operator": {"operator": True}, **more}
    return yaml.safe_dump(
        {name: {"keys": [hash_key(name)], **fields} for name, fields in made.items()}
    )


def of(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def fleet(_upstream: Upstream, tmp_path_factory) -> AsyncIterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    (folder / "tenants.yaml").write_text(tenants())
    sections = {"tenants": {"file": "tenants.yaml"}}
    async with Fleet(folder, alike(_upstream.url), sections=sections, headers=OPERATOR) as made:
        yield made


async def until_all_say(fleet: Fleet, status: int, **options) -> None:
    """Wait until each worker answers a new question with this status."""
    for client in fleet.clients.values():
        async with asyncio.timeout(HANGS_S):
            while (await client.ask(question(), **options))[0] != status:
                pass


async def configure(fleet: Fleet, **more: dict) -> None:
    """Change the tenants' file, and wait until all workers know it."""
    for mark, status in (({"mark": {}}, 200), ({}, 401)):
        (fleet.config.parent / "tenants.yaml").write_text(tenants(**more, **mark))
        fleet.process.send_signal(signal.SIGHUP)
        await until_all_say(fleet, status, headers=of("mark"))


async def test_workers_share_answers_and_are_reported_as_one(
    fleet: Fleet, upstream: Upstream
) -> None:
    asked, (one, other) = question(), fleet.clients.values()
    misses = 'tierserve_requests_total{model="m",outcome="miss"'
    hits = 'tierserve_requests_total{model="m",outcome="hit"'
    before = await fleet.metric(misses), await fleet.metric(hits)
    assert (await one.ask(asked))[1] == "tierserve; fwd=miss"
    for client in (one, other):
        assert "; hit; " in (await client.ask_alone(asked))[1]
    assert len(upstream.asked) == 1
    await fleet.until_metric(misses, before[0] + 1)
    await fleet.until_metric(hits, before[1] + 2)
    async with asyncio.timeout(HANGS_S):
        while True:
            async with fleet.session.get("/overview") as reply:
                overview = await reply.json()
            assert overview["tier_names"] == ["memory", "disk"]
            assert sum(map(sum, overview["history"]["answered"].values())) >= 2
            # A step of the history may begin between the two.
            if (await fleet.admin("GET", "/overview"))[1]["history"] == overview["history"]:
                break


async def test_admin_operations_cover_all_workers(fleet: Fleet, upstream: Upstream) -> None:
    asked = [question() for _ in range(6)]
    clients = [*fleet.clients.values()]
    for number, each in enumerate(asked):
        await clients[number % 2].ask(each)
    await clients[0].ask(asked[1])
    rows, after = {}, ""
    while after is not None:
        params = {"limit": "2"} | ({"after": after} if after else {})
        status, page = await fleet.admin("GET", "/entries", params=params)
        assert status == 200
        for row in page["entries"]:
            assert row["key"] not in rows
            rows[row["key"]] = row
        after = page["after"]
    status, entry = await fleet.admin("GET", f"/entries/{next(iter(rows))}")
    assert (status, entry["key"]) == (200, next(iter(rows)))
    assert {"memory", "disk"} == {tier for row in rows.values() for tier in row["tiers"]}
    assert len(rows) >= len(asked)
    async with asyncio.timeout(HANGS_S):
        while True:
            memory, disk = (await fleet.admin("GET", "/stats"))[1]["tiers"]
            if disk["entries"] == len(rows):
                break
    assert memory["max_bytes"] == 256 * 2**20
    assert (await fleet.admin("GET", f"/entries/{'0' * 64}"))[0] == 404


async def test_tenants_are_read_again_in_all_workers(fleet: Fleet, upstream: Upstream) -> None:
    asked = question()
    for client in fleet.clients.values():
        assert (await client.ask(asked, headers=of("new")))[0] == 401
    await configure(fleet, new={})
    for client in fleet.clients.values():
        assert (await client.ask(asked, headers=of("new")))[0] == 200
    await configure(fleet)
    for client in fleet.clients.values():
        assert (await client.ask(asked, headers=of("new")))[0] == 401


async def test_limits_hold_over_all_workers(fleet: Fleet, upstream: Upstream) -> None:
    await configure(fleet, few={"requests_per_minute": 5})
    asked, clients, began = question(), [*fleet.clients.values()], time.monotonic()
    statuses = [(await clients[n % 2].ask(asked, headers=of("few")))[0] for n in range(8)]
    answered = statuses.count(200)
    assert statuses[:5] == [200] * 5
    assert answered <= 5 + (time.monotonic() - began) / 60 * 5
    assert answered + statuses.count(429) == 8
    await fleet.until_metric('tierserve_tenant_requests_total{tenant="few"', answered)


async def test_a_tenant_sees_its_answers_of_all_workers(fleet: Fleet, upstream: Upstream) -> None:
    await configure(fleet, seer={})
    for client in fleet.clients.values():
        assert (await client.ask(question(), headers=of("seer")))[0] == 200
    answers = 0
    async with asyncio.timeout(HANGS_S):
        # A worker that is slow is left out.
        while answers != 2:
            async with fleet.session.get("/overview", headers=of("seer")) as reply:
                overview = await reply.json()
            assert overview["tenant"] == "seer"
            assert "tiers" not in overview
            assert overview["history"]["answered"].keys() <= {"engine"}
            # A step of the history may begin between the two.
            answers = sum(overview["history"]["answered"].get("engine", ()))


async def test_variants_are_given_in_turn_by_all_workers(fleet: Fleet, upstream: Upstream) -> None:
    upstream.handler = counting()
    asked = question(cache={"mode": "use", "variants": 4}, temperature=1)
    one, other = fleet.clients.values()
    texts = [(await each.ask(asked))[2] for each in (one, other, one, other)]
    assert len(upstream.asked) == len(set(texts)) == 4


async def test_a_purge_holds_in_all_workers(fleet: Fleet, upstream: Upstream) -> None:
    asked = question()
    for client in fleet.clients.values():
        await client.ask(asked)
    times = await fleet.purge(model="m")
    for client in fleet.clients.values():
        only = {"Cache-Control": "only-if-cached"}
        assert (await client.ask(asked, headers=only))[0] == 504
    assert await fleet.metric("tierserve_purges_total") == times


async def test_a_purge_without_a_disk_tier_holds_in_all_workers(
    upstream: Upstream, tmp_path: Path
) -> None:
    async with Fleet(tmp_path, alike(upstream.url), disk=None) as fleet:
        asked, (one, other) = question(), fleet.clients.values()
        for client in (one, other):
            assert (await client.ask(asked))[1] == "tierserve; fwd=miss"
            assert "detail=memory" in (await client.ask_alone(asked))[1]
        (row,) = (await fleet.admin("GET", "/entries"))[1]["entries"]
        assert row["tiers"] == ["memory"]
        await fleet.purge(all=True)
        for client in (one, other):
            only = {"Cache-Control": "only-if-cached"}
            assert (await client.ask(asked, headers=only))[0] == 504
        export = b'{"format":"tierserve-export","version":1}\n'
        assert (await fleet.admin("POST", "/import", data=export))[0] == 409


async def test_workers_know_which_upstreams_answer(upstream: Upstream, tmp_path: Path) -> None:
    async with Upstream() as own, Fleet(tmp_path, alike(own.url)) as fleet:
        await own.stop()
        for client in fleet.clients.values():
            assert (await client.ask(question()))[0] == 503
        await fleet.until_ready(503)
        await own.start()
        await fleet.until_ready(200)
        await until_all_say(fleet, 200)


async def test_a_stop_lets_answers_of_all_workers_end(upstream: Upstream, tmp_path: Path) -> None:
    go = asyncio.Event()
    upstream.handler = held(go)
    async with Fleet(tmp_path, alike(upstream.url)) as fleet:
        pids = {fleet.process.pid, *fleet.pids()}
        assert len(pids) == 3
        replies = [
            await client.session.post("/v1/chat/completions", json=question(stream=True))
            for client in fleet.clients.values()
        ]
        for reply in replies:
            await reply.content.readuntil(b"\n\n")
        # As a terminal and service managers do, which signal all processes.
        for pid in fleet.pids():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid, number)
        fleet.process.terminate()
        await fleet.until_ready(0)
        go.set()
        for reply in replies:
            assert (await reply.read()).endswith(b"data: [DONE]\n\n")
        assert await asyncio.wait_for(fleet.process.wait(), HANGS_S) == 0
    assert not any(map(alive, pids))


async def test_a_second_signal_ends_all_workers_at_once(upstream: Upstream, tmp_path: Path) -> None:
    never = asyncio.Event()

    async def endless(http):
        return await stream(http, ROLE, never)

    upstream.handler = endless
    async with Fleet(tmp_path, alike(upstream.url)) as fleet:
        pids = fleet.pids()
        async with fleet.post(question(stream=True)) as response:
            await response.content.readuntil(b"\n\n")
            assert await fleet.end_by_signals() == 130
    await until_gone(pids)


async def test_an_address_in_use_is_said_at_the_start(fleet: Fleet, tmp_path: Path) -> None:
    other = Fleet(tmp_path, alike("http://127.0.0.1:1"))
    text = other.config.read_text().replace(str(other.port), str(fleet.port))
    other.config.write_text(text)
    with other.log.open("ab") as log:
        process = await asyncio.create_subprocess_exec(*other.command, stderr=log)
    assert await asyncio.wait_for(process.wait(), HANGS_S) == 1
    assert f"can't listen at 127.0.0.1 port {fleet.port}: Address already in use" in (
        other.log.read_text()
    )


async def test_all_workers_show_a_renewed_certificate(upstream: Upstream, tmp_path: Path) -> None:
    first = certificate(tmp_path, "first")
    tls = {"tls": {"certificate_file": "certificate.pem", "key_file": "key.pem"}}
    fleet = Fleet(tmp_path, alike(upstream.url), sections={"server": tls})
    fleet.url = fleet.url.replace("http", "https")
    async with fleet:
        assert {await certificate_shown(fleet) for _ in range(8)} == {first}
        renewed = certificate(tmp_path, "renewed")
        fleet.process.send_signal(signal.SIGHUP)
        # The kernel chooses a worker for each connection.
        shown: list[bytes] = []
        async with asyncio.timeout(HANGS_S):
            while shown != [renewed] * 16:
                shown = [*shown, await certificate_shown(fleet)][-16:]
