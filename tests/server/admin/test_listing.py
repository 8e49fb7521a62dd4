"""Pages of the memory tier: each entry once, in one order, however they are asked for."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.admin import listing
from server.admin.listing import EntryListing
from server.admin.operations import EntryQuery
from tests.server.admin.test_exports import NOW, entry
from tests.tiers.conftest import Clock
from tests.waiting import HANGS_S
from tiers import Chain, FrequencySketch, MemoryCache, Tier


class Counted(MemoryCache):
    walks = 0

    def keys(self):
        self.walks += 1
        return super().keys()


async def made(counts: dict[str, int]) -> tuple[Chain, Counted]:
    backend, frequency = Counted(10**7, clock=Clock()), FrequencySketch(4096)
    chain = Chain(
        [Tier("memory", backend)], frequency=frequency, max_answer_bytes=99, clock=Clock()
    )
    for key, count in counts.items():
        await backend.write(key, entry("{}", NOW).encode(), None)
        for _ in range(count):
            frequency.record(key)
    return chain, backend


async def keys_of(listed: EntryListing, **query) -> tuple[list[str], str | None]:
    page = await listed.page(EntryQuery(**query))
    return [row["key"] for row in page["entries"]], page["after"]


@given(st.dictionaries(st.text("abc", min_size=1), st.integers(0, 5)), st.data())
async def test_any_pages_of_any_lists_tell_of_each_entry_once(counts, data) -> None:
    """Of lists that are under way at once, one is forgotten now and then, and goes on."""
    chain, _ = await made(counts)
    listed = EntryListing(chain, chain.tiers)
    prefixes = ["", "a", "b"]
    found: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    after: dict[str, str | None] = dict.fromkeys(prefixes, "")
    while under_way := [prefix for prefix in prefixes if after[prefix] is not None]:
        prefix = data.draw(st.sampled_from(under_way))
        limit = data.draw(st.integers(1, 4))
        keys, after[prefix] = await keys_of(
            listed, prefix=prefix, limit=limit, after=after[prefix] or ""
        )
        assert len(keys) <= limit
        found[prefix] += keys
        if data.draw(st.booleans()):
            listed._walks.clear()
    order = sorted(counts, key=lambda key: (-chain.frequency(key), key))
    for prefix in prefixes:
        assert found[prefix] == [key for key in order if key.startswith(prefix)]


async def test_all_are_walked_over_once_for_many_pages(monkeypatch) -> None:
    monkeypatch.setattr(listing, "_SORTED", 7)
    chain, backend = await made({f"{n:03}": n % 3 for n in range(500)})
    listed, found, after = EntryListing(chain, chain.tiers), [], ""
    while after is not None:
        keys, after = await keys_of(listed, limit=10, after=after)
        found += keys
        # What has left meanwhile is left out.
        backend._drop(f"{len(found):03}")
    assert len(found) == len(set(found)) < 500
    assert backend.walks == 1
    assert not listed._walks


async def test_few_lists_are_kept_at_once() -> None:
    chain, _ = await made({f"{n}": 0 for n in range(10)})
    listed = EntryListing(chain, chain.tiers)
    for limit in range(1, 10):
        await keys_of(listed, limit=limit)
    assert len(listed._walks) == listing._MAX_WALKS


async def test_a_list_that_nobody_goes_on_with_is_dropped(monkeypatch) -> None:
    monkeypatch.setattr(listing, "_WALK_LIFETIME_S", 0)
    chain, backend = await made({f"{n}": 0 for n in range(10)})
    listed = EntryListing(chain, chain.tiers)
    first, after = await keys_of(listed, limit=5)
    async with asyncio.timeout(HANGS_S):
        while listed._walks:  # noqa: ASYNC110 - a timer drops it.
            await asyncio.sleep(0)
    second, _ = await keys_of(listed, limit=5, after=after)
    assert [*first, *second] == [f"{n}" for n in range(10)]
    assert backend.walks == 2


@pytest.mark.parametrize("after", ["x:y", "memory:x:y"])
async def test_says_what_a_place_should_be(after: str) -> None:
    chain, _ = await made({"a": 1})
    with pytest.raises(listing.AdminError, match="after should be as the page before gave it"):
        await keys_of(EntryListing(chain, chain.tiers), after=after)
