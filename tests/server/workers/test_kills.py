"""Workers that are killed under load, and a master that is: who loses what."""

import asyncio
import os
import resource
import signal
import sys
from itertools import count
from pathlib import Path

import aiohttp
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import Upstream, alike, question
from tests.server.sides import LONG
from tests.server.workers.fleet import Client, Fleet, until_gone

pytestmark = pytest.mark.asyncio(loop_scope="module")

KILLS = 30 if LONG else 12


class Load:
    """Hits, misses and looks at the metrics through one connection, which all have to succeed."""

    def __init__(self, client: Client) -> None:
        self.client, self.asked = client, 0
        self._known, self._stop = question(), False
        self._counters: dict[tuple, float] = {}
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        for number in count():
            if self._stop:
                return
            asked = question() if number % 4 == 1 else self._known
            status, _, body = await self.client.ask(asked)
            assert (status, b'"content":"yes"' in body) == (200, True)
            if number % 8 == 0:
                await self._look_at_metrics()
            self.asked += 1

    async def _look_at_metrics(self) -> None:
        async with self.client.session.get("/metrics") as reply:
            if reply.status == 503:
                # The other processes haven't answered in time.
                return
            assert reply.status == 200
            text = await reply.text()
        for family in text_string_to_metric_families(text):
            if family.type in ("counter", "histogram"):
                for sample in family.samples:
                    key = sample.name, *sorted(sample.labels.items())
                    assert sample.value >= self._counters.get(key, 0), key
                    self._counters[key] = sample.value

    async def until(self, more: int) -> None:
        """Wait for so many more requests."""
        goal = self.asked + more
        while self.asked < goal:
            if self._task.done():
                self._task.result()
            await asyncio.sleep(0.005)

    async def end(self) -> None:
        self._stop = True
        await self._task


# Workers start by the score, which takes minutes where others are at work.
@pytest.mark.timeout(1500)
async def test_a_worker_that_is_killed_loses_only_its_own_requests(
    upstream: Upstream, tmp_path: Path
) -> None:
    async with Fleet(tmp_path, alike(upstream.url), workers=3) as fleet:
        master = psutil.Process(fleet.process.pid)
        seen = fleet.pids()
        survivor = next(iter(fleet.clients.values()))
        for _ in range(KILLS // 2):
            load = Load(survivor)
            await load.until(20)
            victims = frozenset(fleet.clients) - {survivor.worker}
            killed = {*map(fleet.pid_of, victims)}
            for victim in killed:
                os.kill(victim, signal.SIGKILL)
            # Until then one may still accept a connection.
            await until_gone(killed)
            # New connections that the kernel gives to the dead ones wait for the next ones.
            clients = await fleet.until_clients(but=victims)
            await load.until(20)
            await load.end()
            seen |= fleet.pids()
            # All are killed in turn.
            survivor = next(each for each in clients if each.worker != survivor.worker)
        assert len(seen) == KILLS + 3
        assert fleet.log.read_text().count("another takes its place") == KILLS
        sizes = [each.memory_info().rss // 2**20 for each in (master, *master.children())]
        sys.stderr.write(f"resident MiB of the master and its workers: {sizes}\n")
        assert "is quarantined" not in fleet.log.read_text()
    assert fleet.process.returncode == 0
    await until_gone(seen)


async def test_a_worker_is_replaced_once_the_machine_has_room_for_it(
    upstream: Upstream, tmp_path: Path
) -> None:
    async with Fleet(tmp_path, alike(upstream.url)) as fleet:
        victim = next(iter(fleet.clients))
        before = resource.prlimit(fleet.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(fleet.process.pid, resource.RLIMIT_NOFILE, (4, before[1]))
        os.kill(fleet.pid_of(victim), signal.SIGKILL)
        await fleet.until_logged("can't be started: [Errno 24] Too many open files", times=2)
        resource.prlimit(fleet.process.pid, resource.RLIMIT_NOFILE, before)
        await fleet.until_clients(but=frozenset({victim}))


async def test_workers_end_when_their_master_is_killed(upstream: Upstream, tmp_path: Path) -> None:
    async with Fleet(tmp_path, alike(upstream.url)) as fleet:
        pids = fleet.pids()
        fleet.process.kill()
        await until_gone(pids)
        with pytest.raises(aiohttp.ClientError):
            await fleet.ask(question())
        await fleet.session.close()
        await fleet.process.wait()
        await fleet.disconnect()
        # Nothing that was left behind is in the way.
        await fleet.start()
        assert (await fleet.ask(question()))[0] == 200
