"""Keys and entries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiers import Answer, Entry, Form, digest


@given(st.lists(st.binary()), st.lists(st.binary()))
def test_keys_differ_when_parts_do(one: list[bytes], other: list[bytes]) -> None:
    assert (digest(*one) == digest(*other)) == (one == other)


@given(st.sampled_from(Form), st.binary(), st.binary(), st.floats(0, 1e10), st.floats(0, 1e10))
def test_entries_survive_encoding(form, content, usage, stored_at, expires_at) -> None:
    entry = Entry(Answer(form, content, usage), stored_at, expires_at)
    assert Entry.decode(entry.encode()) == entry


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x63" + bytes(40)])
def test_refuses_what_it_did_not_write(data: bytes) -> None:
    with pytest.raises(ValueError, match="entry is"):
        Entry.decode(data)
