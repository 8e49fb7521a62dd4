"""Leases in a file: one process has one at a time, and loses it by nothing but its end."""

import asyncio
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiers.child import Child
from tiers import FileLeases
from tiers.singleflight.leases import FILE

KEYS = ("a", "b", "c")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "release", "end"]),
        st.integers(0, 2),
        st.sampled_from(KEYS),
    ),
    max_size=40,
)


@given(STEPS)
def test_one_has_it_until_it_has_released_it_as_often(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int, str]]
) -> None:
    folder = tmp_path_factory.mktemp("leases")

    async def run() -> None:
        # Locks of open files exclude each other within a process, too.
        processes = [FileLeases(folder) for _ in range(3)]
        times = [dict.fromkeys(KEYS, 0) for _ in processes]
        for step, number, key in steps:
            leases, mine = processes[number], times[number]
            if step == "take":
                is_free = not any(other[key] for other in times if other is not mine)
                assert await leases.take(key) == is_free
                mine[key] += is_free
            elif step == "release" and mine[key]:
                await leases.release(key)
                mine[key] -= 1
            elif step == "end":
                await leases.close()
                processes[number], times[number] = FileLeases(folder), dict.fromkeys(KEYS, 0)
        for leases in processes:
            await leases.close()

    asyncio.run(run())


async def test_outlives_another_descriptor_of_the_file(tmp_path: Path) -> None:
    ours, theirs = FileLeases(tmp_path), FileLeases(tmp_path)
    assert await ours.take("k")
    (tmp_path / FILE).read_bytes()
    assert not await theirs.take("k")
    for leases in (ours, theirs):
        await leases.close()


async def test_the_file_stays_empty_and_private(tmp_path: Path) -> None:
    leases = FileLeases(tmp_path)
    assert await leases.take("k")
    found = (tmp_path / FILE).stat()
    assert (found.st_size, found.st_mode & 0o777) == (0, 0o600)
    await leases.close()


async def test_after_closing_nobody_is_kept_waiting(tmp_path: Path) -> None:
    leases = FileLeases(tmp_path)
    assert await leases.take("k")
    await leases.close()
    await leases.release("k")
    assert await leases.take("k")
    await leases.close()


def take(connection: Connection, folder: Path) -> None:
    async def main() -> None:
        leases = FileLeases(folder)
        connection.send(await leases.take("k"))
        connection.recv()

    asyncio.run(main())


async def test_a_kill_frees_it(tmp_path: Path) -> None:
    ours = FileLeases(tmp_path)
    with Child(take, tmp_path) as child:
        assert child.connection.recv() is True
        assert not await ours.take("k")
        assert await ours.take("another")
    assert await ours.take("k")
    await ours.close()


async def test_who_sees_nothing_of_others_waits_for_nobody(tmp_path: Path) -> None:
    sees = False
    ours, theirs = FileLeases(tmp_path), FileLeases(tmp_path, lambda: sees)
    assert await ours.take("k")
    assert await theirs.take("k")
    await theirs.release("k")
    sees = True
    assert not await theirs.take("k")
    await ours.release("k")
    assert await theirs.take("k")
    for leases in (ours, theirs):
        await leases.close()
