"""Exports: what is read is what was written, or is named as damaged."""

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.admin import export_format
from server.admin.export_format import split_lines
from server.admin.local import LocalOperations
from server.admin.operations import AdminError
from server.protocol.formats import Encoding
from tests.tiers.conftest import Clock
from tiers import Answer, Chain, DiskCache, Entry, FrequencySketch, MemoryCache, Tier
from tiers.purges.table import label

NOW = Clock().now
TIMES = st.floats(min_value=0, max_value=NOW)
LABELS = st.lists(st.text(min_size=1).filter(lambda text: "\n" not in text), max_size=3)
ENTRIES = st.builds(
    lambda form, content, usage, stored_at, ttl_s, more, generation, labels: Entry(
        Answer(form, content, usage), stored_at, stored_at + ttl_s, *more, generation,
        "\n".join(labels).encode(errors="replace"),
    ),
    st.sampled_from(Encoding), st.binary(max_size=200), st.binary(max_size=20), TIMES, TIMES,
    st.tuples(TIMES, TIMES, TIMES), st.integers(0, 2**64 - 1), LABELS,
)  # fmt: skip
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=100)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def entry(text: str, stored_at: float = NOW, ttl_s: float = 100, **more: object) -> Entry:
    return Entry(Answer(Encoding.JSON, text.encode()), stored_at, stored_at + ttl_s, **more)


def export(*entries: tuple[str, Entry], declared: int | None = None) -> list[bytes]:
    lines = [export_format.encode_entry(*each) for each in entries]
    last = export_format.footer_line(len(entries) if declared is None else declared)
    return [export_format.header_line(), *lines, last]


async def streamed(lines: Iterable[bytes]) -> AsyncIterator[bytes]:
    for line in lines:
        yield line


def made(folder: Path, clock: Clock, memory_bytes: int = 100_000) -> Chain:
    tiers = [
        Tier("memory", MemoryCache(memory_bytes, clock=clock)),
        Tier("disk", DiskCache(folder, 4 * 1024**2, clock=clock)),
    ]
    return Chain(tiers, frequency=FrequencySketch(1000), max_answer_bytes=10_000, clock=clock)


@given(KEYS, ENTRIES)
def test_what_is_read_is_what_was_written(key: str, written: Entry) -> None:
    line = export_format.encode_entry(key, written)
    assert export_format.decode_line(line) == (key, written)
    assert line.count(b"\n") == 1


