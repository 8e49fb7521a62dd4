"""Processes that are cut off from their server, start anew, purge and store, in random order.

Two of them share a disk. Clocks differ, and the server may lose what it was told last. The orders
are random without Hypothesis, whose rules find no purge that is lost to a clock, even in many more
steps.
"""

import asyncio
import itertools
from random import Random
from typing import NamedTuple

import aiocache
import pytest
from aiocache.serializers import NullSerializer

from tests.tiers.conftest import JSON
from tests.tiers.shared.conftest import Disk
from tests.waiting import HANGS_S
from tiers import (
    Answer,
    Chain,
    FrequencySketch,
    Freshness,
    Provenance,
    PurgeError,
    Purges,
    Tier,
)
from tiers.shared.purges import SharedPurges

MACHINES = range(3)
"""Processes; each has a disk, of which the first two have one."""
DISK_OF = (0, 0, 1)
# With few, a later purge would hide what an earlier one has missed.
TAGS = tuple(f"tag:{letter}" for letter in "abcd")
LABELS = (*TAGS, *TAGS, "all")
ORDERS, STEPS = 400, 25


class Server(aiocache.SimpleMemoryCache):
    """One of several machines' ways to a server, which may be cut."""

    def __init__(self, held: dict) -> None:
        super().__init__(serializer=NullSerializer(encoding=None), timeout=0)
        self._cache, self.is_cut = held, False

    async def _get(self, *args, **options):
        if self.is_cut:
            raise ConnectionRefusedError
        return await super()._get(*args, **options)


class Made(NamedTuple):
    """An answer whose generation began on a machine at a step."""

    label: str
    provenance: Provenance
    step: int
    machine: int

    @property
    def key(self) -> str:
        return f"k{self.step}"


class Purged(NamedTuple):
    label: str
    step: int
    knows: frozenset[int]
    """The machines that had to know it when its caller was answered."""


