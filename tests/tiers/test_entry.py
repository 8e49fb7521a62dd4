"""Keys and entries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tiers.conftest import JSON, SSE
from tiers import Answer, Entry, Provenance, digest


@given(st.lists(st.binary()), st.lists(st.binary()))
def test_keys_differ_when_parts_do(one: list[bytes], other: list[bytes]) -> None:
    assert (digest(*one) == digest(*other)) == (one == other)


@given(
    st.sampled_from((JSON, SSE)),
    st.binary(),
    st.binary(),
    st.floats(0, 1e10),
    st.integers(0, 2**63),
    st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1)),
)
def test_entries_survive_encoding(form, content, usage, at, generation, labels) -> None:
    origin = Provenance.of(generation, labels)
    entry = Entry(Answer(form, content, usage), at, at + 1, 2, 3, 4, *origin)
    assert Entry.decode(entry.encode()) == entry
    assert entry.provenance == origin
    assert entry.labels == tuple(labels)


@pytest.mark.parametrize("label", ["", "a\nb"])
def test_refuses_labels_that_it_could_not_tell_apart(label: str) -> None:
    with pytest.raises(ValueError, match="without a line break"):
        Provenance.of(0, ["model:m", label])


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x63" + bytes(40)])
def test_refuses_what_it_did_not_write(data: bytes) -> None:
    with pytest.raises(ValueError, match="entry is"):
        Entry.decode(data)