@pytest.mark.parametrize("more", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("pieces", [1, 2])
async def test_large_answers_are_written_and_read_as_small_ones(more: int, pieces: int) -> None:
    content = bytes(range(256)) * 192 * pieces
    assert len(content) == pieces * export_format._PIECE_BYTES
    written = entry("")._replace(answer=Answer(Encoding.JSON, content[:more] + bytes(max(more, 0))))
    line = await export_format.encode_entry_offloaded("k", written)
    assert line == export_format.encode_entry("k", written)
    assert b64encode(written.answer.content) in line
    assert await export_format.decode_line_offloaded(line) == ("k", written)


@given(KEYS, ENTRIES, st.data())
def test_a_line_that_was_changed_is_damaged(key: str, written: Entry, data: st.DataObject) -> None:
    line = bytearray(export_format.encode_entry(key, written)[:-1])
    line[data.draw(st.integers(0, len(line) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(ValueError, match="damaged or cut"):
        export_format.decode_line(bytes(line))


@given(st.lists(st.binary(max_size=20)), st.integers(1, 10))
async def test_lines_don_t_depend_on_how_bytes_come(pieces: list[bytes], most: int) -> None:
    found = [line async for line in split_lines(streamed(pieces), most)]
    *ended, rest = b"".join(pieces).split(b"\n")
    assert found == [line[:most] for line in [*ended, *[rest] * bool(rest)]]


@settings(max_examples=20)
@given(st.dictionaries(KEYS, ENTRIES, max_size=20))
def test_an_import_of_an_export_gives_the_same_entries(
    tmp_path_factory, entries: dict[str, Entry]
) -> None:
    async def run() -> None:
        clock = Clock()
        folder = tmp_path_factory.mktemp("exports")
        lines = export(*entries.items())
        alive = {key: e for key, e in entries.items() if e.kept_until > clock.now}
        for name in ("one", "other"):
            chain = made(folder / name, clock)
            result = await LocalOperations(chain).import_(streamed(lines))
            assert result.pop("problems") == []
            assert (result["stored"], result["expired"]) == (
                len(alive),
                len(lines) - 2 - len(alive),
            )
            lines = [line async for line in LocalOperations(chain).export()]
            found = dict(
                each
                for line in lines[1:-1]
                if isinstance(each := export_format.decode_line(line), tuple)
            )
            # Nothing has been purged here, so no purge is known.
            assert found == {key: e._replace(purge_epoch=0) for key, e in alive.items()}
            assert export_format.decode_line(lines[-1]) == len(alive)
            await chain.close()

    asyncio.run(run())


async def test_an_import_overwrites_nothing_newer_and_keeps_what_was_purged_away(
    tmp_path: Path, clock: Clock
) -> None:
    chain = made(tmp_path, clock)
    administration = LocalOperations(chain)
    await chain.import_entry("held", entry("held"), chain.tiers)
    await chain.import_entry("older", entry("older", NOW - 9), chain.tiers)
    await chain.import_entry("same", entry("same"), chain.tiers)
    await chain.import_entry("then", entry("then"), chain.tiers)
    of_model = entry("m", NOW - 5, packed_labels=b"model:m")
    await chain.purge(label("model", "m"))
    clock.now += 1
    result = await administration.import_(
        streamed(
            export(
                ("held", entry("imported", NOW - 1)),
                ("older", entry("imported", NOW - 1)),
                ("same", entry("same")),
                ("then", entry("imported")),
                ("expired", entry("imported", NOW - 101)),
                ("purged", of_model),
                ("made since", of_model._replace(stored_at=NOW + 0.5)),
                ("large", entry("x" * 10_001)),
            )
        )
    )
    assert result == {
        "stored": 2, "unchanged": 1, "older": 2, "expired": 1, "purged": 1, "refused": 1,
        "damaged": 0, "problems": [],
    }  # fmt: skip
    texts = {}
    for key in ("held", "older", "same", "then", "expired", "purged", "made since", "large"):
        found = await chain.lookup(key)
        texts[key] = None if found is None else found.entry.answer.content
    assert texts == {
        "held": b"held", "older": b"imported", "same": b"same", "then": b"then",
        "expired": None, "purged": None,
        "made since": b"m", "large": None,
    }  # fmt: skip
    await chain.close()


async def test_an_import_overwrites_nothing_newer_in_a_farther_tier(
    tmp_path: Path, clock: Clock
) -> None:
    chain = made(tmp_path, clock)
    old, new = entry("old", NOW - 30), entry("new", NOW - 10)
    for tier, held in zip(chain.tiers, (old, new), strict=True):
        await tier.put("k", held.encode(), 100)
    result = await LocalOperations(chain).import_(
        streamed(export(("k", entry("between", NOW - 20))))
    )
    assert (result["stored"], result["older"]) == (0, 1)
    assert [await tier.peek("k") for tier in chain.tiers] == [old, new]
    await chain.close()


async def test_damage_is_named_and_the_rest_is_imported(tmp_path: Path, clock: Clock) -> None:
    first, one, two, three, last = export(*((key, entry(key)) for key in "123"))
    lines = [first, one, two[:50], b"", three.replace(b"key", b"KEY"), last]
    chain = made(tmp_path, clock)
    result = await LocalOperations(chain).import_(streamed(lines))
    assert (result["stored"], result["damaged"]) == (1, 3)
    assert [problem.split(" is ")[0] for problem in result["problems"][:3]] == [
        "line 3", "line 4", "line 5",
    ]  # fmt: skip
    assert result["problems"][3] == "the last line counts 3 entries, but 1 could be read"
    result = await LocalOperations(chain).import_(streamed([first, one]))
    assert result["problems"] == ["the last line is missing: the export was cut"]
    await chain.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"form": "odd"}, "no entry"),
        ({"content": "?"}, "no entry"),
        ({"labels": ["a\nb"]}, "no entry"),
        ({"labels": 1}, "no entry"),
        ({"stored_at": None}, "no entry"),
        ({"took_s": -1}, "time that is negative"),
        ({"generation": -1}, "generation"),
        ({"generation": 0.5}, "generation"),
        ({"key": ""}, "key"),
        ({"key": "k" * 512}, "key"),
        ({"key": 1}, "key"),
    ],
)
def test_a_line_that_verifies_but_can_t_be_is_named(fields: dict, message: str) -> None:
    whole = {
        "key": "k", "stored_at": 1, "expires_at": 2, "took_s": 0, "stale_while_revalidate_s": 0,
        "stale_if_error_s": 0, "generation": 0, "labels": [], "form": "body", "content": "",
        "usage": "",
    }  # fmt: skip
    assert export_format.decode_line(export_format._line(whole)) == (
        "k",
        Entry(Answer(Encoding.JSON, b""), 1, 2),
    )
    with pytest.raises(ValueError, match=message):
        export_format.decode_line(export_format._line(whole | fields))


@pytest.mark.parametrize(
    ("first", "message"),
    [
        (b"", "should begin as an export of tierserve"),
        (b'{"format":"tierserve-export","version":1}', "should begin as an export"),
        (export_format._line({"format": "other"}), "names another format"),
        (
            export_format._line({"format": export_format.FORMAT_NAME, "version": 2}),
            "of version 1, not 2",
        ),
    ],
)
async def test_what_is_no_export_is_refused(tmp_path: Path, clock: Clock, first, message) -> None:
    chain = made(tmp_path, clock)
    with pytest.raises(AdminError, match=message) as caught:
        await LocalOperations(chain).import_(streamed([first]))
    assert caught.value.status == 400
    await chain.close()