class Machines:
    def __init__(self, random: Random) -> None:
        self.random = random
        self.held: dict = {}
        self.copied: dict = {}
        self.step, self.now_s = 0, 1e6
        self.ahead_s = [random.randint(-5, 5) for _ in set(DISK_OF)]
        self.disks = [Disk() for _ in set(DISK_OF)]
        # So that each look is one at the file.
        self.monotonic = itertools.count().__next__
        self.made: list[Made] = []
        self.stored: list[Made] = []
        self.purged: list[Purged] = []
        self.apart: set[int] = set()
        """Machines with purges that the server wasn't told of."""
        self.servers = [Server(self.held) for _ in MACHINES]
        self.purges: dict[int, Purges] = {}
        self.shared: dict[int, SharedPurges] = {}
        self.chains: dict[int, Chain] = {}

    async def run(self) -> None:
        for each in MACHINES:
            self.start(each)
        await self.poll(MACHINES)
        steps = (self.generate, self.purge, self.store, self.look_up, self.cut, self.heal,
                 self.restart, self.copy, self.fail_over, self.wait, self.set_clock)  # fmt: skip
        often = (3, 3, 2, 1, 1, 1, 1, 1, 0.5, 2, 0.5)
        for step in self.random.choices(steps, often, k=STEPS):
            self.step += 1
            await step(self.random.choice(MACHINES))
        await self.check_once_healed()

    def start(self, machine: int) -> None:
        server, disk = self.servers[machine], DISK_OF[machine]
        purges = Purges(
            self.disks[disk],
            clock=lambda: self.now_s + self.ahead_s[disk],
            monotonic=self.monotonic,
        )
        # A purge is answered once the others have polled, which they do here in no time.
        shared = SharedPurges(purges, server, every_s=-2 * HANGS_S, deadline_s=HANGS_S)
        self.purges[machine], self.shared[machine] = purges, shared
        self.chains[machine] = Chain(
            [Tier("shared", server, shared=True, clock=lambda: self.now_s)],
            frequency=FrequencySketch(64),
            max_answer_bytes=99,
            purges=purges,
            shared_purges=shared,
            clock=lambda: self.now_s,
        )

    async def poll(self, machines) -> None:
        for each in machines:
            assert await self.shared[each].sync()

    @property
    def connected(self) -> list[int]:
        return [each for each in MACHINES if not self.servers[each].is_cut]

    def is_gone(self, made: Made, purged: list[Purged]) -> bool:
        return any(
            made.step < purge.step and purge.label in ("all", made.label) for purge in purged
        )

    def check(self, machine: int, purged: list[Purged], of: list[Made]) -> None:
        """Check that a machine gives out nothing that began before purges that it knows."""
        for made in of:
            is_purged = self.purges[machine].is_purged(made.key, made.provenance)
            assert is_purged or not self.is_gone(made, purged), made

    async def check_once_healed(self) -> None:
        for server in self.servers:
            server.is_cut = False
        # The later rounds are for those that polled before another told the server.
        for _ in range(3):
            await self.poll(MACHINES)
        for each in MACHINES:
            self.check(each, self.purged, self.made)
            new = self.purges[each].provenance(["tag:a"])
            assert not any(purges.is_purged("k", new) for purges in self.purges.values())
        assert self.purges[0].table == self.purges[1].table == self.purges[2].table

    async def generate(self, machine: int) -> None:
        label = self.random.choice(TAGS)
        provenance = self.purges[machine].provenance([label])
        self.made.append(Made(label, provenance, self.step, machine))

    async def store(self, _: int) -> None:
        """Store what was generated, maybe long ago."""
        if not self.made:
            return
        made = self.random.choice(self.made)
        answer, provenance = Answer(JSON, b"1"), made.provenance
        chain = self.chains[made.machine]
        if await chain.store(made.key, answer, Freshness(1e6), provenance=provenance):
            self.stored.append(made)

    async def look_up(self, machine: int) -> None:
        """Whoever stored it, what a machine finds in the server began after what it knows of."""
        known = [purge for purge in self.purged if machine in purge.knows]
        for made in self.stored:
            found = await self.chains[machine].lookup(made.key)
            assert found is None or not self.is_gone(made, known), made

    async def purge(self, machine: int) -> None:
        label = self.random.choice(LABELS)
        if self.servers[machine].is_cut:
            with pytest.raises(PurgeError):
                await self.shared[machine].purge(label)
            knows = {machine}
            self.apart.add(machine)
        else:
            await self.shared[machine].purge(label)
            knows = {machine, *self.connected}
            await self.poll(self.connected)
        disks = {DISK_OF[each] for each in knows}
        knows = {each for each in MACHINES if DISK_OF[each] in disks}
        self.purged.append(Purged(label, self.step, frozenset(knows)))
        for each in knows:
            known = [purge for purge in self.purged if each in purge.knows]
            # What another machine made without the server, it has kept for itself.
            disk = DISK_OF[each]
            self.check(each, known, [made for made in self.made if DISK_OF[made.machine] == disk])

    async def cut(self, machine: int) -> None:
        self.servers[machine].is_cut = True
        assert not await self.shared[machine].sync()
        assert self.purges[machine].shared_unknown

    async def heal(self, machine: int) -> None:
        self.servers[machine].is_cut = False
        await self.poll([machine])
        self.apart.discard(machine)
        assert not self.purges[machine].shared_unknown

    async def restart(self, machine: int) -> None:
        """Start a process anew, whose disk has the purges, and is opened before or after a poll."""
        if machine in self.apart:
            # Who purged without the server, and then starts anew, may have to purge again.
            return
        self.start(machine)
        disk = Disk()
        disk.is_open = self.random.random() < 0.5
        if not disk.is_open:
            self.purges[machine]._disk = disk
        is_told = await self.shared[machine].sync()
        assert is_told is not self.servers[machine].is_cut
        await self.purges[machine].close()
        self.purges[machine]._disk = self.disks[DISK_OF[machine]]
        if is_told:
            await self.poll([machine])

    async def copy(self, _: int) -> None:
        """Have the server's replica get all that it lacks."""
        self.copied = dict(self.held)

    async def fail_over(self, _: int) -> None:
        """Put the replica in the server's place; whoever is connected tells it what it lacks."""
        self.held.clear()
        self.held.update(self.copied)
        await self.poll(self.connected)

    async def wait(self, _: int) -> None:
        self.now_s += 10 ** self.random.uniform(-3, 1)

    async def set_clock(self, machine: int) -> None:
        self.ahead_s[DISK_OF[machine]] = self.random.choice((-3600, 0, 3600))


async def test_what_was_purged_never_comes_back(monkeypatch) -> None:
    monkeypatch.setattr("tiers.purges.purges._SETTLE_S", 0)
    for seed in range(ORDERS):
        machines = Machines(random := Random(seed))
        monkeypatch.setattr("tiers.purges.purges.randrange", random.randrange)
        try:
            await machines.run()
        except BaseException as exc:
            exc.add_note(f"the order is that of {seed}")
            raise
        await asyncio.sleep(0)
